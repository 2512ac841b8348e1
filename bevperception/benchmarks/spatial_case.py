"""Spatial cross-attention as a case to measure, and the published scheme that it is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bevperception.models.bev.spatial_attention import CameraHits, find_hits
from bevperception.ops import deform_attn

Shapes = Sequence[tuple[int, int]]
Attention = Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]
"""A multi-scale deformable attention: value, spatial shapes, locations, weights."""

HEADS, CHANNELS, ANCHORS = 8, 32, 4
RANGE_M = 51.2
FOCAL_X, FOCAL_Y = 0.79, 1.41  # of a nuScenes camera, in image widths and heights
CAMERA_YAWS_DEG = (0.0, -55.0, 55.0, 180.0, 110.0, -110.0)


@dataclass(frozen=True)
class SpatialCase:
    """A spatial cross-attention of 8 heads of 32 channels: six cameras around a square BEV grid.

    Args:
        key: short name.
        title: where the call comes from.
        batch: samples; cameras are turned a little in each, so that no two see the same cells.
        side: cells along a side of the grid.
        shapes: (height, width) of each level.
        points: sampling points per head and level, a multiple of the four pillar points.
    """

    key: str
    title: str
    batch: int
    side: int
    shapes: tuple[tuple[int, int], ...]
    points: int
    operator: str = "spatial_cross_attn"

    @property
    def anchors(self) -> list[int]:
        """The pillar point that each level's points start from."""
        return [p % ANCHORS for _ in self.shapes for p in range(self.points)]

    def inputs(self, kind: Literal["local", "uniform"], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Value (B * 6, cells, 8, 32), offsets (B * Q, 8 * L * P * 2) in cells, logits (B * Q, 8 * L * P).

        Args:
            kind: "local" offsets of a few cells; "uniform" of up to the finest map's size.
            dtype: of all three.
        """
        generator = torch.Generator().manual_seed(0)
        cells, samples = sum(h * w for h, w in self.shapes), len(self.shapes) * self.points
        rows = self.batch * self.side**2
        value = torch.randn(
            self.batch * len(CAMERA_YAWS_DEG), cells, HEADS, CHANNELS, generator=generator, dtype=dtype
        )
        reach = 2.0 if kind == "local" else float(max(self.shapes[0]))
        offsets = torch.randn(rows, HEADS * samples * 2, generator=generator, dtype=dtype) * reach
        return value, offsets, torch.randn(rows, HEADS * samples, generator=generator, dtype=dtype)

    def seen(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Reference points (B, 6, Q, 4, 2) in fractions of the images, and which are visible (B, 6, Q, 4)."""
        along = (torch.arange(self.side, dtype=torch.float64) + 0.5) / self.side * 2 * RANGE_M - RANGE_M
        y_m, x_m = torch.meshgrid(along, along, indexing="ij")
        yaws = torch.tensor(CAMERA_YAWS_DEG, dtype=torch.float64).deg2rad()
        yaws = yaws + torch.arange(self.batch)[:, None] * math.radians(7.0)
        cosine, sine = yaws.cos()[..., None], yaws.sin()[..., None]
        ahead_m = cosine * x_m.flatten() + sine * y_m.flatten()  # (B, 6, Q)
        right_m = sine * x_m.flatten() - cosine * y_m.flatten()
        below_m = torch.tensor([2.5, 0.5, -1.5, -3.5], dtype=torch.float64)
        safe_m = ahead_m.clamp_min(1e-3)[..., None]
        u = (0.5 + FOCAL_X * right_m[..., None] / safe_m).expand(*ahead_m.shape, ANCHORS)
        v = 0.5 + FOCAL_Y * below_m / safe_m
        visible = (ahead_m > 1.0)[..., None] & (u > 0) & (u < 1) & (v > 0) & (v < 1)
        return torch.stack((u, v), -1).to(dtype), visible


def native_call(
    case: SpatialCase, dtype: torch.dtype, device: torch.device | None = None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """This project's way: compressed rows, one operator; the rows are made once, as for a fixed rig."""
    references, visible = (x.to(device) for x in case.seen(dtype))
    hits: CameraHits = find_hits(references, visible, None, dtype)

    def call(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        references, anchors = hits.reference_points, case.anchors
        return deform_attn(value, case.shapes, offsets, logits, references, anchors, rows=hits.rows)

    return call


def published_call(
    case: SpatialCase, dtype: torch.dtype, attention: Attention
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """BEVFormer's published way around any multi-scale deformable attention.

    Every camera's queries are copied into a batch that is padded to the camera that sees most, sample by
    sample and camera by camera, and added back the same way. Unlike there each sample has cells of its own;
    and offsets and weights are copied instead of computed again from copied queries, which costs less.

    Args:
        case: sizes.
        dtype: of the reference points.
        attention: what samples.
    """
    references, visible = case.seen(dtype)
    seen_by = [[hit.nonzero().squeeze(-1) for hit in sample] for sample in visible.any(-1)]
    longest = max(len(cells) for sample in seen_by for cells in sample)
    counts = visible.any(-1).sum(1).clamp_min(1).to(dtype)[..., None]  # (B, Q, 1)
    batch, cameras, levels = case.batch, len(CAMERA_YAWS_DEG), len(case.shapes)
    by_point = (HEADS, levels, case.points)

    def call(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        by_sample = offsets.unflatten(0, (batch, -1)), logits.unflatten(0, (batch, -1))
        padded = [x.new_zeros(batch, cameras, longest, x.shape[-1]) for x in by_sample]
        starts = references.new_zeros(batch, cameras, longest, ANCHORS, 2)
        for b, of_sample in enumerate(seen_by):
            for camera, cells in enumerate(of_sample):
                for target, source in zip(padded, by_sample, strict=True):
                    target[b, camera, : len(cells)] = source[b, cells]
                starts[b, camera, : len(cells)] = references[b, camera, cells]
        steps, weights = (x.flatten(0, 1) for x in padded)
        sizes = offsets.new_tensor([(width, height) for height, width in case.shapes])
        anchors = starts.flatten(0, 1)[:, :, case.anchors].unflatten(2, (levels, case.points))[:, :, None]
        locations = anchors + steps.unflatten(-1, (*by_point, 2)) / sizes[:, None]
        attended = weights.unflatten(-1, (HEADS, -1)).softmax(-1).unflatten(-1, (levels, case.points))
        found = attention(value, case.shapes, locations, attended).unflatten(0, (batch, cameras))
        slots = value.new_zeros(batch, case.side**2, HEADS * CHANNELS)
        for b, of_sample in enumerate(seen_by):
            for camera, cells in enumerate(of_sample):
                slots[b, cells] = slots[b, cells] + found[b, camera, : len(cells)]
        return (slots / counts).flatten(0, 1)

    return call
