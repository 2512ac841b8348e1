"""Proposals of the perspective head: the best 3D boxes of every image, after NMS, in the BEV frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bevperception.models.heads.perspective.camera import boxes_to_bev, decompose_projection
from bevperception.models.heads.perspective.codec import PerspectiveCodec, by_image
from bevperception.models.heads.perspective.network import locations
from bevperception.models.heads.suppression import greedy
from bevperception.models.selection import select_rows
from bevperception.structures import Boxes3D, PerspectiveOutputs

_SMALLEST_RADIUS_M = 0.5


@dataclass(frozen=True)
class Proposals:
    """Proposals of one sample, best first.

    Attributes:
        boxes: n boxes in the BEV frame, labels of the perspective head; values and scores carry gradients.
        features: (n, C) image features at the places of their predictions.
        valid: (n,) bool, False for padding; None where there is none.
    """

    boxes: Boxes3D
    features: Tensor
    valid: Tensor | None = None


@dataclass(frozen=True)
class ProposalRules:
    """Which predictions become proposals.

    Attributes:
        score_threshold: lowest score.
        limit: at most so many a sample.
        per_image: at most so many (place, class) pairs of an image are candidates.
        image_iou: non-maximum suppression in an image, class by class: largest overlap of two that stay.
        nms_radius_ratio: the same on the ground, over all cameras: smallest distance of two centres as a
            share of the better one's length (at least half a metre).
    """

    score_threshold: float
    limit: int
    per_image: int = 100
    image_iou: float = 0.6
    nms_radius_ratio: float = 0.5


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
    """Choose the proposals of every sample.

    Args:
        outputs: of the head, for M images.
        strides: of its levels.
        codec: how 3D boxes are read.
        rules: which predictions become proposals.

    Returns:
        B proposal sets, possibly empty; in a compiled graph each has ``rules.limit``, padding included.
    """
    predicted = by_image([level._map(_widen) for level in outputs.levels])
    certainty = predicted.confidence.squeeze(2).sigmoid()
    scores = (predicted.class_logits.sigmoid() * predicted.centreness.sigmoid()[..., None]).sqrt() * certainty
    if outputs.present is not None:
        scores = torch.where(outputs.present[:, None, None], scores, 0.0)
    candidates = _candidates(scores.detach(), rules)
    chosen = predicted[candidates.image, candidates.place]
    places = torch.cat(locations(outputs.levels, strides)).to(scores)[candidates.place]
    cameras = decompose_projection(outputs.bev_to_image)[candidates.image]
    inverse = torch.linalg.inv(cameras.intrinsics).to(scores.dtype)
    in_camera = codec.boxes(chosen, candidates.label, places, inverse)
    values = boxes_to_bev(in_camera, chosen.speed, cameras)
    rectangles = torch.cat((places - chosen.box2d[:, :2], places + chosen.box2d[:, 2:]), dim=-1).detach()
    scores = scores[candidates.image, candidates.place, candidates.label]
    # levels of (M, C, h, w) -> (M, C, P)
    features = torch.cat([f.flatten(2) for f in outputs.features], dim=2)
    features = features[candidates.image, :, candidates.place]
    sample_of = torch.div(outputs.images, outputs.shape[1], rounding_mode="floor")[candidates.image]
    numbers = (sample_of, candidates.image, candidates.label, candidates.score, candidates.valid)
    columns = [number.double()[:, None] for number in numbers]
    rows = torch.cat((*columns, rectangles.double(), values.detach().double()), dim=-1)
    limit = min(rules.limit, len(rows))
    kept = _surviving(rows, outputs.shape[0], limit, rules.image_iou, rules.nms_radius_ratio)
    result = []
    for index in kept:  # (limit,), -1 for padding
        mine = select_rows(index >= 0)
        row = index[mine.index].clamp_min(0)
        boxes = Boxes3D(values[row], candidates.label[row], scores[row])
        result.append(Proposals(boxes, features[row], mine.valid))
    return result


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
        kept.append(mine[proposal_nms(part[:, 5:9], part[:, 9:], part[:, 1], part[:, 2], rules)])
    return kept


@torch.library.custom_op("bevperception::proposal_survivors", mutates_args=())
def _surviving(rows: Tensor, samples: int, limit: int, image_iou: float, nms_radius_ratio: float) -> Tensor:
    """:func:`survivors` as one operator of a graph: (B, limit), padded by -1."""
    rules = ProposalRules(0.0, limit, image_iou=image_iou, nms_radius_ratio=nms_radius_ratio)
    padded = np.full((samples, limit), -1, dtype=np.int64)
    for row, kept in zip(padded, survivors(rows.cpu().numpy(), samples, rules), strict=True):
        row[: len(kept)] = kept
    return torch.from_numpy(padded).to(rows.device)


@_surviving.register_fake
def _(rows: Tensor, samples: int, limit: int, image_iou: float, nms_radius_ratio: float) -> Tensor:
    return rows.new_empty((samples, limit), dtype=torch.int64)


def _widen(value: Tensor) -> Tensor:
    """Half precision is too coarse for pixels and metres."""
    return value.float() if value.dtype.itemsize < 4 else value


def _candidates(scores: Tensor, rules: ProposalRules) -> _Candidates:
    places, classes = scores.shape[1:]
    # (M, P, K) -> (M, k) of P*K
    best, index = scores.flatten(1).topk(min(rules.per_image, places * classes), dim=1)
    # (M,) -> (M*k,)
    images = torch.arange(len(best), device=best.device)[:, None].expand_as(best).flatten()
    passing = select_rows((best > rules.score_threshold).flatten())  # (M, k) -> (M*k,)
    row = passing.index
    chosen = index.flatten()[row]
    valid = torch.ones_like(chosen, dtype=torch.bool) if passing.valid is None else passing.valid
    place = torch.div(chosen, classes, rounding_mode="floor")
    return _Candidates(images[row], place, chosen % classes, best.flatten()[row], valid)


def proposal_nms(
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
    radius = np.maximum(rules.nms_radius_ratio * row[:, 3], _SMALLEST_RADIUS_M)

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
