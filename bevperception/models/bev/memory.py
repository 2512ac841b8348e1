"""The memory of a stream: which frames it keeps, and which of them a new frame is fused with.

Every choice is made with tensors, sample by sample, so that a batch of n equals n singles and a graph can be
compiled. Only its use differs: eager code takes frames without a copy where all samples agree and drops
frames that no sample needs; a compiled graph copies into a list of fixed length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bevperception.models.selection import common_rows, compiling
from bevperception.structures import BEVMemory

_SPACING = 0.2
"""With an interval, remembered frames lie at least this share of it apart."""
_ROUNDING_S = 1e-3


@dataclass(frozen=True)
class SlotSelection:
    """Which remembered frame fills each slot of a model, sample by sample.

    Attributes:
        index: (slots, B) positions in the memory's frames; arbitrary where a slot stays empty.
        filled: (slots, B) bool, False where no frame fits the slot.
    """

    index: Tensor
    filled: Tensor


def select_slots(
    memory: BEVMemory, now_s: Tensor, past: int, future: int, interval_s: float
) -> SlotSelection:
    """Select the frames that a frame is fused with.

    Args:
        memory: remembered frames, of any times.
        now_s: (B,) time of the current frame.
        past: slots for frames not later than the current one.
        future: slots for later frames.
        interval_s: 0 takes the nearest frames in time; otherwise slot k takes the frame nearest to k
            intervals away, unless it lies more than half an interval off.

    Returns:
        past + future slots in order of time, the current frame between them left out.
    """
    frames = memory.frames
    valid = torch.stack([frame.valid for frame in frames])
    ages_s = now_s - torch.stack([frame.timestamps_s for frame in frames])
    earlier = _fill(ages_s, valid & (ages_s >= 0), past, interval_s)
    later = _fill(-ages_s, valid & (ages_s < 0), future, interval_s)
    index, filled = (torch.cat((a.flip(0), b)) for a, b in zip(earlier, later, strict=True))
    return SlotSelection(index, filled)


def _fill(away_s: Tensor, candidates: Tensor, slots: int, interval_s: float) -> tuple[Tensor, Tensor]:
    """Frame of each slot, nearest slot first, and whether it is filled, from (frames, B) distances."""
    if interval_s == 0.0:
        away_s = torch.where(candidates, away_s, math.inf)
        index = away_s.argsort(dim=0, stable=True)[:slots]
        # (frames, B) -> (slots, B)
        return _padded(index, away_s.gather(0, index).isfinite(), slots)
    wanted_s = interval_s * torch.arange(1, slots + 1, device=away_s.device, dtype=away_s.dtype)
    off_s = (away_s[None] - wanted_s[:, None, None]).abs()
    off_s = torch.where(candidates & (off_s <= 0.5 * interval_s), off_s, math.inf)
    return off_s.argmin(1), off_s.isfinite().any(1)


def _padded(index: Tensor, filled: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Append empty slots up to a number of slots."""
    missing = slots - len(index)
    if missing <= 0:
        return index, filled
    empty = index.new_zeros(missing, index.shape[1])
    return torch.cat((index, empty)), torch.cat((filled, torch.zeros_like(empty, dtype=torch.bool)))


def gather_slots(memory: BEVMemory, selection: SlotSelection) -> list[BEVMemory]:
    """Collect the frame of each slot.

    Args:
        memory: the remembered frames that the selection was made from.
        selection: (slots, B).

    Returns:
        A frame a slot. Samples whose slot is empty hold arbitrary values, and ``valid`` is False for them.
    """
    frames = memory.frames
    rows = common_rows(selection.index)
    if rows is not None:
        return [frames[row].keep(filled) for row, filled in zip(rows, selection.filled, strict=True)]
    sample = torch.arange(selection.index.shape[1], device=selection.index.device)

    def gather(parts: Sequence[Tensor]) -> Tensor:
        # frames of (B, ...) -> (frames, B, ...) -> (slots, B, ...)
        return torch.stack(tuple(parts))[selection.index, sample]

    features = gather([f.features for f in frames])
    poses, stamps = gather([f.bev_to_global for f in frames]), gather([f.timestamps_s for f in frames])
    buses = [f.can_bus for f in frames if f.can_bus is not None]
    can_bus = gather(buses) if len(buses) == len(frames) else [None] * len(selection.index)
    valid = selection.filled & gather([f.valid for f in frames])
    return [BEVMemory(*slot) for slot in zip(features, poses, stamps, valid, can_bus, strict=True)]


