"""Of several boxes on one object the best."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from bevperception.structures import Boxes3D


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
    near = torch.cdist(centres, centres) < share * lengths[:, None]
    near &= boxes.labels[:, None] == boxes.labels
    doubles = near.cpu().numpy()
    kept = greedy(len(boxes), lambda index, others: doubles[index, others], len(boxes))
    return boxes[torch.tensor(kept, dtype=torch.int64, device=boxes.labels.device)]
