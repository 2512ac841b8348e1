"""Temporal self-attention: BEV queries look at the earlier BEV and at themselves (BEVFormer, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from bevperception.models.bev.deformable import DeformableAttention, SpatialShapes
from bevperception.ops import deform_attn

QUEUE = 2  # the earlier BEV and the current one


class TemporalSelfAttention(DeformableAttention):
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
        super().__init__(channels, heads, (QUEUE, levels), points, dropout, QUEUE * channels)

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
            value: (B, 2, sum(h * w), C): earlier BEV, current BEV queries; or (B, 1, sum(h * w), C) if
                both are the same, which is then projected once.
            reference_points: (B, 2, Q, levels, 2) normalised (x, y) for each half.
            spatial_shapes: (h, w) of the levels.

        Returns:
            (B, Q, C).
        """
        looking = torch.cat((value[:, 0], query + query_position), dim=-1)
        offsets, logits = self.predict(looking)
        levels = len(spatial_shapes)
        if value.shape[1] == QUEUE or levels > 1:
            # The two halves as the levels of one map.
            maps, shapes = (
                self.project_value(value).expand(-1, QUEUE, -1, -1, -1),
                list(spatial_shapes) * QUEUE,
            )
        else:
            maps, shapes = self.project_value(value), list(spatial_shapes)
        sampled = deform_attn(
            maps.flatten(1, 2),  # (B, 2, cells, heads, C/heads) -> (B, 2*cells, heads, C/heads)
            shapes,
            offsets,
            logits,
            # (B, 2, Q, levels, 2) -> (B*Q, 2*levels, 2)
            reference_points.transpose(1, 2).flatten(2, 3).flatten(0, 1),
            [anchor for anchor in range(QUEUE * levels) for _ in range(self.points)],
            groups=QUEUE,
        )
        return self.add_to(query, sampled.view_as(query))