def frame_before(memory: BEVMemory, now_s: Tensor, interval_s: float) -> BEVMemory:
    """Select the previous frame of a recurrent model.

    Motion that was learned between key frames is right for frames as far apart. With an interval the previous
    frame is the one nearest to one interval ago, whatever the cameras' rate, or none.

    Args:
        memory: remembered frames, B samples.
        now_s: (B,) time of the current frame.
        interval_s: 0 for the newest frame.

    Returns:
        One frame; samples without a frame half to one and a half intervals ago are invalid.
    """
    if interval_s == 0.0:
        return memory.with_older([])
    (previous,) = gather_slots(memory, select_slots(memory, now_s, 1, 0, interval_s))
    return previous


def push(memory: BEVMemory | None, newest: BEVMemory, past: int, interval_s: float) -> BEVMemory:
    """Add a frame to the memory, and forget the frames that no later frame can need.

    Args:
        memory: before the frame; None at the start of a stream.
        newest: the frame, without older ones.
        past: slots for past frames.
        interval_s: see :func:`select_slots`; 0 keeps the last ``past`` frames, otherwise the memory
            holds about five frames an interval, whatever the frame rate.

    Returns:
        ``newest`` with the older frames behind it.
    """
    if past == 0:
        return newest
    older = [] if memory is None else memory.frames
    if compiling():
        return newest.with_older(_push_fixed_length(older, newest, past, interval_s))
    if not older:
        return newest
    needed = _needed(older, newest, past, interval_s)
    alive = needed.any(1).tolist()
    return newest.with_older(
        [frame.keep(mine) for frame, mine, lives in zip(older, needed, alive, strict=True) if lives]
    )


def _push_fixed_length(
    older: Sequence[BEVMemory], newest: BEVMemory, past: int, interval_s: float
) -> list[BEVMemory]:
    """The older frames to keep in a list of fixed length, so that a stream compiles two graphs, not many."""
    length = past if interval_s == 0.0 else 1 + int(_reach_s(past, interval_s) / _spacing_s(interval_s))
    if not older:
        forgotten = newest.keep(torch.zeros_like(newest.valid))
        # Tensors of their own: a graph is compiled for what its inputs share, and later frames share nothing.
        return [forgotten._map(torch.clone) for _ in range(length)]
    needed = _needed(older, newest, past, interval_s)
    index = (~needed).int().argsort(dim=0, stable=True)[:length]  # (length or fewer, B), needed frames first
    filled = needed.gather(0, index)
    return gather_slots(older[0].with_older(list(older[1:])), SlotSelection(*_padded(index, filled, length)))


def _needed(older: Sequence[BEVMemory], newest: BEVMemory, past: int, interval_s: float) -> Tensor:
    """Which of the older frames, newest first, are kept: (frames, B) bool."""
    valid = torch.stack([frame.valid for frame in older])
    if interval_s == 0.0:
        newer = newest.valid + valid.long().cumsum(0) - valid.long()
        return valid & (newer < past)
    stamps_s = torch.stack([frame.timestamps_s for frame in older])
    in_reach = valid & ((newest.timestamps_s - stamps_s).abs() <= _reach_s(past, interval_s))
    kept: list[Tensor] = []
    last_s = torch.full_like(newest.timestamps_s, -math.inf)
    for stamp_s, candidate in zip(stamps_s.flip(0), in_reach.flip(0), strict=True):
        # From the oldest on, so that what was once kept stays.
        kept.append(candidate & ((stamp_s - last_s).abs() >= _spacing_s(interval_s)))
        last_s = torch.where(kept[-1], stamp_s, last_s)
    return torch.stack(kept[::-1])


def _reach_s(past: int, interval_s: float) -> float:
    return (past + 0.5) * interval_s


def _spacing_s(interval_s: float) -> float:
    return _SPACING * interval_s - _ROUNDING_S
