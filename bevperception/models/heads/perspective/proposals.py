"""3D boxes from the perspective head: the best of every image, without duplicates, in the BEV frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bevperception.models.heads.perspective.camera import boxes_to_bev, pinholes
from bevperception.models.heads.perspective.codec import PerspectiveCodec, by_image
from bevperception.models.heads.perspective.network import locations
from bevperception.models.heads.suppression import greedy
from bevperception.structures import Boxes3D, PerspectiveOutputs

_SMALLEST_RADIUS_M = 0.5


@dataclass(frozen=True)
class Proposals:
    """What the first stage hands to the second for one sample, best first.

    Attributes:
        boxes: n boxes in the BEV frame, labels of the perspective head; values and scores carry gradients.
        features: (n, C) image features of the places they were seen at.
        valid: (n,) bool, False for padding; None where there is none.
    """

    boxes: Boxes3D
    features: Tensor
    valid: Tensor | None = None


@dataclass(frozen=True)
class ProposalRules:
    """What becomes a proposal.

    Attributes:
        score_threshold: lowest score.
        per_image: at most so many (place, class) pairs of an image are looked at.
        image_iou: of two overlapping more in the same image, of one class, the better stays.
        merge_share: the same for boxes of one class from any camera whose centres lie nearer than this
            share of the better one's length (at least half a metre) on the ground.
        limit: at most so many a sample.
    """

    score_threshold: float = 0.05
    per_image: int = 100
    image_iou: float = 0.6
    merge_share: float = 0.5
    limit: int = 100


@dataclass(frozen=True)
class _Candidates:
    """Of all images: indices of image, place and class, the score without gradient, and which count."""

    image: Tensor
    place: Tensor
    label: Tensor
    score: Tensor
    valid: Tensor


def propose(
    outputs: PerspectiveOutputs, strides: Sequence[int], codec: PerspectiveCodec, rules: ProposalRules
) -> list[Proposals]:
    """Proposals of every sample.

    Args:
        outputs: of the head, for M images.
        strides: of its levels.
        codec: how 3D boxes are read.
        rules: what becomes a proposal.

    Returns:
        B proposal sets, possibly empty; in a compiled graph each has ``rules.limit``, padding included.
    """
    predicted = by_image([level._map(_widen) for level in outputs.levels])
    certainty = predicted.confidence.squeeze(2).sigmoid()
    scores = (predicted.class_logits.sigmoid() * predicted.centreness.sigmoid()[..., None]).sqrt() * certainty
    if outputs.present is not None:
        scores = torch.where(outputs.present[:, None, None], scores, 0.0)
    found = _candidates(scores.detach(), rules)
    chosen = predicted[found.image, found.place]
    places = torch.cat(locations(outputs.levels, strides)).to(scores)[found.place]
    cameras = pinholes(outputs.bev_to_image)[found.image]
    inverse = torch.linalg.inv(cameras.intrinsics).to(scores.dtype)
    seen = codec.boxes(chosen, found.label, places, inverse)
    values = boxes_to_bev(seen, chosen.speed, cameras)
    rectangles = torch.cat((places - chosen.box2d[:, :2], places + chosen.box2d[:, 2:]), dim=-1).detach()
    scores = scores[found.image, found.place, found.label]
    features = torch.cat([f.flatten(2) for f in outputs.features], dim=2)
    features = features[found.image, :, found.place]
    sample_of = torch.div(outputs.images, outputs.shape[1], rounding_mode="floor")[found.image]
    numbers = (sample_of, found.image, found.label, found.score, found.valid)
    columns = [number.double()[:, None] for number in numbers]
    rows = torch.cat((*columns, rectangles.double(), values.detach().double()), dim=-1)
    if torch.compiler.is_compiling():
        limit = min(rules.limit, len(rows))
        index = _padded_survivors(rows, outputs.shape[0], limit, rules.image_iou, rules.merge_share)
        return [
            Proposals(Boxes3D(values[mine], found.label[mine], scores[mine]), features[mine], there)
            for mine, there in zip(index.clamp_min(0), index >= 0, strict=True)
        ]
    kept = survivors(rows.cpu().numpy(), outputs.shape[0], rules)
    return [
        Proposals(Boxes3D(values[mine], found.label[mine], scores[mine]), features[mine])
        for mine in (torch.from_numpy(indices).to(values.device) for indices in kept)
    ]


def survivors(rows: NDArray[np.float64], samples: int, rules: ProposalRules) -> list[NDArray[np.int64]]:
    """Candidates that become proposals.

    Args:
        rows: (n, 18) sample, image, label, score, whether it counts, rectangle (4), box (9).
        samples: B.
        rules: thresholds and limit.

    Returns:
        For each of B samples the indices of its proposals, best first.
    """
    order = np.lexsort((-rows[:, 3], rows[:, 0]))
    order = order[rows[order, 4] > 0]
    first = np.searchsorted(rows[order, 0], np.arange(samples + 1))
    kept = []
    for begin, end in pairwise(first.tolist()):
        mine = order[begin:end]
        part = rows[mine]
        kept.append(mine[without_duplicates(part[:, 5:9], part[:, 9:], part[:, 1], part[:, 2], rules)])
    return kept


@torch.library.custom_op("bevperception::proposal_survivors", mutates_args=())
def _padded_survivors(rows: Tensor, samples: int, limit: int, image_iou: float, merge_share: float) -> Tensor:
    """:func:`survivors` as one operator of a compiled graph: (B, limit), -1 where there is none."""
    rules = ProposalRules(image_iou=image_iou, merge_share=merge_share, limit=limit)
    padded = np.full((samples, limit), -1, dtype=np.int64)
    for row, kept in zip(padded, survivors(rows.cpu().numpy(), samples, rules), strict=True):
        row[: len(kept)] = kept
    return torch.from_numpy(padded).to(rows.device)


@_padded_survivors.register_fake
def _(rows: Tensor, samples: int, limit: int, image_iou: float, merge_share: float) -> Tensor:
    return rows.new_empty((samples, limit), dtype=torch.int64)


def _widen(value: Tensor) -> Tensor:
    """Half precision is too coarse for pixels and metres."""
    return value.float() if value.dtype.itemsize < 4 else value


def _candidates(scores: Tensor, rules: ProposalRules) -> _Candidates:
    places, classes = scores.shape[1:]
    best, index = scores.flatten(1).topk(min(rules.per_image, places * classes), dim=1)
    passing = best > rules.score_threshold
    if torch.compiler.is_compiling():
        # How many pass is not known: take all along.
        image = torch.arange(len(best), device=best.device)[:, None].expand_as(best).flatten()
        chosen, score, valid = index.flatten(), best.flatten(), passing.flatten()
    else:
        image, rank = passing.nonzero(as_tuple=True)
        chosen, score, valid = index[image, rank], best[image, rank], torch.ones_like(image, dtype=torch.bool)
    place = torch.div(chosen, classes, rounding_mode="floor")
    return _Candidates(image, place, chosen % classes, score, valid)


def without_duplicates(
    rectangle: NDArray[np.float64],
    row: NDArray[np.float64],
    image: NDArray[np.float64],
    label: NDArray[np.float64],
    rules: ProposalRules,
) -> NDArray[np.int64]:
    """Greedy non-maximum suppression in the images, then on the ground over all cameras.

    Args:
        rectangle: (n, 4) pixels, in descending order of score.
        row: (n, 9) boxes in the BEV frame.
        image, label: (n,).
        rules: thresholds and limit.

    Returns:
        Indices that stay, in order, at most ``rules.limit``.
    """
    radius = np.maximum(rules.merge_share * row[:, 3], _SMALLEST_RADIUS_M)

    def duplicates_of(index: int, others: NDArray[np.intp]) -> NDArray[np.bool_]:
        same_image = image[others] == image[index]
        overlap = _iou(rectangle[index], rectangle[others]) > rules.image_iou
        distance = np.hypot(*(row[others, :2] - row[index, :2]).T)
        near: NDArray[np.bool_] = (distance < radius[index]) | (same_image & overlap)
        near &= label[others] == label[index]
        return near

    return np.array(greedy(len(label), duplicates_of, rules.limit), dtype=np.int64)


def _iou(one: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = np.maximum(one[:2], others[:, :2]), np.minimum(one[2:], others[:, 2:])
    intersection = np.clip(high - low, 0, None).prod(-1)
    areas = (others[:, 2:] - others[:, :2]).prod(-1) + (one[2:] - one[:2]).prod()
    result: NDArray[np.float64] = intersection / np.maximum(areas - intersection, 1e-9)
    return result
