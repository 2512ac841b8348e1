"""Training as a vehicle drives: every slot of the batch follows a scene, and memory goes from step to step.

A queue runs the network on every frame of its history for the sake of one frame that learns. Here every frame
learns and none is run twice, at the price of batches whose samples resemble those of the step before (Wang
et al., StreamPETR, ICCV 2023, section 4.2; Park et al., SOLOFusion, ICLR 2023).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from bevperception.distributed import gather_objects, rank, world_size
from bevperception.structures import Batch, BEVMemory
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
        batch_size: slots of this process.
        steps: optimiser steps of the whole run.
        accumulate: micro-batches a step.
        seed: of the run.
        rank: this process.
        world_size: number of processes.
        first_step: optimiser steps already taken; iteration begins with the next.

    Raises:
        ValueError: if there are no samples.
    """

    def __init__(
        self,
        scene_lengths: Sequence[int],
        length: int,
        batch_size: int,
        steps: int,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
    ) -> None:
        if sum(scene_lengths) < 1:
            raise ValueError("a StreamSampler needs at least one sample, got none")
        self.scene_lengths, self.length, self.seed = list(scene_lengths), length, seed
        self.slots = batch_size * world_size
        self.own = range(rank * batch_size, (rank + 1) * batch_size)
        self.first_batch, self.batches = first_step * accumulate, steps * accumulate

    def __len__(self) -> int:
        """Micro-batches of the whole run, those before ``first_step`` included, as Lightning counts."""
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The remaining micro-batches of this process."""
        segments = enumerate(self._segments())
        free = [(0, slot) for slot in range(self.slots)]
        # Of each slot: sample index less micro-batch, and the segment's number in the run.
        playing = [(0, 0)] * self.slots
        for batch in range(self.batches):
            while free[0][0] == batch:
                slot = free[0][1]
                number, (first, length) = next(segments)
                playing[slot] = (first - batch, number)
                heapq.heapreplace(free, (batch + length, slot))
            if batch >= self.first_batch:
                yield [(playing[slot][0] + batch, playing[slot][1]) for slot in self.own]

    def _segments(self) -> Iterator[tuple[int, int]]:
        """(first sample, samples) of the segments of all epochs, one epoch after the other."""
        for epoch in count():
            generator = torch.Generator().manual_seed(derive_seed(SHUFFLE, self.seed, epoch))
            found, first = [], 0
            for samples in self.scene_lengths:
                cut = int(torch.randint(self.length, (1,), generator=generator))
                cuts = [0, *range(cut or self.length, samples, self.length), samples]
                found += [(first + a, b - a) for a, b in pairwise(cuts) if b > a]
                first += samples
            for place in torch.randperm(len(found), generator=generator).tolist():
                yield found[place]


class StreamMemory:
    """What the slots of one process remember between training steps, and the scene each is in."""

    def __init__(self) -> None:
        self._memory: BEVMemory | None = None
        self._scenes: list[str] = []

    def recall(self, batch: Batch) -> BEVMemory | None:
        """The memory for a batch: forgotten where a slot is in another scene, before or long after it.

        Returns:
            None where no slot remembers anything.
        """
        memory = self._memory
        if memory is None or len(self._scenes) != len(batch):
            return None
        passed_s = batch.frames.timestamps_s - memory.timestamps_s
        same = [a == b for a, b in zip(self._scenes, batch.scene_tokens, strict=True)]
        goes_on = torch.tensor(same, device=passed_s.device) & (passed_s > 0) & (passed_s <= MAX_GAP_S)
        kept = memory.keep(goes_on)
        return kept if bool(kept.valid.any()) else None

    def remember(self, batch: Batch, memory: BEVMemory) -> None:
        """Keep the memory after a batch, without a gradient into it."""
        self._memory, self._scenes = memory.detach(), list(batch.scene_tokens)

    def forget(self) -> None:
        """Start anew."""
        self._memory, self._scenes = None, []

    def state(self) -> list[dict[str, Any]]:
        """What all processes remember, in order of rank, as plain tensors, for a checkpoint."""
        memory = None if self._memory is None else self._memory.to("cpu")
        return gather_objects({"memory": None if memory is None else _plain(memory), "scenes": self._scenes})

    def load_state(self, states: Sequence[dict[str, Any]]) -> None:
        """Take up what this process remembered; with another number of processes all start anew."""
        self.forget()
        if len(states) == world_size() and states[rank()]["memory"] is not None:
            self._memory = _from_plain(states[rank()]["memory"])
            self._scenes = list(states[rank()]["scenes"])

    def to(self, device: torch.device) -> None:
        """Move what is remembered."""
        if self._memory is not None:
            self._memory = self._memory.to(device)


def _plain(memory: BEVMemory) -> dict[str, Any]:
    tensors = {f.name: getattr(memory, f.name) for f in fields(memory) if f.name != "older"}
    return tensors | {"older": [_plain(frame) for frame in memory.older]}


def _from_plain(state: dict[str, Any]) -> BEVMemory:
    tensors: dict[str, Tensor | None] = {name: value for name, value in state.items() if name != "older"}
    return BEVMemory(**tensors, older=[_from_plain(frame) for frame in state["older"]])  # type: ignore[arg-type]
