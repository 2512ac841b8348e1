"""Choices that depend on values: eager code follows them, a compiled graph computes every case.

A branch on a tensor's values would break a graph, and so would a number of rows that is not known. All
places in ``models`` that ask whether PyTorch is compiling are in this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def compiling() -> bool:
    """Whether a graph is being compiled: then sizes must not depend on values."""
    return torch.compiler.is_compiling()


def all_true(mask: Tensor) -> bool:
    """Whether every entry is true; False while compiling.

    For callers whose other branch is right for any mask, only slower.

    Args:
        mask: bool, any shape.
    """
    return not compiling() and bool(mask.all())


def common_rows(index: Tensor) -> list[int] | None:
    """The one value of every row of an index, where no row holds two; None otherwise, and while compiling.

    Args:
        index: (rows, B) int64.
    """
    if compiling():
        return None
    rows = [set(row) for row in index.tolist()]
    return [row.pop() for row in rows] if all(len(row) == 1 for row in rows) else None


@dataclass(frozen=True)
class Selection:
    """Rows to work on.

    Attributes:
        index: (n,) int64 rows.
        valid: (n,) bool, which of them were selected; None where all were.
    """

    index: Tensor
    valid: Tensor | None

    def zero_rest(self, rows: Tensor) -> Tensor:
        """Zeros in the place of rows that were not selected, whatever they hold, NaN included.

        Args:
            rows: (n, ...).
        """
        if self.valid is None:
            return rows
        # (n,) -> (n, 1, ...)
        return torch.where(self.valid.view(-1, *(1,) * (rows.dim() - 1)), rows, 0.0)


def select_rows(mask: Tensor) -> Selection:
    """The rows where a mask is true; while compiling all rows, with the mask to say which count.

    Args:
        mask: (rows,) bool.
    """
    if compiling():
        return Selection(torch.arange(len(mask), device=mask.device), mask)
    return Selection(mask.nonzero().squeeze(-1), None)
