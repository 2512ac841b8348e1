"""Segmentation head: BEV features to per-class maps on a grid of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

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

    sampling_grid: Tensor

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
        size = cells.new_tensor([bev_grid.columns, bev_grid.rows])
        self.register_buffer("sampling_grid", (2 * cells + 1) / size - 1, persistent=False)

    def forward(self, bev: Tensor) -> Tensor:
        """Logits of the maps.

        Args:
            bev: (B, in_channels, rows, columns) BEV features.

        Returns:
            (B, classes, rows, columns) on the head's grid.
        """
        features = self.blocks(self.stem(bev))
        grid = self.sampling_grid.to(features.dtype).expand(features.shape[0], -1, -1, -1)
        resampled = functional.grid_sample(
            features, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        logits: Tensor = self.classifier(self.refine(resampled))
        return logits
