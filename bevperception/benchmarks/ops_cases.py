"""The shapes that the operators are measured at, and inputs as a model makes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bevperception.benchmarks.spatial_case import SpatialCase

LocationKind = Literal["local", "uniform"]


@dataclass(frozen=True)
class AttentionCase:
    """A call of ms_deform_attn with 8 heads of 32 channels.

    Args:
        key: short name.
        title: where the call comes from.
        batch: batch elements (cameras in spatial cross-attention).
        queries: queries of each; 0 for one per cell of all levels.
        shapes: (height, width) of each level.
        points: sampling points per head and level.
        reference: where the queries look: on a regular grid, at random places, or at projected pillars.
    """

    key: str
    title: str
    batch: int
    queries: int
    shapes: tuple[tuple[int, int], ...]
    points: int
    reference: Literal["grid", "random", "pillars"]
    operator: str = "ms_deform_attn"

    @property
    def cells(self) -> int:
        """Cells of all levels together."""
        return sum(h * w for h, w in self.shapes)

    def inputs(self, kind: LocationKind, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Value (B, cells, 8, 32), locations (B, Q, 8, L, P, 2), weights (B, Q, 8, L, P).

        Args:
            kind: "local" puts the points around their query's reference point, as the layers'
                initial weights do; "uniform" anywhere on the map.
            dtype: of all three.
        """
        generator = torch.Generator().manual_seed(0)
        queries, heads, levels = self.queries or self.cells, 8, len(self.shapes)
        points = (self.batch, queries, heads, levels, self.points)
        value = torch.randn(self.batch, self.cells, heads, 32, generator=generator)
        weights = torch.randn(*points[:3], levels * self.points, generator=generator).softmax(-1).view(points)
        if kind == "uniform":
            locations = torch.rand(*points, 2, generator=generator)
        else:
            angles = torch.arange(heads) * (2 * math.pi / heads)
            directions = torch.stack([angles.cos(), angles.sin()], -1)
            directions = directions / directions.abs().amax(-1, keepdim=True)
            steps = directions[:, None, None] * torch.arange(1, self.points + 1)[:, None]  # (H, 1, P, 2)
            offsets = steps + torch.randn(*points, 2, generator=generator)
            sizes = torch.tensor([[w, h] for h, w in self.shapes], dtype=torch.float32)
            locations = self._references(queries, generator) + offsets / sizes[:, None]
        return value.to(dtype), locations.to(dtype), weights.to(dtype)

    def cells_unseen(self, kind: LocationKind) -> int:
        """How many (batch element, cell, head) no sampling point takes anything from.

        Args:
            kind: of locations, see :meth:`inputs`.
        """
        _, locations, _ = self.inputs(kind, torch.float32)
        batch, head = torch.arange(self.batch)[:, None, None, None], torch.arange(8)[:, None]
        seen, start = torch.zeros(self.batch, self.cells, 8, dtype=torch.bool), 0
        for level, (height, width) in enumerate(self.shapes):
            place = locations[:, :, :, level] * torch.tensor([width, height]) - 0.5
            for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
                x, y = (place.floor() + torch.tensor(corner)).unbind(-1)  # (B, Q, H, P)
                inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
                cell = torch.where(inside, start + y * width + x, 0.0).long()
                seen[batch.expand_as(cell)[inside], cell[inside], head.expand_as(cell)[inside]] = True
            start += height * width
        return int((~seen).sum())

    def _references(self, queries: int, generator: torch.Generator) -> Tensor:
        """Reference points, broadcastable to (B, Q, H, L, P, 2)."""
        if self.reference == "random":
            return torch.rand(self.batch, queries, 1, 1, 1, 2, generator=generator)
        if self.reference == "pillars":
            pillars = _projected_pillars(queries)  # (Q, 4, 2); point p belongs to anchor p mod 4
            return pillars.repeat(1, self.points // 4, 1)[None, :, None, None]
        shapes = self.shapes if queries == self.cells else ((math.isqrt(queries),) * 2,)
        centres = [_cell_centres(*shape) for shape in shapes]
        return torch.cat(centres)[None, :, None, None, None]


def _cell_centres(height: int, width: int) -> Tensor:
    """(height * width, 2) centres as (x, y) in 0 to 1, row by row."""
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    return torch.stack([x, y], -1).flatten(0, 1)


def _projected_pillars(queries: int) -> Tensor:
    """(Q, 4, 2) image points of four heights over ground cells that a camera sees, row by row."""
    cells_per_side = 2 * math.isqrt(queries) + 2
    ahead_m, right_m = torch.meshgrid(
        torch.linspace(51.2, 2.0, cells_per_side), torch.linspace(-51.2, 51.2, cells_per_side), indexing="ij"
    )
    focal_x, focal_y = 0.79, 1.41  # of a nuScenes camera, in image widths and heights
    u = (0.5 + focal_x * right_m / ahead_m).flatten()
    below_m = torch.tensor([2.5, 0.5, -1.5, -3.5])
    v = 0.5 + focal_y * below_m / ahead_m.flatten()[:, None]
    visible = ((u > 0) & (u < 1)).nonzero().squeeze(1)
    chosen = visible[torch.linspace(0, len(visible) - 1, queries).long()]
    return torch.stack([u[chosen, None].expand(-1, 4), v[chosen]], -1)


@dataclass(frozen=True)
class ConvolutionCase:
    """A call of dcnv3: kernel 3, stride 1, groups of 16 channels.

    Args:
        key: short name.
        title: where the call comes from.
        batch: images.
        height: of the map, in cells.
        width: of the map, in cells.
        groups: groups of 16 channels.
    """

    key: str
    title: str
    batch: int
    height: int
    width: int
    groups: int
    operator: str = "dcnv3"

    def inputs(self, kind: LocationKind, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Input (N, H, W, 16*G), offset (N, H, W, G*9*2), mask (N, H, W, G*9).

        Args:
            kind: "local" moves points by about a cell; "uniform" by up to 8 cells.
            dtype: of all three.
        """
        generator = torch.Generator().manual_seed(0)
        cells = (self.batch, self.height, self.width)
        input = torch.randn(*cells, 16 * self.groups, generator=generator)
        if kind == "uniform":
            offset = torch.rand(*cells, self.groups * 18, generator=generator) * 16 - 8
        else:
            offset = torch.randn(*cells, self.groups * 18, generator=generator)
        mask = torch.randn(*cells, self.groups, 9, generator=generator).softmax(-1).flatten(3)
        return input.to(dtype), offset.to(dtype), mask.to(dtype)


@dataclass(frozen=True)
class ModulatedCase:
    """A call of deform_conv2d: kernel 3, stride 1, one group, as many channels out as in.

    Args:
        key: short name.
        title: where the call comes from.
        batch: images.
        height: of the map, in cells.
        width: of the map, in cells.
        channels: of the map.
    """

    key: str
    title: str
    batch: int
    height: int
    width: int
    channels: int
    operator: str = "deform_conv2d"

    def inputs(self, kind: LocationKind, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input (N, C, H, W) channels last, offset (N, 18, H, W), mask (N, 9, H, W), weight (C, C, 3, 3).

        Args:
            kind: "local" moves points by about a cell; "uniform" by up to 8 cells.
            dtype: of all four.
        """
        generator = torch.Generator().manual_seed(0)
        cells = (self.height, self.width)
        input = torch.randn(self.batch, self.channels, *cells, generator=generator)
        if kind == "uniform":
            offset = torch.rand(self.batch, 18, *cells, generator=generator) * 16 - 8
        else:
            offset = torch.randn(self.batch, 18, *cells, generator=generator)
        mask = torch.randn(self.batch, 9, *cells, generator=generator).sigmoid()
        weight = torch.randn(self.channels, self.channels, 3, 3, generator=generator) / self.channels
        input = input.contiguous(memory_format=torch.channels_last)
        return input.to(dtype), offset.to(dtype), mask.to(dtype), weight.to(dtype)


Case = AttentionCase | ConvolutionCase | ModulatedCase | SpatialCase

_PYRAMID = ((116, 200), (58, 100), (29, 50), (15, 25))
_DETR_PYRAMID = ((100, 134), (50, 67), (25, 34), (13, 17))

CASES: dict[str, Case] = {
    case.key: case
    for case in (
        AttentionCase("i", "temporal attention, BEVFormer-tiny", 2, 2500, ((50, 50),), 4, "grid"),
        AttentionCase("ii", "spatial cross-attention, tiny", 6, 600, ((15, 25),), 8, "pillars"),
        AttentionCase("iii", "temporal attention, BEVFormer-base", 2, 40000, ((200, 200),), 4, "grid"),
        AttentionCase("iv", "spatial cross-attention, base", 6, 9000, _PYRAMID, 8, "pillars"),
        AttentionCase("v", "decoder, base", 1, 900, ((200, 200),), 4, "random"),
        AttentionCase("vi", "Deformable-DETR encoder", 1, 0, _DETR_PYRAMID, 4, "grid"),
        SpatialCase("c1", "all six cameras, BEVFormer-tiny, batch 2", 2, 50, ((15, 25),), 8),
        SpatialCase("c2", "all six cameras, BEVFormer-base", 1, 200, _PYRAMID, 8),
        ConvolutionCase("s1", "InternImage-T stage 1", 6, 112, 200, 4),
        ConvolutionCase("s2", "InternImage-T stage 2", 6, 56, 100, 8),
        ConvolutionCase("s3", "InternImage-T stage 3", 6, 28, 50, 16),
        ConvolutionCase("s4", "InternImage-T stage 4", 6, 14, 25, 32),
        ModulatedCase("d3", "ResNet-101 stage 3, BEVFormer-base", 6, 58, 100, 256),
        ModulatedCase("d4", "ResNet-101 stage 4, BEVFormer-base", 6, 29, 50, 512),
    )
}
