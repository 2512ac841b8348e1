"""Rows of several samples, padded to the sample that has most, without an operation a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Lay out the rows of B samples side by side.

    Args:
        rows: (sum of counts, ...) the samples' rows, one sample after the other.
        counts: of each of the B samples.

    Returns:
        (B, largest count, ...) with zeros where a sample has no more rows.

    Raises:
        ValueError: the counts are not those of the rows.
    """
    if sum(counts) != len(rows):
        raise ValueError(f"pad_rows: counts add up to {sum(counts)}, but there are {len(rows)} rows")
    longest = max(counts, default=0)
    if not len(rows):
        return rows.new_zeros(len(counts), longest, *rows.shape[1:])
    count = torch.tensor(list(counts), device=rows.device)[:, None]
    place = torch.arange(longest, device=rows.device)
    filled = place < count
    index = (count.cumsum(0) - count + place).clamp_max(len(rows) - 1)
    # (B, longest) -> (B, longest, 1, ...)
    return torch.where(filled.view(*filled.shape, *(1,) * (rows.dim() - 1)), rows[index], 0)
