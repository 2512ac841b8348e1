"""Of several boxes on one object the best."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from bevperception.structures import Boxes3D

WHOLE_TABLE = 4096
"""Of more boxes, distances are computed row by row: a table of all would take gigabytes."""


def greedy(
    count: int, doubles_of: Callable[[int, NDArray[np.intp]], NDArray[np.bool_]], limit: int
) -> list[int]:
    """Greedy suppression: the best stays, its doubles go, then the best of the rest, and so on.

    Args:
        count: candidates, numbered from the best on.
        doubles_of: which of the others are doubles of a candidate that stays.
        limit: at most so many stay.

    Returns:
        Indices that stay, ascending.
    """
    left = np.arange(count)
    kept: list[int] = []
    while len(left) and len(kept) < limit:
        kept.append(int(left[0]))
        rest = left[1:]
        left = rest[~doubles_of(kept[-1], rest)]
    return kept


def drop_doubles(boxes: Boxes3D, share: float) -> Boxes3D:
    """Suppression by distance on the ground (circle NMS; Yin et al., CVPR 2021), class by class.

    The circle grows with the box: one radius for all either merges pedestrians or leaves trucks doubled.

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
        doubles = near.cpu().numpy()

        def doubles_of(index: int, others: NDArray[np.intp]) -> NDArray[np.bool_]:
            row: NDArray[np.bool_] = doubles[index, others]
            return row
    else:
        points, radii, labels = (x.cpu().numpy() for x in (centres, share * lengths, boxes.labels))

        def doubles_of(index: int, others: NDArray[np.intp]) -> NDArray[np.bool_]:
            away = np.hypot(*(points[others] - points[index]).T)
            found: NDArray[np.bool_] = (away < radii[index]) & (labels[others] == labels[index])
            return found

    kept = greedy(len(boxes), doubles_of, len(boxes))
    return boxes[torch.tensor(kept, dtype=torch.int64, device=boxes.labels.device)]
