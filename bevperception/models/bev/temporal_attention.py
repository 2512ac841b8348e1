"""Temporal self-attention: BEV queries look at the earlier BEV and at themselves (BEVFormer, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bevperception.models.bev.deformable import (
    SpatialShapes,
    init_attention,
    init_sampling_offsets,
    offset_scale,
)
from bevperception.ops import ms_deform_attn

QUEUE = 2  # the earlier BEV and the current one


class TemporalSelfAttention(nn.Module):
    """Deformable attention over the pair (earlier BEV, current queries), averaged over the two.

    Offsets and weights of both halves come from the earlier BEV and the query together, so a query
    can follow what moved.

    Args:
        channels: width of queries and BEV features.
        heads: attention heads, dividing ``channels``.
        points: sampling points per head and half.
        levels: feature levels of the BEV (one in BEVFormer).
        dropout: on the output before the residual sum.
    """

    def __init__(self, channels: int, heads: int, points: int, levels: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.points, self.levels = heads, points, levels
        samples = QUEUE * heads * levels * points
        self.sampling_offsets = nn.Linear(QUEUE * channels, samples * 2)
        self.attention_weights = nn.Linear(QUEUE * channels, samples)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)
        init_sampling_offsets(self.sampling_offsets, heads, QUEUE * levels, points)
        init_attention(self.attention_weights, self.value_proj, self.output_proj)

    def forward(
        self,
        query: Tensor,
        query_position: Tensor,
        value: Tensor,
        reference_points: Tensor,
        spatial_shapes: SpatialShapes,
    ) -> Tensor:
        """Attend and add to the query.

        Args:
            query: (B, Q, C) running BEV queries.
            query_position: (B, Q, C) or (Q, C) positional encoding, added for offsets and weights only.
            value: (B, 2, sum(h * w), C): earlier BEV, current BEV queries.
            reference_points: (B, 2, Q, levels, 2) normalised (x, y) for each half.
            spatial_shapes: (h, w) of the levels.

        Returns:
            (B, Q, C).
        """
        batch, queries, channels = query.shape
        both = torch.cat((value[:, 0], query + query_position), dim=-1)
        shape = (batch, queries, self.heads, QUEUE, self.levels, self.points)
        offsets = self.sampling_offsets(both).view(*shape, 2) / offset_scale(spatial_shapes, query)
        weights = self.attention_weights(both).view(*shape).flatten(-2).softmax(-1).view(*shape)
        locations = reference_points[:, :, :, None, :, None, :] + offsets.permute(0, 3, 1, 2, 4, 5, 6)
        sampled = ms_deform_attn(
            self.value_proj(value).view(batch * QUEUE, -1, self.heads, channels // self.heads),
            spatial_shapes,
            locations.flatten(0, 1),
            weights.permute(0, 3, 1, 2, 4, 5).flatten(0, 1),
        )
        mean = sampled.view(batch, QUEUE, queries, channels).mean(1)
        update: Tensor = self.dropout(self.output_proj(mean))
        return query + update
