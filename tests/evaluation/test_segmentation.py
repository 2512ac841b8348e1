"""BEV IoU against a slow count, cell by cell."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bevperception.evaluation.segmentation import BEVFUSION_THRESHOLDS, SegmentationMetric

CLASSES = ("drivable_area", "divider", "vehicle")


def random_frames(seed: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((batch, 3, 5, 7), generator=generator)
    labels = (torch.rand((batch, 3, 5, 7), generator=generator) > 0.6).float()
    present = torch.rand((batch, 3), generator=generator) > 0.3
    return logits, labels, present


def slow_iou(frames: list[tuple[Tensor, Tensor, Tensor]], class_index: int, threshold: float) -> float:
    both = either = 0
    for logits, labels, present in frames:
        for b in range(len(logits)):
            if not present[b, class_index]:
                continue
            for score, label in zip(
                logits[b, class_index].flatten().tolist(),
                labels[b, class_index].flatten().tolist(),
                strict=True,
            ):
                on = 1 / (1 + math.exp(-score)) >= threshold
                both += on and label == 1
                either += on or label == 1
    return both / either if either else math.nan


def test_iou_equals_the_slow_count_and_merges() -> None:
    frames = [random_frames(1, 2), random_frames(2, 3), random_frames(3, 1)]
    together, first, second = (SegmentationMetric(CLASSES) for _ in range(3))
    for part in frames:
        together.update(*part)
    first.update(*frames[0])
    for part in frames[1:]:
        second.update(*part)
    first.merge(second)
    result = first.result()
    assert result == together.result()
    for index, name in enumerate(CLASSES):
        assert result.iou[name] == pytest.approx(slow_iou(frames, index, 0.5))
        best = max(slow_iou(frames, index, t) for t in BEVFUSION_THRESHOLDS)
        assert result.best_iou[name] == pytest.approx(best)
        assert result.frames[name] == sum(int(present[:, index].sum()) for _, _, present in frames)
    assert result.mean_iou == pytest.approx(sum(result.iou.values()) / 3)


def test_perfect_and_empty_predictions() -> None:
    logits, labels, present = random_frames(4, 2)
    present[:] = True
    metric = SegmentationMetric(CLASSES)
    metric.update((labels - 0.5) * 40, labels, present)
    assert metric.result().mean_iou == 1.0
    metric = SegmentationMetric(CLASSES)
    metric.update(torch.full_like(logits, -40.0), labels, present)
    assert metric.result().mean_iou == 0.0
    assert metric.result().mean_best_iou == 0.0


def test_a_class_without_labels_does_not_count() -> None:
    logits, labels, present = random_frames(5, 2)
    present[:, 0], present[:, 1:] = False, True
    metric = SegmentationMetric(CLASSES)
    metric.update(logits, labels, present)
    result = metric.result()
    assert math.isnan(result.iou["drivable_area"])
    assert result.frames["drivable_area"] == 0
    assert result.mean_iou == pytest.approx((result.iou["divider"] + result.iou["vehicle"]) / 2)
    assert "nan" in result.table()


def test_the_threshold_at_which_nothing_is_on_does_not_win() -> None:
    # 0.42 is on at the thresholds 0.35 and 0.40; above, no cell is on or labelled: nothing to divide.
    metric = SegmentationMetric(("vehicle",))
    logits = torch.full((1, 1, 2, 2), math.log(0.42 / 0.58))
    metric.update(logits, torch.zeros((1, 1, 2, 2)), torch.ones((1, 1), dtype=torch.bool))
    assert math.isnan(metric.result().iou["vehicle"])
    assert metric.result().best_iou["vehicle"] == 0.0


def test_bad_input_is_refused() -> None:
    logits, labels, present = random_frames(6, 2)
    metric = SegmentationMetric(CLASSES)
    with pytest.raises(ValueError, match="one shape"):
        metric.update(logits, labels[:1], present)
    with pytest.raises(ValueError, match="not finite"):
        metric.update(logits * torch.nan, labels, present)
    with pytest.raises(ValueError, match="cannot merge"):
        metric.merge(SegmentationMetric(CLASSES[:2]))
