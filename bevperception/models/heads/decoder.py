"""The deformable decoder: object queries attend to each other and to the BEV, refining boxes by layers.

Deformable DETR (Zhu et al., ICLR 2021) with iterative box refinement, as in BEVFormer, section 3.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bevperception.models.bev.deformable import DeformableAttention, SpatialShapes
from bevperception.models.bev.encoder import FeedForward
from bevperception.models.heads.box_code import CODE_CENTRE
from bevperception.models.heads.self_attention import grouped_self_attention
from bevperception.models.precision import LayerNorm
from bevperception.ops import deform_attn


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of x in [0, 1], both x and 1 - x held at ``eps`` from below (Deformable DETR)."""
    x = x.clamp(0.0, 1.0)
    return torch.log(x.clamp_min(eps) / (1 - x).clamp_min(eps))


class DeformableCrossAttention(DeformableAttention):
    """Object queries sample BEV features around their reference points.

    Args:
        channels, heads, points, levels: width, heads, sampling points per head and level, levels.
        dropout: on the output before the residual sum.
    """

    def __init__(self, channels: int, heads: int, points: int, levels: int = 1, dropout: float = 0.0) -> None:
        super().__init__(channels, heads, (levels,), points, dropout)

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
            query, query_position: (B, Q, C).
            value: (B, sum(h * w), C).
            reference_points: (B, Q, levels, 2) normalised (x, y).
            spatial_shapes: (h, w) of the levels.

        Returns:
            (B, Q, C).
        """
        offsets, logits = self.predict(query + query_position)
        sampled = deform_attn(
            self.project_value(value),
            spatial_shapes,
            offsets,
            logits,
            reference_points.flatten(0, 1),  # (B, Q, levels, 2) -> (B*Q, levels, 2)
            [level for level in range(len(spatial_shapes)) for _ in range(self.points)],
        )
        return self.add_to(query, sampled.view_as(query))


class DecoderLayer(nn.Module):
    """Self-attention among the object queries, cross-attention to the BEV, feed-forward; post-norm.

    Args:
        channels, heads, points: width, attention heads, sampling points per head.
        feedforward_channels: hidden width of the feed-forward part.
        dropout: in all three parts.
        levels: levels of the BEV features.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        points: int,
        feedforward_channels: int,
        dropout: float = 0.0,
        levels: int = 1,
    ) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(channels, heads, dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.norm1 = LayerNorm(channels)
        self.cross_attention = DeformableCrossAttention(channels, heads, points, levels, dropout)
        self.norm2 = LayerNorm(channels)
        self.feed_forward = FeedForward(channels, feedforward_channels, dropout)
        self.norm3 = LayerNorm(channels)

    def forward(
        self,
        query: Tensor,
        query_position: Tensor,
        value: Tensor,
        reference_points: Tensor,
        spatial_shapes: SpatialShapes,
        groups: int = 1,
        padding: Tensor | None = None,
    ) -> Tensor:
        """One layer; arguments as in :class:`DeformableCrossAttention` and :func:`grouped_self_attention`."""
        attended = grouped_self_attention(self.self_attention, query, query_position, groups, padding)
        query = self.norm1(query + self.dropout(attended))
        query = self.norm2(
            self.cross_attention(query, query_position, value, reference_points, spatial_shapes)
        )
        refined: Tensor = self.norm3(self.feed_forward(query))
        return refined


@dataclass(frozen=True)
class DecodedQueries:
    """Outputs of all decoder layers.

    Attributes:
        states: (layers, B, Q, C) query contents after every layer.
        references: (layers, B, Q, 3) normalised (x, y, z) after every layer's refinement, detached.
        codes: (layers, B, Q, 10) box codes with centres normalised to [0, 1] relative to the
            layer's incoming reference; None without regression branches.
    """

    states: Tensor
    references: Tensor
    codes: Tensor | None


class DetectionDecoder(nn.Module):
    """Decoder layers with iterative refinement of the reference points.

    Args:
        layers: the decoder's layers.
    """

    def __init__(self, layers: list[DecoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        query: Tensor,
        query_position: Tensor,
        value: Tensor,
        reference_points: Tensor,
        spatial_shapes: SpatialShapes,
        regression_branches: Sequence[nn.Module] | None,
        groups: int = 1,
        padding: Tensor | None = None,
    ) -> DecodedQueries:
        """Decode object queries.

        Args:
            query, query_position: (B, Q, C).
            value: (B, sum(h * w), C) BEV features.
            reference_points: (B, Q, 3) normalised (x, y, z).
            spatial_shapes: (h, w) of the BEV levels.
            regression_branches: one a layer, (B, Q, C) to box codes (B, Q, 10) relative to the
                reference in inverse-sigmoid space; None leaves the references where they are.
            groups, padding: see :func:`grouped_self_attention`.
        """
        states, references, codes = [], [], []
        levels = len(spatial_shapes)
        for index, layer in enumerate(self.layers):
            planar = reference_points[:, :, None, :2].expand(-1, -1, levels, -1)
            query = layer(query, query_position, value, planar, spatial_shapes, groups, padding)
            if regression_branches is not None:
                code = refine_code(regression_branches[index](query), reference_points)
                codes.append(code)
                reference_points = code[..., list(CODE_CENTRE)].detach()
            states.append(query)
            references.append(reference_points)
        return DecodedQueries(
            torch.stack(states), torch.stack(references), torch.stack(codes) if codes else None
        )


def refine_code(relative_code: Tensor, reference_points: Tensor) -> Tensor:
    """Add the reference in inverse-sigmoid space to a code's centre entries.

    Args:
        relative_code: (B, Q, 10) a regression branch's output; half precision, whose step is tens of
            centimetres at this range, is left for float32.
        reference_points: (B, Q, 3) normalised (x, y, z).

    Returns:
        (B, Q, 10) with the centre entries normalised to [0, 1].
    """
    relative_code = relative_code.to(torch.promote_types(relative_code.dtype, torch.float32))
    reference_points = reference_points.to(relative_code.dtype)
    centre = (relative_code[..., list(CODE_CENTRE)] + inverse_sigmoid(reference_points)).sigmoid()
    x, y, z = centre.unbind(-1)
    return torch.cat(
        (
            torch.stack((x, y), -1),
            relative_code[..., 2:4],
            z[..., None],
            relative_code[..., 5:],
        ),
        dim=-1,
    )
