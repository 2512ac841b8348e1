"""Focal loss, and what all losses share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

ReduceMean = Callable[[Tensor], Tensor]
"""Mean of a scalar tensor over all processes; the identity in one process."""


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss (Lin et al., ICCV 2017) of every entry.

    Args:
        logits: (...).
        targets: (...) 0 or 1.
        alpha: weight of positives, 1 - alpha of negatives; negative for no class balance.
        gamma: focusing exponent.

    Returns:
        (...) not reduced.
    """
    p = logits.sigmoid()
    missed = (1 - p) * targets + p * (1 - targets)
    loss = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none") * missed**gamma
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss
