"""Box conventions against the devkit's Box and a round trip."""

from __future__ import annotations

import math

import numpy as np
import torch
from nuscenes.utils.data_classes import Box
from pyquaternion import Quaternion

from bevperception.evaluation.submission import devkit_size
from bevperception.geometry import quaternion_of_yaw
from tests.golden.adapters.published_boxes import (
    boxes_from_published,
    boxes_to_published,
    devkit_corners,
    published_bottom_boxes,
)


def random_boxes(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    boxes = torch.randn((count, 9), generator=generator, dtype=torch.float64) * 4
    boxes[:, 3:6] = boxes[:, 3:6].abs() + 0.2
    return boxes


def test_devkit_box() -> None:
    boxes = random_boxes(7)
    sizes, turns, corners = devkit_size(boxes), quaternion_of_yaw(boxes[:, 6]), devkit_corners(boxes)
    for i, row in enumerate(boxes):
        turn = Quaternion(axis=[0, 0, 1], radians=float(row[6]))
        np.testing.assert_allclose(turns[i], turn.elements, atol=1e-12)
        box = Box(row[:3].tolist(), sizes[i].tolist(), turn)
        np.testing.assert_allclose(corners[i], box.corners().T, atol=1e-9)


def test_published_rows_round_trip() -> None:
    boxes = random_boxes(5)
    torch.testing.assert_close(boxes_from_published(boxes_to_published(boxes)), boxes)
    published = boxes_to_published(boxes)
    torch.testing.assert_close(published[:, 3:6], boxes[:, [4, 3, 5]])
    torch.testing.assert_close(published[:, 6], -boxes[:, 6] - math.pi / 2)
    torch.testing.assert_close(published_bottom_boxes(boxes)[:, 2], boxes[:, 2] - boxes[:, 5] / 2)


def test_no_boxes() -> None:
    none = torch.zeros((0, 9))
    assert boxes_to_published(none).shape == (0, 9)
    assert devkit_corners(none).shape == (0, 8, 3)
    assert quaternion_of_yaw(none[:, 6]).shape == (0, 4)
