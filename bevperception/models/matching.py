"""Assignment of predictions to ground truth by the Hungarian method (DETR; DETR3D's costs)."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MATCHED_CODES = 8
"""Velocity, the last two entries of a code, does not take part in matching."""


def focal_cost(
    class_logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0, eps: float = 1e-12
) -> Tensor:
    """Classification cost of giving each prediction each ground truth's label.

    Args:
        class_logits: (Q, classes).
        labels: (G,) int64.
        alpha, gamma: of the focal loss.
        eps: added before logarithms.

    Returns:
        (Q, G).
    """
    p = class_logits.sigmoid()
    negative = -(1 - p + eps).log() * (1 - alpha) * p.pow(gamma)
    positive = -(p + eps).log() * alpha * (1 - p).pow(gamma)
    return positive[:, labels] - negative[:, labels]


def matching_cost(
    class_logits: Tensor,
    box_codes: Tensor,
    labels: Tensor,
    target_codes: Tensor,
    class_weight: float,
    box_weight: float,
    alpha: float = 0.25,
    gamma: float = 2.0,
    smooth: bool = False,
) -> Tensor:
    """Focal classification cost plus the distance of the codes without velocity.

    Args:
        class_logits: (Q, classes).
        box_codes: (Q, 10).
        labels: (G,) int64.
        target_codes: (G, 10).
        class_weight, box_weight: weights of the two.
        alpha, gamma: of the focal cost.
        smooth: smooth L1 (beta 1) in place of L1.

    Returns:
        (Q, G).
    """
    difference = (box_codes[:, None, :MATCHED_CODES] - target_codes[None, :, :MATCHED_CODES]).abs()
    if smooth:
        difference = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5)
    distance = difference.sum(-1)
    return class_weight * focal_cost(class_logits, labels, alpha, gamma) + box_weight * distance


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The assignment of least total cost.

    Args:
        cost: (Q, G); Q or G may be 0. Costs that are not finite count as very large.

    Returns:
        query indices and ground-truth indices, (min(Q, G),) int64 each, on the cost's device.
    """
    finite = torch.nan_to_num(cost.detach().double().cpu(), nan=1e8, posinf=1e8, neginf=-1e8)
    rows, columns = linear_sum_assignment(finite.numpy())
    return (
        torch.as_tensor(rows, dtype=torch.long, device=cost.device),
        torch.as_tensor(columns, dtype=torch.long, device=cost.device),
    )
