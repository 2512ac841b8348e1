"""Streaming training: every slot of the batch plays a scene in order, and memory passes from step to step.

A queue runs the network on every frame of its history for the sake of one frame that learns. Here every frame
learns and none is run twice (Wang et al., StreamPETR, ICCV 2023, section 4.2; Park et al., SOLOFusion, ICLR
2023), at the price of batches whose samples resemble those of the step before. Where several groups of slots
take turns, they no longer do: each group waits, with its memory, while the others play.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import count, pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from bevperception.distributed import gather_objects, rank, world_size
from bevperception.structures import Batch, BEVMemory
from bevperception.training.sampler import RunShare
from bevperception.training.seeding import SHUFFLE, derive_seed

MAX_GAP_S = 2.0
"""Memory that is older is forgotten; as long as BEVFormer's training queues reach back."""


class StreamSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (sample index, segment) for one process, in which every slot plays scenes frame by frame.

    In each epoch every scene is cut into segments of ``length`` consecutive samples, at another place each
    time, and the segments are shuffled. A slot that has played its segment takes the next one of that order,
    which is common to all processes. So every sample comes once an epoch, and what a slot plays depends
    neither on the number of processes nor on where the run was resumed.

    Args:
        scene_lengths: samples of each scene, in the order of the data set.
        length: samples of a segment; those at a scene's ends may be shorter.
        share: of this process; its batch size is the number of slots that play at a time.
        turns: groups of slots that take turns, batch by batch.

    Raises:
        ValueError: if there are no samples.
    """

    def __init__(self, scene_lengths: Sequence[int], length: int, share: RunShare, turns: int = 1) -> None:
        if sum(scene_lengths) < 1:
            raise ValueError("a StreamSampler needs at least one sample, got none")
        self.scene_lengths, self.length, self.seed = list(scene_lengths), length, share.seed
        self.slots, self.turns = share.batch_size * share.world_size, turns
        self.own_slots = range(share.rank * share.batch_size, (share.rank + 1) * share.batch_size)
        self.first_batch, self.batches = share.first_batch, share.batches

    def __len__(self) -> int:
        """Micro-batches of the whole run, those before ``first_step`` included, as Lightning counts."""
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The remaining micro-batches of this process."""
        segments = enumerate(self._segments())
        free = [(0, slot) for slot in range(self.turns * self.slots)]
        # Of each slot: sample index less the group's batches so far, and the segment's number in the run.
        playing = [(0, 0)] * len(free)
        for batch in range(self.batches):
            played, group = divmod(batch, self.turns)
            while free[0][0] == played:
                slot = free[0][1]
                number, (first, length) = next(segments)
                playing[slot] = (first - played, number)
                heapq.heapreplace(free, (played + length, slot))
            if batch >= self.first_batch:
                mine = playing[group * self.slots :][self.own_slots.start : self.own_slots.stop]
                yield [(sample + played, number) for sample, number in mine]

    def _segments(self) -> Iterator[tuple[int, int]]:
        """(first sample, samples) of the segments of all epochs, one epoch after the other."""
        for epoch in count():
            generator = torch.Generator().manual_seed(derive_seed(SHUFFLE, self.seed, epoch))
            segments, first = [], 0
            for samples in self.scene_lengths:
                cut = int(torch.randint(self.length, (1,), generator=generator))
                cuts = [0, *range(cut or self.length, samples, self.length), samples]
                segments += [(first + a, b - a) for a, b in pairwise(cuts) if b > a]
                first += samples
            for place in torch.randperm(len(segments), generator=generator).tolist():
                yield segments[place]


