"""Draw the samples that a process trains on at every step, from the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from bevperception.training.seeding import SHUFFLE, derive_seed


@dataclass(frozen=True)
class RunShare:
    """One process's share of a run: which micro-batches it draws.

    Attributes:
        batch_size: samples a process and micro-batch.
        steps: optimiser steps of the whole run.
        accumulate: micro-batches a step.
        seed: of the run.
        rank: this process.
        world_size: number of processes.
        first_step: optimiser steps already taken; iteration begins with the next.
    """

    batch_size: int
    steps: int
    accumulate: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    first_step: int = 0

    @property
    def first_batch(self) -> int:
        """Number of the next micro-batch."""
        return self.first_step * self.accumulate

    @property
    def batches(self) -> int:
        """Number of micro-batches of the whole run."""
        return self.steps * self.accumulate


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (sample index, augmentation draw) for one process, from a given step to the last.

    All epochs' permutations laid end to end are one stream of slots. Micro-batch m of the run takes
    the next ``batch_size * world_size`` slots of it, process r the r-th part of them. So no sample is
    lost or repeated within an epoch (a batch may end one epoch and begin the next), and what a slot
    holds depends neither on the number of processes nor on where the run was resumed.

    Args:
        samples: number of samples of the data set, at least one.
        share: of this process.

    Raises:
        ValueError: if there are no samples.
    """

    def __init__(self, samples: int, share: RunShare) -> None:
        if samples < 1:
            raise ValueError("a StepSampler needs at least one sample, got none")
        self.samples, self.share = samples, share
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        """Micro-batches of the whole run, those before ``first_step`` included, as Lightning counts."""
        return self.share.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The remaining micro-batches of this process."""
        share = self.share
        for batch in range(share.first_batch, share.batches):
            first = (batch * share.world_size + share.rank) * share.batch_size
            yield [self.slot(first + offset) for offset in range(share.batch_size)]

    def slot(self, position: int) -> tuple[int, int]:
        """(sample index, augmentation draw) of a slot of the stream.

        Args:
            position: counted over the whole run and all processes, from 0; it is the draw's number too.
        """
        epoch, place = divmod(position, self.samples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(SHUFFLE, self.share.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.samples, generator=generator)
        return int(self._order[place]), position
