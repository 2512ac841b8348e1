"""Load samples in worker processes: an unreadable sample stops the run with a message, or is skipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bevperception.data.dataset import SkippedBatch, collate, init_worker
from bevperception.errors import BevError, ConfigError, DataError
from bevperception.structures import BadSample, Batch

MAX_REPLACEMENTS = 20
"""So many samples, drawn to stand in for an unreadable one, may be unreadable too before a run stops."""

OnBad = Literal["leave_out", "replace", "vacate"]
"""Treatment of a bad sample's place in its batch; see :class:`Fetcher`."""


class SampleSource(Protocol):
    """Interface of a data set to load from; :class:`bevperception.data.dataset.NuScenesDataset` has it."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, item: tuple[int, int]) -> Batch | BadSample:
        """The sample of (index, draw) as a batch of one."""


@dataclass(frozen=True)
class Failure:
    """An error of a loader process on its way to the main one.

    DataLoader itself would raise a RuntimeError whose message is the worker's traceback.
    """

    error: BevError

    def __len__(self) -> int:
        return 0


Loaded = Batch | SkippedBatch | Failure
"""Items that a loader yields."""


class Fetcher(Dataset[Any]):
    """Fetches whole batches from a source.

    Bad samples stay in a batch's list as records, whatever becomes of their places.

    Args:
        source: the samples.
        on_bad: 'leave_out' makes the batch smaller, possibly empty. 'replace' puts another sample in the
            place, drawn at random from the source, so that no sample is seen more often than others and the
            batch is full. 'vacate' leaves the place empty and notes in ``Batch.places`` which are filled; a
            batch of bad samples alone gets a stand-in that fills no place, because a process without any
            sample would let the others wait.
    """

    def __init__(self, source: SampleSource, on_bad: OnBad) -> None:
        self.source, self.on_bad = source, on_bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> Batch | BadSample | Failure:
        """One sample, bad or not."""
        try:
            return self.source[item]
        except BevError as error:
            return Failure(error)

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list[Batch | BadSample | Failure]:
        """A batch's samples, and the records of the bad ones."""
        asked = [self[item] for item in items]
        if self.on_bad == "leave_out":
            return asked
        samples: list[Batch | BadSample | Failure] = []
        for place, (item, sample) in enumerate(zip(items, asked, strict=True)):
            if self.on_bad == "vacate" and isinstance(sample, Batch):
                sample = replace(sample, places=[place])
            samples.append(sample)
            if self.on_bad == "replace" and isinstance(sample, BadSample):
                samples += self._stand_in(item, sample)
        if self.on_bad == "vacate" and all(isinstance(sample, BadSample) for sample in asked):
            *others, last = self._stand_in(items[0], asked[0])
            samples += [*others, replace(last, places=[]) if isinstance(last, Batch) else last]
        return samples

    def _stand_in(
        self, item: tuple[int, int], bad: Batch | BadSample | Failure
    ) -> list[Batch | BadSample | Failure]:
        """Draw samples in place of a bad one until one is good; return all that were drawn.

        The sample after a bad one would be the nearest, but it would be seen twice an epoch.
        """
        index, draw = item
        samples = [bad]
        for other in np.random.default_rng((draw, index)).integers(len(self.source), size=MAX_REPLACEMENTS):
            samples.append(self[int(other), draw])
            if not isinstance(samples[-1], BadSample):
                return samples[1:]
        last = samples[-1]
        assert isinstance(last, BadSample)
        error = DataError(
            f"{MAX_REPLACEMENTS} samples drawn in a row cannot be read; the last: {last.reason}\n"
            "most of the data set cannot be read: check data.root"
        )
        return [Failure(error)]


def collate_or_fail(samples: Sequence[Batch | BadSample | Failure]) -> Loaded:
    """Collate samples (:func:`~bevperception.data.dataset.collate`), or return the first failure."""
    good: list[Batch | BadSample] = []
    for sample in samples:
        if isinstance(sample, Failure):
            return sample
        good.append(sample)
    batch = collate(good)
    in_worker = torch.utils.data.get_worker_info() is not None
    return _shared(batch) if in_worker and isinstance(batch, Batch) else batch


def _shared(batch: Batch) -> Batch | Failure:
    """Move a batch to shared memory, to leave its worker.

    The queue to the main process would share it, too. But where there is no room the queue's thread drops
    it, and the main process waits for it without end.
    """
    try:
        return batch.share_memory()
    except (RuntimeError, OSError) as error:
        return Failure(
            ConfigError(
                f"a batch does not go through shared memory: {str(error).splitlines()[0]}\n"
                "likely cause: /dev/shm is small, as in many containers (docker run --shm-size 4g makes it "
                "larger); data.workers=0 does without"
            )
        )


def build_loader(
    source: SampleSource,
    batches: Iterable[list[tuple[int, int]]],
    workers: int,
    pin_memory: bool = False,
    on_bad: OnBad = "leave_out",
) -> DataLoader[Any]:
    """Build a loader over given batches, in their order.

    Args:
        source: the samples.
        batches: (index, draw) pairs of every batch; a batch sampler.
        workers: processes; 0 loads in this one.
        pin_memory: for faster copies to a GPU.
        on_bad: see :class:`Fetcher`.

    Returns:
        A loader that yields :data:`Loaded`; give each to :func:`require_loaded`.
    """
    return DataLoader(
        Fetcher(source, on_bad),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate_or_fail,
        pin_memory=pin_memory,
        worker_init_fn=init_worker if workers else None,
    )


def require_loaded(loaded: Loaded) -> Batch | SkippedBatch:
    """Return the batch, or raise the error that kept it from being loaded.

    Raises:
        BevError: what the loader process met.
    """
    if isinstance(loaded, Failure):
        raise loaded.error
    return loaded
