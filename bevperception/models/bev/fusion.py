"""Several frames' BEV features become one: chosen from the memory, warped, concatenated, reduced.

The temporal encoder of BEVFormer v2 (Yang et al., CVPR 2023, section 3.4): every frame's BEV features
are made from that frame alone, so a vehicle keeps them and only warps them when a new frame comes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bevperception.geometry import BEVGrid
from bevperception.models.bev.memory import warp_bev
from bevperception.models.precision import LayerNorm
from bevperception.structures import BEVMemory

NormName = Literal["batch", "group"]

_SPACING = 0.2
"""With an interval, remembered frames lie at least this share of it apart."""
_ROUNDING_S = 1e-3


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
        x = torch.cat(list(maps), dim=1)
        if self.coverage:
            x = torch.cat((x, torch.stack(list(coverages), dim=1).to(x.dtype)), dim=1)
        for block in self.blocks:
            recompute = self.checkpointing and torch.is_grad_enabled() and x.requires_grad
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        fused: Tensor = self.norm(self.projection(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return maps[current] + fused if self.residual else fused


@dataclass(frozen=True)
class FrameChoice:
    """Which remembered frame fills a slot, sample by sample.

    Attributes:
        index: B positions in the memory's frames; None where there is none.
    """

    index: tuple[int | None, ...]

    def gather(self, frames: Sequence[BEVMemory], like: BEVMemory) -> BEVMemory:
        """The chosen frames as one; samples without one are invalid and stand where ``like`` does.

        Args:
            frames: what the indices count.
            like: the current frame.
        """
        valid = torch.tensor([i is not None for i in self.index], device=like.features.device)
        if len(set(self.index)) == 1 and self.index[0] is not None:
            return frames[self.index[0]]
        sources = [like if i is None else frames[i] for i in self.index]
        features = torch.stack(
            [
                torch.zeros_like(like.features[b]) if i is None else frames[i].features[b]
                for b, i in enumerate(self.index)
            ]
        )
        return BEVMemory(
            features.to(like.features.dtype),
            torch.stack([source.bev_to_global[b] for b, source in enumerate(sources)]),
            torch.stack([source.timestamps_s[b] for b, source in enumerate(sources)]),
            valid,
        )


def choose_frames(
    memory: BEVMemory | None, now_s: Tensor, past: int, future: int, interval_s: float
) -> list[FrameChoice]:
    """What fills the slots of a fusion.

    Args:
        memory: remembered frames, of any times.
        now_s: (B,) time of the current frame.
        past: slots for frames not later than the current one.
        future: slots for later frames.
        interval_s: 0 takes the nearest frames in time; otherwise slot k takes the frame nearest to k
            intervals away, unless it lies more than half an interval off.

    Returns:
        past + future choices in order of time, the current frame between them left out.
    """
    frames = [] if memory is None else memory.frames
    now = now_s.tolist()
    times = [frame.timestamps_s.tolist() for frame in frames]
    valid = [frame.valid.tolist() for frame in frames]
    chosen: list[list[int | None]] = []
    for sample, time_s in enumerate(now):
        ages = {i: time_s - times[i][sample] for i in range(len(frames)) if valid[i][sample]}
        earlier = _fill({i: age for i, age in ages.items() if age >= 0}, past, interval_s)
        later = _fill({i: -age for i, age in ages.items() if age < 0}, future, interval_s)
        chosen.append([*earlier[::-1], *later])
    return [FrameChoice(tuple(slots)) for slots in zip(*chosen, strict=True)]


def _fill(distances_s: dict[int, float], slots: int, interval_s: float) -> list[int | None]:
    """Frame of each slot, nearest slot first; ``distances_s`` by frame, in the memory's order."""
    if interval_s == 0.0:
        nearest: list[int | None] = sorted(distances_s, key=lambda i: distances_s[i])[:slots]  # type: ignore[assignment]
        return nearest + [None] * (slots - len(nearest))
    found: list[int | None] = []
    for slot in range(1, slots + 1):
        best = min(distances_s, key=lambda i: abs(distances_s[i] - slot * interval_s), default=None)
        near = best is not None and abs(distances_s[best] - slot * interval_s) <= 0.5 * interval_s
        found.append(best if near else None)
    return found


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
        # where, not a product: what is forgotten may hold NaN.
        features = torch.where(present[..., None], frame.features.to(current.features.dtype), 0.0)
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


def frame_before(memory: BEVMemory, now_s: Tensor, interval_s: float) -> BEVMemory:
    """The one frame that a recurrent model goes on from.

    What a model learned of motion between key frames holds for frames as far apart: with an interval it is
    given the frame nearest to one interval ago, whatever the cameras' rate, or none.

    Args:
        memory: remembered frames, B samples.
        now_s: (B,) time of the current frame.
        interval_s: 0 for the newest frame.

    Returns:
        One frame; samples without a frame half to one and a half intervals ago are invalid.
    """
    frames = memory.frames
    if interval_s == 0.0:
        return frames[0]
    off_s = torch.stack([(now_s - frame.timestamps_s - interval_s).abs() for frame in frames])
    wrong = ~torch.stack([frame.valid for frame in frames]) | (off_s > 0.5 * interval_s)
    off_s = torch.where(wrong, math.inf, off_s)
    index = off_s.argmin(0)
    there = off_s.isfinite().any(0)
    if len(frames) == 1:
        return frames[0].keep(there)
    sample = torch.arange(len(index), device=index.device)

    def pick(name: str) -> Tensor:
        return torch.stack([getattr(frame, name) for frame in frames])[index, sample]

    return BEVMemory(pick("features"), pick("bev_to_global"), pick("timestamps_s"), there)


def push(memory: BEVMemory | None, newest: BEVMemory, past: int, interval_s: float) -> BEVMemory:
    """The memory after a frame; no more than later frames can need.

    Args:
        memory: before it.
        newest: the frame alone.
        past: slots for past frames.
        interval_s: see :func:`choose_frames`; 0 keeps the last ``past`` frames, otherwise the memory
            holds about five frames an interval, whatever the frame rate.

    Returns:
        ``newest`` with the older frames behind it.
    """
    older = [] if memory is None else [frame for frame in memory.frames if bool(frame.valid.any())]
    if interval_s == 0.0:
        return newest.with_older(_still_needed(newest, older, past))
    reach_s, spacing_s = (past + 0.5) * interval_s, _SPACING * interval_s - _ROUNDING_S
    kept: list[BEVMemory] = []
    for frame in reversed(older):  # from the oldest on, so that what was once kept stays
        if _least_s(newest, frame) <= reach_s and (not kept or _most_s(frame, kept[-1]) >= spacing_s):
            kept.append(frame)
    return newest.with_older(kept[::-1])


def _still_needed(newest: BEVMemory, older: Sequence[BEVMemory], past: int) -> list[BEVMemory]:
    """The frames that are among the last ``past`` ones of some sample."""
    seen = newest.valid.long()
    kept: list[BEVMemory] = []
    for frame in older:
        needed = frame.valid & (seen < past)
        if bool(needed.any()):
            kept.append(frame)
        seen = seen + needed.long()
    return kept


def _differences_s(later: BEVMemory, earlier: BEVMemory) -> list[float]:
    return (later.timestamps_s - earlier.timestamps_s)[earlier.valid].abs().tolist()


def _least_s(later: BEVMemory, earlier: BEVMemory) -> float:
    return min(_differences_s(later, earlier), default=math.inf)


def _most_s(later: BEVMemory, earlier: BEVMemory) -> float:
    return max(_differences_s(later, earlier), default=math.inf)