class StreamMemory:
    """Memory of the slots of one process between training steps, and the scene of each.

    Slots that play together share a number, their turn; those of another turn have a memory of their own.
    A slot whose sample cannot be read keeps its memory for the sample after that.

    Args:
        slots: that play together, a batch's places.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._kept: dict[int, tuple[BEVMemory, list[str]]] = {}

    def memory_for(self, batch: Batch, turn: int = 0) -> BEVMemory | None:
        """The memory for a batch: forgotten where a slot is in another scene, before or long after it.

        Args:
            batch: the slots' next samples.
            turn: of the slots.

        Returns:
            None where no slot of the batch remembers anything.
        """
        if turn not in self._kept or batch.is_stand_in:
            return None
        everything, scenes = self._kept[turn]
        places = self._places(batch)
        memory = everything if len(places) == self.slots else everything._map(lambda tensor: tensor[places])
        passed_s = batch.frames.timestamps_s - memory.timestamps_s
        same = [scenes[place] == scene for place, scene in zip(places, batch.scene_tokens, strict=True)]
        goes_on = torch.tensor(same, device=passed_s.device) & (passed_s > 0) & (passed_s <= MAX_GAP_S)
        kept = memory.keep(goes_on)
        return kept if bool(kept.valid.any()) else None

    def remember(self, batch: Batch, memory: BEVMemory, turn: int = 0) -> None:
        """Keep the memory after a batch, without a gradient into it."""
        if batch.is_stand_in:
            return
        newest, places = memory.detach(), self._places(batch)
        scenes = dict(zip(places, batch.scene_tokens, strict=True))
        if len(places) == self.slots:
            self._kept[turn] = (newest, list(batch.scene_tokens))
            return
        before, scenes_before = self._kept.get(turn, (None, [""] * self.slots))
        self._kept[turn] = (
            _put(before, newest, places, self.slots),
            [scenes.get(slot, scene) for slot, scene in enumerate(scenes_before)],
        )

    def _places(self, batch: Batch) -> list[int]:
        """Slots of the batch's samples."""
        places = list(range(self.slots)) if batch.places is None else batch.places
        assert len(places) == len(batch), f"{len(batch)} samples for {len(places)} slots"
        return places

    def forget(self) -> None:
        """Forget the memory of all slots."""
        self._kept = {}

    def state(self) -> list[list[dict[str, Any]]]:
        """Collect the memory of all processes, in order of rank, as plain tensors for a checkpoint."""
        return gather_objects(
            [
                {"turn": turn, "memory": _plain(memory.to("cpu")), "scenes": scenes}
                for turn, (memory, scenes) in self._kept.items()
            ]
        )

    def load_state(self, states: Sequence[list[dict[str, Any]]]) -> None:
        """Restore this process's memory; with another number of processes or slots it starts empty."""
        self.forget()
        if len(states) == world_size():
            self._kept = {
                kept["turn"]: (_from_plain(kept["memory"]), list(kept["scenes"]))
                for kept in states[rank()]
                if len(kept["scenes"]) == self.slots
            }

    def to(self, device: torch.device) -> None:
        """Move the memory to a device."""
        self._kept = {turn: (memory.to(device), scenes) for turn, (memory, scenes) in self._kept.items()}


def _put(before: BEVMemory | None, newest: BEVMemory, places: Sequence[int], slots: int) -> BEVMemory:
    """The memory of all slots, in which those at ``places`` have the newest and the others what they had.

    Args:
        before: of all slots; None where none remembers anything.
        newest: a row for each of ``places``.
        places: slots, each once.
        slots: how many there are.
    """
    if before is None:
        filler = newest._map(lambda tensor: tensor[[0] * slots])
        before = filler.keep(torch.zeros_like(filler.valid))
    index = list(range(slots))
    for row, place in enumerate(places):
        index[place] = slots + row
    joined = []
    for kept, new in zip_longest(before.frames, newest.frames):
        # A frame that only one of them has is none to the slots of the other.
        a = before.frames[0].keep(torch.zeros_like(before.valid)) if kept is None else kept
        b = newest.frames[0].keep(torch.zeros_like(newest.valid)) if new is None else new
        rows = [
            None if old is None else torch.cat((old, getattr(b, name)))[index]
            for name, old in ((f.name, getattr(a, f.name)) for f in fields(a) if f.name != "older")
        ]
        joined.append(BEVMemory(*rows))  # type: ignore[arg-type]
    return joined[0].with_older(joined[1:])


def _plain(memory: BEVMemory) -> dict[str, Any]:
    tensors = {f.name: getattr(memory, f.name) for f in fields(memory) if f.name != "older"}
    return tensors | {"older": [_plain(frame) for frame in memory.older]}


def _from_plain(state: dict[str, Any]) -> BEVMemory:
    tensors: dict[str, Tensor | None] = {name: value for name, value in state.items() if name != "older"}
    return BEVMemory(**tensors, older=[_from_plain(frame) for frame in state["older"]])  # type: ignore[arg-type]
