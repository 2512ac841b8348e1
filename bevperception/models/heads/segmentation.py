"""Segmentation head: map layers on a grid of its own, and their loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bevperception.config_model import BEVConfig, SegmentationConfig
from bevperception.models.heads.focal_loss import ReduceMean, sigmoid_focal_loss
from bevperception.models.map_layers import ResidualBlock, build_norm
from bevperception.structures import Targets

PRIOR_PROBABILITY = 0.05
"""Initial score of every class in every cell."""


class SegmentationHead(nn.Module):
    """Predicts map layers: residual blocks on the BEV grid, resampling to the head's grid, a classifier.

    Cells of the head's grid outside the BEV grid get features of zero.

    Args:
        settings: of the head.
        bev: grid and width of the BEV features.
    """

    row_weights: Tensor
    column_weights: Tensor

    def __init__(self, *, settings: SegmentationConfig, bev: BEVConfig) -> None:
        super().__init__()
        channels = settings.channels
        self.stem = nn.Sequential(
            nn.Conv2d(bev.channels, channels, 3, padding=1, bias=False),
            build_norm("group", channels),
            nn.ReLU(),
        )
        self.blocks = nn.Sequential(*(ResidualBlock(channels, channels) for _ in range(settings.blocks)))
        self.refine = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), build_norm("group", channels), nn.ReLU()
        )
        self.classifier = nn.Conv2d(channels, len(settings.classes), 1)
        # Most cells of most classes are empty.
        assert self.classifier.bias is not None
        nn.init.constant_(self.classifier.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        cells = bev.grid.to_cells(settings.grid.cell_centres())
        rows, columns = cells[:, 0, 1], cells[0, :, 0]
        self.register_buffer("row_weights", bilinear_weights(rows, bev.rows), persistent=False)
        self.register_buffer("column_weights", bilinear_weights(columns, bev.columns), persistent=False)
        self.loss = SegmentationLoss(settings.focal_weight, settings.dice_weight)

    def forward(self, bev: Tensor) -> Tensor:
        """Logits of the maps.

        Args:
            bev: (B, C, rows, columns) BEV features.

        Returns:
            (B, classes, rows, columns) on the head's grid.
        """
        features = self.blocks(self.stem(bev))
        # Both grids have the same axes, so that bilinear sampling is a product with a matrix an axis: several
        # times as fast as grid_sample, forward and backward.
        rows, columns = self.row_weights.to(features.dtype), self.column_weights.to(features.dtype)
        # (R, rows) @ (B, C, rows, columns) @ (columns, Co) -> (B, C, R, Co)
        resampled = rows @ (features @ columns.mT)
        logits: Tensor = self.classifier(self.refine(resampled))
        return logits

    def losses(self, logits: Tensor, targets: Targets, reduce_mean: ReduceMean) -> dict[str, Tensor]:
        """Weighted losses ``focal`` and ``dice``, see :class:`SegmentationLoss`.

        Args:
            logits: (B, classes, rows, columns) of :meth:`forward`.
            targets: ground truth of the same frame.
            reduce_mean: over processes.

        Raises:
            ValueError: the targets hold no segmentation.
        """
        if targets.segmentation is None or targets.segmentation_present is None:
            raise ValueError("the model has a segmentation head but the targets hold no segmentation")
        return self.loss(logits, targets.segmentation, targets.segmentation_present, reduce_mean)


def bilinear_weights(positions: Tensor, size: int) -> Tensor:
    """Weights of the cells of a row in linear sampling.

    Args:
        positions: (n,) in cells, a cell's centre at its whole number.
        size: cells of the row; beyond them everything is zero.

    Returns:
        (n, size) weights, at most two of a row other than zero.
    """
    cells = torch.arange(size, dtype=positions.dtype, device=positions.device)
    return (1 - (positions[:, None] - cells).abs()).clamp_min(0.0)


@dataclass(frozen=True)
class SegmentationLoss:
    """Focal plus dice loss, over the (sample, class) pairs that have labels.

    Attributes:
        focal_weight, dice_weight: of the two.
        alpha, gamma: of the focal loss.
    """

    focal_weight: float
    dice_weight: float
    alpha: float = -1.0
    gamma: float = 2.0

    def __call__(
        self, logits: Tensor, targets: Tensor, present: Tensor, reduce_mean: ReduceMean
    ) -> dict[str, Tensor]:
        """Weighted losses ``focal`` and ``dice``; zero (with a zero gradient) where nothing has labels.

        Args:
            logits: (B, classes, rows, columns).
            targets: the same shape, 0 or 1.
            present: (B, classes) bool.
            reduce_mean: over processes.
        """
        # where, not a product: a class without labels may hold anything, NaN included.
        targets = torch.where(present[..., None, None], targets, 0).to(logits.dtype)
        pairs = present.to(logits.dtype)
        count = reduce_mean(pairs.sum()).clamp_min(1.0)
        focal = sigmoid_focal_loss(logits, targets, self.alpha, self.gamma).mean((-2, -1))
        p = logits.sigmoid()
        overlap = (p * targets).sum((-2, -1))
        dice = 1 - (2 * overlap + 1) / (p.sum((-2, -1)) + targets.sum((-2, -1)) + 1)
        zero = torch.zeros_like(focal)
        return {
            "focal": self.focal_weight * torch.where(present, focal, zero).sum() / count,
            "dice": self.dice_weight * torch.where(present, dice, zero).sum() / count,
        }
