"""Possible gain by hybrid queries: the objects that proposals find beside the model's boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bevperception.benchmarks.trained import load_trained, parse_trained
from bevperception.data.dataset import build_dataset
from bevperception.data.nuscenes import NuScenesReader
from bevperception.errors import ConfigError
from bevperception.evaluation.detection import class_ranges_m
from bevperception.evaluation.runner import perceive
from bevperception.inference import StreamingPredictor
from bevperception.models.bevformer import BEVFormer
from bevperception.structures import Boxes3D, CameraFrames, ModelOutputs

FOUND_WITHIN_M = 2.0
"""How near on the ground a box of an object's class finds it; one of the devkit's thresholds."""
_BANDS_M = (0.0, 15.0, 30.0, float("inf"))


@dataclass(frozen=True)
class Nearest:
    """The objects of some frames, and how far the nearest box of their class is from each.

    Attributes:
        range_m: (n,) from the vehicle to the object, on the ground.
        boxes_m, proposals_m: (n,) from the object to the nearest of the model's boxes and of its proposals;
            infinite where there is none of its class.
    """

    range_m: Tensor
    boxes_m: Tensor
    proposals_m: Tensor


def nearest_m(objects: Boxes3D, found: Boxes3D) -> Tensor:
    """Distance on the ground from every object to the nearest box of its class.

    Args:
        objects: n, BEV frame.
        found: m, BEV frame.

    Returns:
        (n,) metres, infinite for an object without a box of its class.
    """
    if not len(found):
        return torch.full((len(objects),), float("inf"))
    distance = torch.cdist(objects.values[:, :2].double(), found.values[:, :2].double())
    other = objects.labels[:, None] != found.labels
    nearest: Tensor = distance.masked_fill(other, float("inf")).amin(1).float()
    return nearest


def proposals_of(model: BEVFormer, frames: CameraFrames, outputs: ModelOutputs) -> Boxes3D:
    """The perspective head's proposals for one vehicle's frame, best first.

    Args:
        model: with a perspective head.
        frames: of the frame, B = 1, on the model's device.
        outputs: of the model; those of learned queries alone hold no proposals, which are made then.
    """
    assert model.perspective is not None
    predictions = outputs.perspective
    if predictions is None:
        predictions = model.perspective(model.image_features(frames), frames)
    return model.perspective.proposals(predictions)[0].boxes.to("cpu")


def compare(
    predictor: StreamingPredictor,
    model: BEVFormer,
    frames: CameraFrames,
    outputs: ModelOutputs,
    truth: Boxes3D,
) -> Nearest:
    """Of one frame, the objects within the devkit's range for their class and what is nearest to them.

    The model's boxes and its proposals are equally many at most: the best of each.

    Args:
        predictor: of the model.
        model: with a perspective head.
        frames: of the frame, B = 1.
        outputs: of the model.
        truth: the frame's annotations, BEV frame.
    """
    limit = model.config.perspective.max_proposals
    with torch.inference_mode():
        proposals = proposals_of(model, frames.to(predictor.device), outputs)
    boxes = predictor.decode(outputs)[0][:limit]
    reach = torch.tensor(class_ranges_m())
    range_m = truth.values[:, :2].norm(dim=-1).float()
    near = range_m < reach[truth.labels]
    objects = truth[near]
    return Nearest(range_m[near], nearest_m(objects, boxes), nearest_m(objects, proposals))


def joined(parts: Sequence[Nearest]) -> Nearest:
    """Several frames' objects as one set."""
    columns = [torch.cat([getattr(p, name) for p in parts]) for name in ("range_m", "boxes_m", "proposals_m")]
    return Nearest(*columns)


def format_table(objects: Nearest) -> str:
    """Shares found, by distance from the vehicle, and how far off the found ones are."""
    titles = ("objects", "boxes", "proposals", "only prop.", "boxes, m", "proposals, m")
    lines = [f"{'range, m':<12}" + "".join(f"{title:>14}" for title in titles)]
    for name, low, high in _bands():
        inside = (objects.range_m >= low) & (objects.range_m < high)
        boxes_m, proposals_m = objects.boxes_m[inside], objects.proposals_m[inside]
        by_boxes, by_proposals = boxes_m < FOUND_WITHIN_M, proposals_m < FOUND_WITHIN_M
        shares = (by_boxes, by_proposals, by_proposals & ~by_boxes)
        both = by_boxes & by_proposals
        numbers = [f"{int(inside.sum()):>14}", *(f"{float(share.float().mean()):>14.3f}" for share in shares)]
        numbers += [f"{float(off[both].mean()):>14.2f}" for off in (boxes_m, proposals_m)]
        lines.append(f"{name:<12}" + "".join(numbers))
    return "\n".join(lines)


def _bands() -> Iterator[tuple[str, float, float]]:
    for low, high in pairwise(_BANDS_M):
        yield (f"{low:.0f} to {high:.0f}" if high < float("inf") else f"from {low:.0f}"), low, high
    yield "all", 0.0, float("inf")


def main(argv: Sequence[str] | None = None) -> int:
    """The program ``tools/benchmark.py proposals``.

    Args:
        argv: arguments after ``proposals``; None takes the program's own.

    Raises:
        BevError: a setting, the weights or the data set do not suffice.
    """
    about = (
        "Objects found within 2 m by a model's boxes, by its proposals, and by proposals alone: what hybrid "
        "queries could add. The last columns say how far off boxes and proposals are where both find."
    )
    config, options = parse_trained(argv, "proposals", about, writes=False)
    heads = config.model
    if not heads.detection.enabled or not heads.perspective.enabled or heads.perspective.only:
        raise ConfigError("boxes and proposals are compared for a model with detection and perspective heads")
    model, device = load_trained(config, options.weights)
    dataset = build_dataset(NuScenesReader(config.data), config, options.split, training=False)
    predictor = StreamingPredictor(model, device, config.training.precision)
    parts = []
    for seen in perceive(predictor, dataset, dataset.tokens, config.data.workers, "comparing"):
        if seen.batch is not None and seen.outputs is not None and seen.batch.targets is not None:
            truth = seen.batch.targets.boxes[0]
            parts.append(compare(predictor, model, seen.batch.frames, seen.outputs, truth))
    if not parts:
        raise ConfigError(f"split {options.split} has no annotated sample that could be read")
    best = heads.perspective.max_proposals
    print(
        f"{len(parts)} frames; the best {best} boxes and proposals of each; found: within {FOUND_WITHIN_M} m"
    )
    print(format_table(joined(parts)))
    return 0
