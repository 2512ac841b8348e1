"""BEV segmentation quality: IoU per class, accumulated over frames and mergeable across processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIXED_THRESHOLD = 0.5
BEVFUSION_THRESHOLDS = (0.35, 0.40, 0.45, 0.50, 0.55, 0.60, 0.65)
"""BEVFusion reports, for every class, the best IoU over these thresholds on the whole split."""


@dataclass(frozen=True)
class SegmentationResult:
    """BEV IoU of a split, each class over the frames that have labels for it.

    The two protocols are not to be mixed in one table. A class without a labelled frame, or with neither
    a labelled nor a predicted cell, has NaN and does not count in the means.

    Attributes:
        iou: by class at the threshold 0.5.
        best_iou: by class at the best of :data:`BEVFUSION_THRESHOLDS`.
        mean_iou, mean_best_iou: over the classes that have a value.
        frames: labelled frames by class.
    """

    iou: dict[str, float]
    best_iou: dict[str, float]
    mean_iou: float
    mean_best_iou: float
    frames: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a metrics file or a logger."""
        return {
            "iou": self.iou,
            "mean_iou": self.mean_iou,
            "best_iou": self.best_iou,
            "mean_best_iou": self.mean_best_iou,
            "frames": self.frames,
        }

    def table(self) -> str:
        """A table of both protocols, one row a class."""
        lines = [f"{'BEV class':<16}{'frames':>8}{'IoU@0.5':>10}{'IoU@best':>10}"]
        for name in self.iou:
            lines.append(
                f"{name:<16}{self.frames[name]:>8}{self.iou[name]:>10.4f}{self.best_iou[name]:>10.4f}"
            )
        lines.append(f"{'mean':<16}{'':>8}{self.mean_iou:>10.4f}{self.mean_best_iou:>10.4f}")
        return "\n".join(lines)


class SegmentationMetric:
    """Accumulates intersections and unions of each class over frames.

    Args:
        classes: names, in the order of the channels.

    Attributes:
        counts: (2, thresholds, classes) int64 intersections and unions in cells; add those of several
            processes (an all-reduce sum) to merge.
        frames: (classes,) int64 labelled frames; likewise.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.thresholds = tuple(dict.fromkeys((FIXED_THRESHOLD, *BEVFUSION_THRESHOLDS)))
        self.counts = torch.zeros((2, len(self.thresholds), len(self.classes)), dtype=torch.int64)
        self.frames = torch.zeros(len(self.classes), dtype=torch.int64)

    def update(self, logits: Tensor, labels: Tensor, present: Tensor) -> None:
        """Add frames.

        Args:
            logits: (B, classes, rows, columns) raw scores; a probability of at least the threshold is on.
            labels: (B, classes, rows, columns) 0 or 1.
            present: (B, classes) bool, False where a frame has no labels for a class.

        Raises:
            ValueError: if the shapes differ or the logits are not finite.
        """
        if logits.shape != labels.shape or logits.shape[:2] != present.shape:
            raise ValueError(
                f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must have one shape, present "
                f"{tuple(present.shape)} its first two"
            )
        if not bool(logits.isfinite().all()):
            raise ValueError("segmentation logits are not finite: the weights are damaged")
        truth = labels > 0.5
        probability = logits.detach().float().sigmoid()
        known = present.to(truth.device)
        for index, threshold in enumerate(self.thresholds):
            predicted = probability >= threshold
            both = (predicted & truth).sum(dim=(-2, -1)) * known
            either = (predicted | truth).sum(dim=(-2, -1)) * known
            self.counts[0, index] += both.sum(0).cpu()
            self.counts[1, index] += either.sum(0).cpu()
        self.frames += known.sum(0).cpu()

    def merge(self, other: SegmentationMetric) -> None:
        """Add the counts of another process.

        Raises:
            ValueError: if it counts other classes.
        """
        if other.classes != self.classes:
            raise ValueError(f"cannot merge metrics of {other.classes} into those of {self.classes}")
        self.counts += other.counts
        self.frames += other.frames

    def result(self) -> SegmentationResult:
        """IoU of everything counted so far."""
        intersection, union = self.counts.double()
        iou = torch.where(union > 0, intersection / union.clamp_min(1), torch.nan)
        fixed = iou[self.thresholds.index(FIXED_THRESHOLD)]
        among = [self.thresholds.index(t) for t in BEVFUSION_THRESHOLDS]
        # A class may have no union at a high threshold and one at a low: NaN must not win.
        best = iou[among].nan_to_num(-1.0).amax(0)
        best = torch.where(best < 0, torch.nan, best)
        return SegmentationResult(
            iou=dict(zip(self.classes, fixed.tolist(), strict=True)),
            best_iou=dict(zip(self.classes, best.tolist(), strict=True)),
            mean_iou=float(fixed.nanmean()),
            mean_best_iou=float(best.nanmean()),
            frames=dict(zip(self.classes, self.frames.tolist(), strict=True)),
        )
