"""Of several boxes on one object the best."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bevperception.errors import ConfigError
from bevperception.models.heads import suppression
from bevperception.models.heads.suppression import circle_nms
from bevperception.structures import Boxes3D
from tests.models.builders import random_frames, tiny_config, tiny_model


def random_boxes(count: int, seed: int) -> Boxes3D:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, 9, generator=generator) * 12
    labels = torch.randint(3, (count,), generator=generator)
    scores = torch.rand(count, generator=generator).sort(descending=True).values
    return Boxes3D(values, labels, scores)


@given(st.integers(0, 40), st.integers(0, 5), st.sampled_from([0.1, 0.5, 1.3]))
def test_the_better_of_two_near_ones_stays(count: int, seed: int, share: float) -> None:
    boxes = random_boxes(count, seed)
    kept: list[int] = []
    for index in range(count):
        rivals = [k for k in kept if boxes.labels[k] == boxes.labels[index]]
        away = [float((boxes.values[k, :2] - boxes.values[index, :2]).norm()) for k in rivals]
        if all(d >= share * float(boxes.values[k, 3]) for k, d in zip(rivals, away, strict=True)):
            kept.append(index)
    found = circle_nms(boxes, share)
    assert torch.equal(found.values, boxes.values[kept])
    assert torch.equal(found.labels, boxes.labels[kept])
    assert torch.equal(found.scores, boxes.scores[kept])


def test_many_boxes_are_compared_row_by_row_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = random_boxes(133, 7)
    whole = circle_nms(boxes, 0.2)
    assert 10 < len(whole) < 133
    monkeypatch.setattr(suppression, "WHOLE_TABLE", 132)
    by_row = circle_nms(boxes, 0.2)
    assert torch.equal(by_row.values, whole.values)
    assert torch.equal(by_row.labels, whole.labels)


def test_what_a_suppressed_box_is_near_to_stays() -> None:
    """Three in a row, 1 m apart, 3 m long: the second goes, the third is far enough from the first."""
    values = torch.zeros(3, 9)
    values[:, 0], values[:, 3] = torch.tensor([0.0, 1.0, 2.0]), 3.0
    found = circle_nms(Boxes3D(values, torch.zeros(3).long(), torch.tensor([0.9, 0.8, 0.7])), 0.5)
    assert found.values[:, 0].tolist() == [0.0, 2.0]


@torch.no_grad()
def test_the_model_decodes_without_duplicates_where_it_is_asked_to() -> None:
    config = tiny_config()
    merging = dataclasses.replace(
        config, detection=dataclasses.replace(config.detection, nms_radius_ratio=60.0)
    )
    model, other = tiny_model(config), tiny_model(merging)
    outputs, _ = model(random_frames(2))
    plain, merged = model.decode(outputs), other.decode(outputs)
    assert any(len(m) < len(p) for m, p in zip(merged, plain, strict=True))
    for found, boxes in zip(merged, plain, strict=True):
        assert torch.equal(found.values, circle_nms(boxes, 60.0).values)


def test_a_negative_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nms_radius_ratio must be 0 to 100, got -0\.1"):
        dataclasses.replace(tiny_config().detection, nms_radius_ratio=-0.1)
