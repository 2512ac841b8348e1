"""Of several boxes on one object the best."""

from __future__ import annotations

import torch
from torch import Tensor

from bevperception.structures import Boxes3D


def without_doubles(boxes: Boxes3D, share: float) -> Boxes3D:
    """Greedy suppression by distance on the ground (circle NMS; Yin et al., CVPR 2021), class by class.

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
    return boxes[_survivors(near.cpu()).to(boxes.labels.device)]


def _survivors(near: Tensor) -> Tensor:
    """Indices that stay where the first of two that are near does: (n, n) bool, row the better one."""
    doubles = near.numpy()
    stays = torch.ones(len(doubles), dtype=torch.bool)
    alive = stays.numpy()
    for index in range(len(doubles)):
        if alive[index]:
            alive[index + 1 :] &= ~doubles[index, index + 1 :]
    return stays.nonzero().squeeze(-1)
