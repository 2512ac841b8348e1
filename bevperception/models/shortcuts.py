"""Shortcuts that depend on values, which a compiled graph cannot take."""

from __future__ import annotations

import torch
from torch import Tensor


def all_true(mask: Tensor) -> bool:
    """Whether every entry is true, for a caller whose other way is right for any mask, only slower.

    Args:
        mask: bool, any shape.

    Returns:
        False while compiling: a branch on a tensor's values would break the graph.
    """
    return not torch.compiler.is_compiling() and bool(mask.all())
