"""Suppression of duplicate boxes (non-maximum suppression)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from bevperception.structures import Boxes3D

WHOLE_TABLE = 4096
"""Largest number of boxes whose pairwise distances are computed at once. For more, they are computed row by
row: slower, but without a table of gigabytes."""


def greedy(
    count: int, duplicates_of: Callable[[int, NDArray[np.intp]], NDArray[np.bool_]], limit: int
) -> list[int]:
    """Greedy suppression: the best stays, its duplicates go, then the best of the rest, and so on.

    Args:
        count: candidates, numbered from the best on.
        duplicates_of: which of the others are duplicates of a candidate that stays.
        limit: at most so many stay.

    Returns:
        Indices that stay, ascending.
    """
    left = np.arange(count)
    kept: list[int] = []
    while len(left) and len(kept) < limit:
        kept.append(int(left[0]))
        rest = left[1:]
        left = rest[~duplicates_of(kept[-1], rest)]
    return kept


def circle_nms(boxes: Boxes3D, share: float) -> Boxes3D:
    """Suppress duplicate boxes by distance on the ground (circle NMS; Yin et al., CVPR 2021), class by class.

    The circle grows with the box: one radius for all either merges pedestrians or leaves duplicate trucks.

    Args:
        boxes: n boxes, best first.
        share: a box goes if a better one of its class that stays has its centre nearer than this share of
            the better one's length.

    Returns:
        The boxes that stay, in their order.
    """
    centres, lengths = boxes.values[:, :2].detach().double(), boxes.values[:, 3].detach().double()
    if len(boxes) <= WHOLE_TABLE:
        near = torch.cdist(centres, centres) < share * lengths[:, None]
        near &= boxes.labels[:, None] == boxes.labels
        duplicates = near.cpu().numpy()

        def duplicates_of(index: int, others: NDArray[np.intp]) -> NDArray[np.bool_]:
            row: NDArray[np.bool_] = duplicates[index, others]
            return row
    else:
        points, radii, labels = (x.cpu().numpy() for x in (centres, share * lengths, boxes.labels))

        def duplicates_of(index: int, others: NDArray[np.intp]) -> NDArray[np.bool_]:
            away = np.hypot(*(points[others] - points[index]).T)
            near: NDArray[np.bool_] = (away < radii[index]) & (labels[others] == labels[index])
            return near

    kept = greedy(len(boxes), duplicates_of, len(boxes))
    return boxes[torch.tensor(kept, dtype=torch.int64, device=boxes.labels.device)]
