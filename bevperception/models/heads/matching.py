"""Assignment of predictions to ground truth by the Hungarian method (DETR; DETR3D's costs)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MATCHED_CODES = 8
"""Velocity, the last two entries of a code, does not take part in matching."""


def focal_cost(
    class_logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0, eps: float = 1e-12
) -> Tensor:
    """Classification cost of giving each prediction each ground truth's label.

    Args:
        class_logits: (..., Q, classes).
        labels: (G,) int64, or (B, G) for logits (..., B, Q, classes).
        alpha, gamma: of the focal loss.
        eps: added before logarithms.

    Returns:
        (..., Q, G).
    """
    p = class_logits.sigmoid()
    negative = -(1 - p + eps).log() * (1 - alpha) * p.pow(gamma)
    positive = -(p + eps).log() * alpha * (1 - p).pow(gamma)
    index = labels[..., None, :].expand(*class_logits.shape[:-1], labels.shape[-1])
    return (positive - negative).gather(-1, index)  # (..., Q, classes) -> (..., Q, G)


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
        class_logits: (..., Q, classes).
        box_codes: (..., Q, 10).
        labels: (G,) int64, or (B, G) for predictions (..., B, Q, c).
        target_codes: (G, 10) or (B, G, 10).
        class_weight, box_weight: weights of the two.
        alpha, gamma: of the focal cost.
        smooth: smooth L1 (beta 1) in place of L1.

    Returns:
        (..., Q, G).
    """
    predicted, wanted = box_codes[..., :MATCHED_CODES], target_codes[..., :MATCHED_CODES]
    if smooth:
        difference = (predicted[..., None, :] - wanted[..., None, :, :]).abs()
        distance = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).sum(-1)
    else:
        distance = torch.cdist(predicted, wanted.expand(*predicted.shape[:-2], -1, -1), p=1.0)
    return class_weight * focal_cost(class_logits, labels, alpha, gamma) + box_weight * distance


def assign_all(
    cost: Tensor, counts: Sequence[int], valid: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """The assignment of least total cost of every set of predictions and sample.

    Args:
        cost: (S, B, Q, G). Costs that are not finite count as very large.
        counts: how many of the G columns of each of the B samples are ground truth.
        valid: (B, Q), False for predictions that take no part; None for none.

    Returns:
        (M, 4) set, sample, query, ground truth of the pairs.
    """
    costs = cost.detach().nan_to_num(nan=1e8, posinf=1e8, neginf=-1e8).cpu().numpy()
    pairs: list[tuple[int, int, NDArray[np.int64], NDArray[np.int64]]] = []
    for sample, count in enumerate(counts):
        taking_part = None if valid is None else valid[sample].nonzero()[0]
        for index, of_set in enumerate(costs[:, sample, :, :count]):
            queries, truths = linear_sum_assignment(of_set if taking_part is None else of_set[taking_part])
            pairs.append((index, sample, queries if taking_part is None else taking_part[queries], truths))
    if not pairs:
        return np.zeros((0, 4), dtype=np.int64)
    sets, samples, queries_of, truths_of = zip(*pairs, strict=True)
    lengths = [len(truths) for truths in truths_of]
    places = (np.repeat(sets, lengths), np.repeat(samples, lengths))
    return np.column_stack((*places, np.concatenate(queries_of), np.concatenate(truths_of))).astype(np.int64)
