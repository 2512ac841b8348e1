"""Compare lists of boxes of one frame."""

from __future__ import annotations

import torch
from torch import Tensor

from bevperception.structures import Boxes3D


def largest_box_difference(one: Boxes3D, other: Boxes3D) -> float:
    """How far two lists of boxes of one frame are apart, box for box.

    Args:
        one, other: scored, in one frame.

    Returns:
        the largest difference of any number (metres, radians, metres a second, score); infinity where
        their numbers or classes differ. Boxes of equal scores may stand in another order.
    """
    if len(one) != len(other) or sorted(one.labels.tolist()) != sorted(other.labels.tolist()):
        return float("inf")
    if not len(one):
        return 0.0
    rows = [_comparable(boxes) for boxes in (one, other)]
    apart = torch.cdist(rows[0], rows[1], p=float("inf"))
    return float(torch.maximum(apart.amin(0).amax(), apart.amin(1).amax()))


def _comparable(boxes: Boxes3D) -> Tensor:
    assert boxes.scores is not None
    values = boxes.values.double().nan_to_num(0.0)
    turns = torch.stack((values[:, 6].cos(), values[:, 6].sin()), -1)
    columns = (
        values[:, :6],
        turns,
        values[:, 7:],
        boxes.scores.double()[:, None],
        100.0 * boxes.labels[:, None],
    )
    return torch.cat(columns, dim=-1)
