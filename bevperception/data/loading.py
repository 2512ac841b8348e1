"""Loading in worker processes: an unreadable sample stops the run with its own message, or is replaced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset

from bevperception.data.dataset import SkippedBatch, collate, init_worker
from bevperception.errors import BevError, DataError
from bevperception.structures import BadSample, Batch

MAX_REPLACEMENTS = 20
"""So many samples in a row may be unreadable before a run stops, bad samples skipped or not."""


class SampleSource(Protocol):
    """What loading asks of a data set; :class:`bevperception.data.dataset.NuScenesDataset` is one."""

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
"""What a loader yields."""


class Fetcher(Dataset[Any]):
    """Fetches whole batches from a source.

    Args:
        source: the samples.
        replace: put the next readable sample of the source in the place of a bad one, so that every
            process's batch is full; the bad ones stay as records.
    """

    def __init__(self, source: SampleSource, replace: bool) -> None:
        self.source, self.replace = source, replace

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> Batch | BadSample | Failure:
        """One sample, bad or not."""
        try:
            return self.source[item]
        except BevError as error:
            return Failure(error)

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list[Batch | BadSample | Failure]:
        """A batch's samples, and the records of the bad ones that others took the place of."""
        found: list[Batch | BadSample | Failure] = []
        for item in items:
            found.extend(self._with_replacement(item) if self.replace else [self[item]])
        return found

    def _with_replacement(self, item: tuple[int, int]) -> list[Batch | BadSample | Failure]:
        index, draw = item
        found: list[Batch | BadSample | Failure] = []
        for step in range(MAX_REPLACEMENTS):
            found.append(self[(index + step) % len(self.source), draw])
            if not isinstance(found[-1], BadSample):
                return found
        last = found[-1]
        assert isinstance(last, BadSample)
        error = DataError(f"{MAX_REPLACEMENTS} samples in a row cannot be read; the last: {last.reason}")
        return [Failure(error)]


def collate_or_fail(samples: Sequence[Batch | BadSample | Failure]) -> Loaded:
    """:func:`~bevperception.data.dataset.collate`, but the first failure wins."""
    good: list[Batch | BadSample] = []
    for sample in samples:
        if isinstance(sample, Failure):
            return sample
        good.append(sample)
    return collate(good)


def build_loader(
    source: SampleSource,
    batches: Iterable[list[tuple[int, int]]],
    workers: int,
    pin_memory: bool = False,
    replace: bool = False,
) -> DataLoader[Any]:
    """A loader over given batches, in their order.

    Args:
        source: the samples.
        batches: (index, draw) pairs of every batch; a batch sampler.
        workers: processes; 0 loads in this one.
        pin_memory: for faster copies to a GPU.
        replace: see :class:`Fetcher`.

    Returns:
        A loader that yields :data:`Loaded`; give each to :func:`require_loaded`.
    """
    return DataLoader(
        Fetcher(source, replace),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate_or_fail,
        pin_memory=pin_memory,
        worker_init_fn=init_worker if workers else None,
    )


def require_loaded(loaded: Loaded) -> Batch | SkippedBatch:
    """The batch, or the error that kept it from being loaded.

    Raises:
        BevError: what the loader process met.
    """
    if isinstance(loaded, Failure):
        raise loaded.error
    return loaded
