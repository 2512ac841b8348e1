"""Common part of the three deformable attention modules: projections, offsets, weights, initial values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bevperception.ops.linear import Linear, linear

SpatialShapes = Sequence[tuple[int, int]]
"""(height, width) of every feature level."""


def init_sampling_offsets(
    offsets: nn.Linear,
    heads: int,
    groups: int,
    points: int,
    reach_cells: float | None = None,
    anchors: int = 1,
) -> None:
    """Let each head look in its own direction, further out with every point (Deformable DETR, A.4).

    Args:
        offsets: linear layer whose outputs are ordered head, group, point, (x, y).
        heads: attention heads.
        groups: feature levels (times queue entries) between head and point.
        points: sampling points per head and group.
        reach_cells: how far the outermost points look, the innermost look at their place itself and the rest
            stand evenly between; None for the published start, where point p looks p + 1 cells out.
        anchors: places from which the points start in turn; those of one turn look equally far.
    """
    angles = torch.arange(heads, dtype=torch.float32) * (2.0 * math.pi / heads)
    directions = torch.stack((angles.cos(), angles.sin()), -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    if reach_cells is None:
        reach = torch.arange(1, points + 1, dtype=torch.float32)
    else:
        turn = torch.arange(points, dtype=torch.float32).div(anchors, rounding_mode="floor")
        reach = turn * (reach_cells / turn.amax().clamp_min(1.0))
    bias = directions[:, None, None, :] * reach[None, None, :, None]
    nn.init.zeros_(offsets.weight)
    with torch.no_grad():
        # (heads, 1, points, 2) -> (heads*groups*points*2,)
        offsets.bias.copy_(bias.expand(heads, groups, points, 2).reshape(-1))


class DeformableAttention(nn.Module):
    """Projections of a deformable attention module (Deformable DETR, section 4.1).

    Args:
        channels: width of queries and values.
        heads: attention heads, dividing ``channels``.
        groups: what a head samples from: (levels,), or (queue entries, levels).
        points: sampling points per head and group.
        dropout: on the output before the residual sum.
        offset_input_channels: width of what offsets and weights are predicted from; None for ``channels``.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        groups: tuple[int, ...],
        points: int,
        dropout: float = 0.0,
        offset_input_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.points = heads, groups, points
        looking = channels if offset_input_channels is None else offset_input_channels
        samples = heads * math.prod(groups) * points
        self.sampling_offsets = Linear(looking, samples * 2)
        self.attention_weights = Linear(looking, samples)
        self.value_proj = Linear(channels, channels)
        self.output_proj = Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)
        init_sampling_offsets(self.sampling_offsets, heads, math.prod(groups), points)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def init_offsets(self, reach_cells: float | None, anchors: int = 1) -> None:
        """Choose where the untrained module looks; see :func:`init_sampling_offsets`."""
        groups = math.prod(self.groups)
        init_sampling_offsets(self.sampling_offsets, self.heads, groups, self.points, reach_cells, anchors)

    def predict(self, looking: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the sampling offsets and attention logits of every query.

        They are laid out as :func:`bevperception.ops.deform_attn` takes them.

        Args:
            looking: (B, Q, offset_input_channels).

        Returns:
            offsets (B * Q, heads * groups * points * 2) in cells, and logits (B * Q, heads * groups *
            points), both ordered head, group, point.
        """
        # One product with both layers' weights: two narrow ones would read their input twice.
        layers = (self.sampling_offsets, self.attention_weights)
        predicted = linear(
            looking.flatten(0, 1),  # (B, Q, c) -> (B*Q, c)
            torch.cat([layer.weight for layer in layers]),
            torch.cat([layer.bias for layer in layers]),
        )
        samples = self.attention_weights.out_features
        offsets, logits = predicted.split((2 * samples, samples), dim=-1)
        return offsets, logits

    def project_value(self, value: Tensor) -> Tensor:
        """(..., channels) to (..., heads, channels / heads)."""
        # (..., C) -> (..., heads, C/heads)
        by_head: Tensor = self.value_proj(value).unflatten(-1, (self.heads, -1))
        return by_head

    def add_to(self, query: Tensor, sampled: Tensor) -> Tensor:
        """The residual sum: the query plus the projected samples, both (..., channels)."""
        update: Tensor = self.dropout(self.output_proj(sampled))
        return query + update
