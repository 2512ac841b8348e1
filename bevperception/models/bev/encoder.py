"""The BEV encoder: temporal self-attention, spatial cross-attention and feed-forward, L times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import Self

from bevperception.models.bev.deformable import SpatialShapes
from bevperception.models.bev.grid import pillar_reference_points, plane_reference_points
from bevperception.models.bev.spatial_attention import (
    CameraHits,
    SpatialCrossAttention,
    find_hits,
    project_pillars,
)
from bevperception.models.bev.temporal_attention import TemporalSelfAttention
from bevperception.models.precision import LayerNorm
from bevperception.models.selection import all_true
from bevperception.ops.linear import Linear, linear


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between, and the residual sum.

    Args:
        channels: width outside.
        hidden: width inside.
        dropout: after each linear layer.
    """

    def __init__(self, channels: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = Linear(channels, hidden)
        self.linear2 = Linear(hidden, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same shape."""
        hidden: Tensor = self.dropout(linear(x, self.linear1.weight, self.linear1.bias, "relu"))
        update: Tensor = self.dropout(self.linear2(hidden))
        return x + update


@dataclass(frozen=True)
class CameraFeatures:
    """Image features of all cameras and how they were taken.

    Attributes:
        value: (B, N, sum(h * w), C), levels concatenated.
        spatial_shapes: (h, w) of the levels.
        bev_to_image: (B, N, 4, 4).
        image_size: (height, width) of the images in pixels; only what lies within is visible.
        padded_size: (height, width) that the feature maps cover in pixels: images padded at the bottom and
            the right.
        camera_mask: (B, N) bool or None.
    """

    value: Tensor
    spatial_shapes: SpatialShapes
    bev_to_image: Tensor
    image_size: tuple[int, int]
    padded_size: tuple[int, int]
    camera_mask: Tensor | None = None


class BEVEncoderLayer(nn.Module):
    """One layer of :class:`BEVEncoder`; post-norm as in the paper.

    Args:
        channels, heads: width and attention heads.
        temporal_points, spatial_points: sampling points of the two attentions.
        levels: image feature levels.
        feedforward_channels: hidden width of the feed-forward part.
        dropout: in all three parts.
        temporal_heads: heads of temporal attention; None for ``heads``.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        temporal_points: int,
        spatial_points: int,
        levels: int,
        feedforward_channels: int,
        dropout: float = 0.0,
        temporal_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.temporal_attention = TemporalSelfAttention(
            channels, temporal_heads or heads, temporal_points, dropout=dropout
        )
        self.norm1 = LayerNorm(channels)
        self.spatial_attention = SpatialCrossAttention(channels, heads, spatial_points, levels, dropout)
        self.norm2 = LayerNorm(channels)
        self.feed_forward = FeedForward(channels, feedforward_channels, dropout)
        self.norm3 = LayerNorm(channels)

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        temporal_value: Tensor,
        temporal_points: Tensor,
        grid_shape: tuple[int, int],
        cameras: CameraFeatures,
        hits: CameraHits,
    ) -> Tensor:
        """One layer.

        Args:
            query: (B, Q, C) running BEV queries.
            position: (B or 1, Q, C) positional encoding.
            temporal_value: (B, 2 or 1, Q, C), see :class:`TemporalSelfAttention`.
            temporal_points: (B, 2, Q, 1, 2).
            grid_shape: (rows, columns) of the BEV grid.
            cameras: image features.
            hits: which queries each camera sees.

        Returns:
            (B, Q, C).
        """
        x = self.temporal_attention(query, position, temporal_value, temporal_points, [grid_shape])
        x = self.spatial_attention(self.norm1(x), cameras.value, cameras.spatial_shapes, hits)
        encoded: Tensor = self.norm3(self.feed_forward(self.norm2(x)))
        return encoded


@dataclass(frozen=True)
class PreviousBEV:
    """The earlier BEV, brought into the current frame.

    Attributes:
        features: (B, rows * columns, C).
        shift: (B, 2) added to the reference points of the earlier half, (x, y) as fractions of the
            BEV; zeros unless the alignment leaves the translation to it.
        valid: (B,) bool, False for samples without history.
    """

    features: Tensor
    shift: Tensor
    valid: Tensor


class BEVEncoder(nn.Module):
    """From BEV queries and image features to BEV features (BEVFormer, section 3.2).

    As in the published code, where there is an earlier BEV every layer's temporal attention looks at
    (earlier BEV, queries as given to the encoder); where there is none, at the running query twice.

    Args:
        layers: the encoder's layers.
        rows, columns: size of the BEV grid.
        bev_range_m: (x_min, y_min, z_min, x_max, y_max, z_max) metres, BEV frame.
        pillar_points: points D a pillar.
    """

    pillar_points_m: Tensor
    plane_points: Tensor

    def __init__(
        self,
        layers: list[BEVEncoderLayer],
        rows: int,
        columns: int,
        bev_range_m: tuple[float, float, float, float, float, float],
        pillar_points: int,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.rows, self.columns = rows, columns
        low = torch.tensor(bev_range_m[:3], dtype=torch.float64)
        high = torch.tensor(bev_range_m[3:], dtype=torch.float64)
        height_m = bev_range_m[5] - bev_range_m[2]
        pillars = pillar_reference_points(rows, columns, height_m, pillar_points)
        # float64, and no part of the weights: where points fall must not depend on training's precision.
        self.register_buffer("pillar_points_m", pillars * (high - low) + low, persistent=False)
        self.register_buffer("plane_points", plane_reference_points(rows, columns), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the geometry in float64 when the module is cast to another dtype."""
        pillars, plane = self.pillar_points_m, self.plane_points
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.pillar_points_m = pillars.to(self.pillar_points_m.device)
        self.plane_points = plane.to(self.plane_points.device)
        return self

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        cameras: CameraFeatures,
        previous: PreviousBEV | None = None,
    ) -> Tensor:
        """Encode one frame.

        Args:
            queries: (B, rows * columns, C) BEV queries.
            position: (B or 1, rows * columns, C) positional encoding.
            cameras: image features and projection.
            previous: earlier BEV or None.

        Returns:
            (B, rows * columns, C) BEV features.
        """
        points, visible = project_pillars(
            self.pillar_points_m, cameras.bev_to_image, cameras.image_size, cameras.padded_size
        )
        hits = find_hits(points, visible, cameras.camera_mask, queries.dtype)
        plane = self.plane_points.to(queries.dtype)
        shift = queries.new_zeros(queries.shape[0], 2)
        if previous is not None:
            shift = torch.where(previous.valid[:, None], previous.shift.to(queries.dtype), shift)
        halves = torch.stack((plane + shift[:, None], plane.expand(queries.shape[0], -1, -1)), dim=1)
        x = queries
        pair = None
        if previous is not None:
            pair = torch.stack((previous.features.to(queries.dtype), queries), dim=1)
        for layer in self.layers:
            value = _temporal_value(x, pair, None if previous is None else previous.valid)
            x = layer(x, position, value, halves[:, :, :, None], (self.rows, self.columns), cameras, hits)
        return x


def _temporal_value(running: Tensor, pair: Tensor | None, valid: Tensor | None) -> Tensor:
    """Value of temporal self-attention: (B, 2, Q, C), or (B, 1, Q, C) for twice the same."""
    if pair is None or valid is None:
        return running[:, None]
    if all_true(valid):
        return pair
    return torch.where(valid[:, None, None, None], pair, running[:, None])
