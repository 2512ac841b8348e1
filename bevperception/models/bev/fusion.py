"""Several frames' BEV features become one: warped, concatenated, reduced.

The temporal encoder of BEVFormer v2 (Yang et al., CVPR 2023, section 3.4): every frame's BEV features
are made from that frame alone, so a vehicle keeps them and only warps them when a new frame comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bevperception.geometry import BEVGrid
from bevperception.models.bev.memory import warp_bev
from bevperception.models.precision import LayerNorm
from bevperception.models.shortcuts import all_true
from bevperception.structures import BEVMemory

NormName = Literal["batch", "group"]


def build_norm(name: NormName, channels: int) -> nn.Module:
    """Batch normalisation, or group normalisation, for which a batch of n equals n singles."""
    if name == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(next(g for g in (8, 4, 2, 1) if channels % g == 0), channels)


class FusionBlock(nn.Module):
    """Two 3x3 convolutions around a residual sum (ResNet's basic block at stride 1).

    Args:
        in_channels, channels: width before and after; where they differ, a 3x3 convolution and a norm
            stand in the shortcut.
        norm: 'batch' or 'group'.
    """

    def __init__(self, in_channels: int, channels: int, norm: NormName) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm1 = build_norm(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = build_norm(norm, channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), build_norm(norm, channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) to (B, channels, h, w)."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


class TemporalFusion(nn.Module):
    """Concatenation of frames along the channels, residual blocks, a linear layer.

    Args:
        channels: width of the BEV features.
        frames: how many are fused, the current one included.
        inner_channels: width of the residual blocks; None takes frames * channels, as published.
        blocks: residual blocks, at least one.
        norm: 'batch' (published) or 'group'.
        coverage: one more input channel for every frame but the current, 1 in cells that the frame's map
            covers and 0 where nothing is known.
        residual: add the result to the current frame's features, beginning with nothing; otherwise it
            replaces them, after a LayerNorm, as published.
        checkpointing: recompute activations in backward.

    Source: ResNetFusion of the published BEVFormer v2 for coverage and residual False.
    """

    def __init__(
        self,
        channels: int,
        frames: int,
        inner_channels: int | None = None,
        blocks: int = 2,
        norm: NormName = "group",
        coverage: bool = True,
        residual: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.coverage, self.residual, self.checkpointing = coverage, residual, checkpointing
        width = frames * channels + (frames - 1 if coverage else 0)
        inner = inner_channels or frames * channels
        self.blocks = nn.ModuleList(
            FusionBlock(width if i == 0 else inner, inner, norm) for i in range(blocks)
        )
        self.projection = nn.Linear(inner, channels)
        self.norm = nn.Identity() if residual else LayerNorm(channels)
        if residual:
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)

    def forward(self, maps: Sequence[Tensor], coverages: Sequence[Tensor], current: int) -> Tensor:
        """Fuse.

        Args:
            maps: the frames in order of time, (B, C, rows, columns) each, in the current BEV frame.
            coverages: (B, rows, columns) in [0, 1] of every frame but the current, in the same order; not
                looked at unless the module has coverage channels.
            current: position of the current frame in ``maps``.

        Returns:
            (B, C, rows, columns).
        """
        # Channels last, as warping leaves them: faster on a CPU.
        parts = [x.permute(0, 2, 3, 1) for x in maps]
        if self.coverage:
            parts.append(torch.stack(list(coverages), dim=-1).to(maps[current].dtype))
        x = torch.cat(parts, dim=-1).permute(0, 3, 1, 2)
        for block in self.blocks:
            recompute = self.checkpointing and torch.is_grad_enabled() and x.requires_grad
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        fused: Tensor = self.norm(self.projection(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return maps[current] + fused if self.residual else fused


def fuse_memory(
    fusion: TemporalFusion,
    grid: BEVGrid,
    current: BEVMemory,
    chosen: Sequence[BEVMemory],
    past: int,
    missing: Literal["zeros", "nearest"],
) -> Tensor:
    """Warp the chosen frames into the current one and fuse all.

    Args:
        fusion: for 1 + len(chosen) frames.
        grid: of all maps.
        current: the current frame's features and pose.
        chosen: the other frames in order of time; invalid samples may hold anything.
        past: how many of them are earlier.
        missing: what stands for a frame that is not there: 'zeros' with coverage 0, or the 'nearest'
            frame between it and the current one, without gradient, as published.

    Returns:
        (B, C, rows, columns).
    """
    warped: list[Tensor] = []
    coverages: list[Tensor] = []
    for frame in chosen:
        present = frame.valid[:, None, None]
        pose = torch.where(present, frame.bev_to_global, current.bev_to_global)
        features = frame.features.to(current.features.dtype)
        if not all_true(frame.valid):
            # where, not a product: what is forgotten may hold NaN.
            features = torch.where(present[..., None], features, 0.0)
        maps, coverage = warp_bev(features, grid, current.bev_to_global, pose)
        warped.append(maps)
        coverages.append(coverage * present)
    if missing == "nearest":
        newer = current.features.detach()
        for index in [*range(past - 1, -1, -1), *range(past, len(chosen))]:
            if index == past:
                newer = current.features.detach()
            warped[index] = torch.where(chosen[index].valid[:, None, None, None], warped[index], newer)
            newer = warped[index].detach()
    fused: Tensor = fusion([*warped[:past], current.features, *warped[past:]], coverages, past)
    return fused
