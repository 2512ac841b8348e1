"""Segmentation head: BEV features to per-class maps on a grid of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bevperception.geometry import BEVGrid

PRIOR_PROBABILITY = 0.05
"""What every cell scores for every class before training."""


def _norm(channels: int) -> nn.GroupNorm:
    # Per sample, so that a batch of n equals n singles in training too.
    return nn.GroupNorm(next(g for g in (8, 4, 2, 1) if channels % g == 0), channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group normalisation around a residual sum.

    Args:
        channels: width.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to the same shape."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(y)))


class SegmentationHead(nn.Module):
    """Residual blocks on the BEV grid, bilinear resampling to the head's grid, then a classifier there.

    Cells of the head's grid outside the BEV grid see zeros.

    Args:
        in_channels: width of the BEV features.
        channels: width inside.
        blocks: residual blocks.
        classes: layers to predict.
        bev_grid: grid of the features.
        grid: grid of the maps.
    """

    row_weights: Tensor
    column_weights: Tensor

    def __init__(
        self, in_channels: int, channels: int, blocks: int, classes: int, bev_grid: BEVGrid, grid: BEVGrid
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), _norm(channels), nn.ReLU()
        )
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        self.refine = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), _norm(channels), nn.ReLU()
        )
        self.classifier = nn.Conv2d(channels, classes, 1)
        # Most cells of most classes are empty.
        assert self.classifier.bias is not None
        nn.init.constant_(self.classifier.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        cells = bev_grid.to_cells(grid.cell_centres())
        rows, columns = cells[:, 0, 1], cells[0, :, 0]
        self.register_buffer("row_weights", bilinear_weights(rows, bev_grid.rows), persistent=False)
        self.register_buffer("column_weights", bilinear_weights(columns, bev_grid.columns), persistent=False)

    def forward(self, bev: Tensor) -> Tensor:
        """Logits of the maps.

        Args:
            bev: (B, in_channels, rows, columns) BEV features.

        Returns:
            (B, classes, rows, columns) on the head's grid.
        """
        features = self.blocks(self.stem(bev))
        # Both grids have the same axes, so that bilinear sampling is a product with a matrix an axis: several
        # times as fast as grid_sample, forward and backward.
        rows, columns = self.row_weights.to(features.dtype), self.column_weights.to(features.dtype)
        resampled = rows @ (features @ columns.mT)
        logits: Tensor = self.classifier(self.refine(resampled))
        return logits


def bilinear_weights(positions: Tensor, size: int) -> Tensor:
    """What sampling a row of cells linearly takes of each cell.

    Args:
        positions: (n,) in cells, a cell's centre at its whole number.
        size: cells of the row; beyond them everything is zero.

    Returns:
        (n, size) weights, at most two of a row other than zero.
    """
    cells = torch.arange(size, dtype=positions.dtype, device=positions.device)
    return (1 - (positions[:, None] - cells).abs()).clamp_min(0.0)
