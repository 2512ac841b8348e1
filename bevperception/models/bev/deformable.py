"""What the deformable attention modules share: how sampling offsets start out, and how they are scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

SpatialShapes = Sequence[tuple[int, int]]
"""(height, width) of every feature level."""


def init_sampling_offsets(offsets: nn.Linear, heads: int, groups: int, points: int) -> None:
    """Let each head look in its own direction, further out with every point (Deformable DETR, A.4).

    Args:
        offsets: linear layer whose outputs are ordered head, group, point, (x, y).
        heads: attention heads.
        groups: feature levels (times queue entries) between head and point.
        points: sampling points per head and group.
    """
    angles = torch.arange(heads, dtype=torch.float32) * (2.0 * math.pi / heads)
    directions = torch.stack((angles.cos(), angles.sin()), -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    reach = torch.arange(1, points + 1, dtype=torch.float32)
    bias = directions[:, None, None, :] * reach[None, None, :, None]
    nn.init.zeros_(offsets.weight)
    with torch.no_grad():
        offsets.bias.copy_(bias.expand(heads, groups, points, 2).reshape(-1))


def offset_scale(spatial_shapes: SpatialShapes, like: Tensor) -> Tensor:
    """(levels, 1, 2): (width, height) of every level, by which offsets in cells are divided."""
    return like.new_tensor([(width, height) for height, width in spatial_shapes])[:, None, :]


def init_attention(weights: nn.Linear, *projections: nn.Linear) -> None:
    """Start with equal attention weights and Xavier projections."""
    nn.init.zeros_(weights.weight)
    nn.init.zeros_(weights.bias)
    for projection in projections:
        nn.init.xavier_uniform_(projection.weight)
        nn.init.zeros_(projection.bias)
