"""GridMask augmentation (Chen et al., 2020): erase the squares of a grid from training images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PROBABILITY = 0.7
"""Of the published BEVFormer models."""


def grid_mask(
    size: tuple[int, int], period_px: int, start: tuple[int, int], ratio: float = 0.5
) -> NDArray[np.float32]:
    """Make a mask that keeps the stripes of a grid and erases the squares between them.

    Args:
        size: (height, width) of the image.
        period_px: between stripes, at least 2.
        start: (row, column) of the first stripes, 0 to period_px - 1, on a canvas half as large again that
            lies around the image.
        ratio: share of the period that a stripe is wide.

    Returns:
        (height, width) of 0 and 1.

    Source: the published BEVFormer's GridMask with mode 1 and without rotation.
    """
    width_px = min(max(int(period_px * ratio + 0.5), 1), period_px - 1)
    kept = [_stripes(length, period_px, first, width_px) for length, first in zip(size, start, strict=True)]
    return (kept[0][:, None] | kept[1][None, :]).astype(np.float32)


def _stripes(length: int, period_px: int, first: int, width_px: int) -> NDArray[np.bool_]:
    canvas = int(1.5 * length)
    offset = np.arange(canvas) - first
    inside: NDArray[np.bool_] = (
        (offset >= 0) & (offset % period_px < width_px) & (offset // period_px < canvas // period_px)
    )
    begin = (canvas - length) // 2
    return inside[begin : begin + length]


def random_grid_mask(size: tuple[int, int], probability: float, rng: np.random.Generator) -> Tensor | None:
    """Draw one mask for all cameras of a frame, or None.

    Args:
        size: (height, width) of the images.
        probability: of a mask.
        rng: source of all randomness.

    Returns:
        (height, width) float32, to be multiplied with normalised images.
    """
    if rng.random() >= probability:
        return None
    period_px = int(rng.integers(2, max(3, size[0])))
    first = rng.integers(period_px, size=2)
    return torch.from_numpy(grid_mask(size, period_px, (int(first[0]), int(first[1]))))
