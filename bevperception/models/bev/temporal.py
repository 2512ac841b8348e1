"""How other frames enter a frame: BEVFormer v1's recurrence, or v2's fusion of several frames.

A model has one of the two classes. Both answer the same four questions about a frame: what of the memory the
BEV encoder reads, how the remembered frames join the frame's own BEV features, what the frame before looked
like from here, and what is remembered of the frame. A sample whose pose is impossible neither uses the memory
nor enters it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from bevperception.config_model import TemporalConfig
from bevperception.geometry import BEVGrid
from bevperception.models.bev.alignment import BEVWithCoverage, known_poses, warp_memory
from bevperception.models.bev.fusion import FusionNetwork
from bevperception.models.bev.memory import frame_before, gather_slots, push, select_slots
from bevperception.structures import BEVMemory, CameraFrames

Missing = Literal["zeros", "nearest"]


class Temporal(Protocol):
    """Interface of the two ways to use other frames."""

    def encoder_memory(self, frames: CameraFrames, memory: BEVMemory | None) -> BEVMemory | None:
        """The remembered frame that the BEV encoder reads; None where it reads none."""

    def fuse(self, current_bev: Tensor, frames: CameraFrames, memory: BEVMemory | None) -> Tensor:
        """BEV features (B, C, rows, columns) of the frame together with the remembered frames."""

    def previous_bev(self, frames: CameraFrames, memory: BEVMemory | None) -> BEVWithCoverage | None:
        """The BEV features of the frame before, warped into the current frame; None without a memory."""

    def remember(
        self,
        current_bev: Tensor,
        frames: CameraFrames,
        memory: BEVMemory | None = None,
        valid: Tensor | None = None,
    ) -> BEVMemory:
        """The memory after the frame; samples outside ``valid`` (B,) bool have not seen the frame."""


def as_memory(current_bev: Tensor, frames: CameraFrames, valid: Tensor | None = None) -> BEVMemory:
    """A memory of one frame.

    Args:
        current_bev: (B, C, rows, columns) BEV features of the frame alone.
        frames: the frame's poses and times.
        valid: (B,) bool, False for samples whose frame is a placeholder; None for all true.
    """
    known = known_poses(frames).to(current_bev.device)
    valid = known if valid is None else known & valid.to(current_bev.device)
    return BEVMemory(current_bev, frames.bev_to_global, frames.timestamps_s, valid, frames.can_bus)


@dataclass(frozen=True)
class TemporalRecurrence:
    """BEVFormer v1: temporal self-attention reads the BEV features of the frame before (section 3.4).

    Args:
        grid: BEV grid.
        settings: for the interval; the other fields are the fusion's.
    """

    grid: BEVGrid
    settings: TemporalConfig

    def encoder_memory(self, frames: CameraFrames, memory: BEVMemory | None) -> BEVMemory | None:
        """The frame before, for samples whose pose is possible."""
        if memory is None:
            return None
        return frame_before(memory.keep(known_poses(frames)), frames.timestamps_s, self.settings.interval_s)

    def fuse(self, current_bev: Tensor, frames: CameraFrames, memory: BEVMemory | None) -> Tensor:
        """The features as they are: the frame before has entered in the encoder."""
        return current_bev

    def previous_bev(self, frames: CameraFrames, memory: BEVMemory | None) -> BEVWithCoverage | None:
        """The frame before in the current frame."""
        return _previous_bev(self.grid, self.settings.interval_s, frames, memory)

    def remember(
        self,
        current_bev: Tensor,
        frames: CameraFrames,
        memory: BEVMemory | None = None,
        valid: Tensor | None = None,
    ) -> BEVMemory:
        """The frame alone or, with an interval, the frames since the one before last."""
        newest = as_memory(current_bev, frames, valid)
        interval_s = self.settings.interval_s
        return newest if interval_s == 0.0 else push(memory, newest, 1, interval_s)


@dataclass(frozen=True)
class TemporalFusion:
    """BEVFormer v2: each frame is encoded alone, kept, and fused with the frames around it (section 3.4).

    Args:
        grid: BEV grid.
        settings: slots and their interval.
        network: what fuses the frames; None for a single-frame model.
    """

    grid: BEVGrid
    settings: TemporalConfig
    network: FusionNetwork | None

    def encoder_memory(self, frames: CameraFrames, memory: BEVMemory | None) -> BEVMemory | None:
        """None: every frame is encoded alone."""
        return None

    def fuse(self, current_bev: Tensor, frames: CameraFrames, memory: BEVMemory | None) -> Tensor:
        """Fuse the frame with the remembered frames that fill its slots."""
        if self.network is None:
            return current_bev
        settings = self.settings
        current = as_memory(current_bev, frames)
        # A stream begins like one that has forgotten everything.
        memory = current.keep(torch.zeros_like(current.valid)) if memory is None else memory
        memory = memory.keep(known_poses(frames))
        slots = select_slots(memory, frames.timestamps_s, settings.past, settings.future, settings.interval_s)
        others = gather_slots(memory, slots)
        missing: Missing = "nearest" if settings.published_fusion else "zeros"
        return fuse_memory(self.network, self.grid, current, others, settings.past, missing)

    def previous_bev(self, frames: CameraFrames, memory: BEVMemory | None) -> BEVWithCoverage | None:
        """The frame before in the current frame; None for a single-frame model."""
        if self.network is None:
            return None
        return _previous_bev(self.grid, self.settings.interval_s, frames, memory)

    def remember(
        self,
        current_bev: Tensor,
        frames: CameraFrames,
        memory: BEVMemory | None = None,
        valid: Tensor | None = None,
    ) -> BEVMemory:
        """The frame with the older ones that later frames may be fused with."""
        newest = as_memory(current_bev, frames, valid)
        if self.network is None:
            return newest
        return push(memory, newest, self.settings.past, self.settings.interval_s)


def _previous_bev(
    grid: BEVGrid, interval_s: float, frames: CameraFrames, memory: BEVMemory | None
) -> BEVWithCoverage | None:
    if memory is None:
        return None
    return warp_memory(grid, frame_before(memory, frames.timestamps_s, interval_s), frames.bev_to_global)


def fuse_memory(
    network: FusionNetwork,
    grid: BEVGrid,
    current: BEVMemory,
    others: Sequence[BEVMemory],
    past: int,
    missing: Missing,
) -> Tensor:
    """Warp frames into the current one and fuse all.

    Args:
        network: for 1 + len(others) frames.
        grid: of all maps.
        current: the current frame's features and pose.
        others: the other frames in order of time; invalid samples may hold anything.
        past: how many of them are earlier than the current one.
        missing: what replaces a missing frame: 'zeros' with coverage 0, or the 'nearest' frame between it and
            the current one, without gradient, as published.

    Returns:
        (B, C, rows, columns).
    """
    warped: list[Tensor] = []
    coverages: list[Tensor] = []
    for frame in others:
        frame = replace(frame, features=frame.features.to(current.features.dtype))
        maps, coverage = warp_memory(grid, frame, current.bev_to_global)
        warped.append(maps)
        coverages.append(coverage)
    if missing == "nearest":
        nearer = current.features.detach()
        for index in [*range(past - 1, -1, -1), *range(past, len(others))]:
            if index == past:
                nearer = current.features.detach()
            warped[index] = torch.where(others[index].valid[:, None, None, None], warped[index], nearer)
            nearer = warped[index].detach()
    fused: Tensor = network([*warped[:past], current.features, *warped[past:]], coverages, past)
    return fused


def build_temporal(settings: TemporalConfig, grid: BEVGrid, network: FusionNetwork | None) -> Temporal:
    """The way that a model's settings ask for.

    Args:
        settings: ``mode`` chooses the class.
        grid: BEV grid.
        network: of a model that fuses frames.
    """
    if settings.recurrent:
        return TemporalRecurrence(grid, settings)
    return TemporalFusion(grid, settings, network)
