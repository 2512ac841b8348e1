"""How fast a data set is read, and what share of a training step is spent waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bevperception.config import ExperimentConfig
from bevperception.config_io import ConfigParser
from bevperception.data.dataset import build_dataset
from bevperception.data.image_input import ImageInput
from bevperception.data.loading import Failure, build_loader
from bevperception.data.nuscenes import NuScenesReader
from bevperception.errors import ConfigError
from bevperception.models.bevformer import BEVFormer
from bevperception.models.build import Model
from bevperception.processes import program_name
from bevperception.ranges import Range, add_number
from bevperception.structures import Batch, BEVMemory
from bevperception.training.experiment import build_model
from bevperception.training.module import in_single_precision, memory_from_history, normalised
from bevperception.training.sampler import RunShare, StepSampler


@dataclass(frozen=True)
class Reading:
    """Speed of a loader alone, and beside training.

    Args:
        workers: loader processes.
        samples_per_s: training samples a second when nothing else runs.
        step_s: seconds of a training step without the wait.
        wait_s: seconds that a step waits for its batch.
    """

    workers: int
    samples_per_s: float
    step_s: float
    wait_s: float

    @property
    def waiting_share(self) -> float:
        """Share of a training step that is spent waiting, 0 to 1."""
        return self.wait_s / (self.wait_s + self.step_s)


def measure(config: ExperimentConfig, workers: int, batches: int, steps: int) -> Reading:
    """Read batches, then train; the first batch of each, which starts the workers, does not count.

    Args:
        config: data, augmentation and model; samples are read as training reads them.
        workers: loader processes.
        batches: batches that are read without training.
        steps: training steps.

    Raises:
        DataError: the data set or a sample cannot be read.
    """
    seconds = [seconds for seconds, _ in _batches(config, workers, batches + 1)][1:]
    model = build_model(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    waits, works = [], []
    for wait, batch in _batches(config, workers, steps + 1):
        start = time.perf_counter()
        train_step(model, optimizer, batch, config)
        waits.append(wait)
        works.append(time.perf_counter() - start)
    return Reading(
        workers,
        batches * config.training.batch_size / sum(seconds),
        sum(works[1:]) / steps,
        sum(waits[1:]) / steps,
    )


def train_step(
    model: Model, optimizer: torch.optim.Optimizer, batch: Batch, config: ExperimentConfig
) -> None:
    """One step as training takes it: history, forward, losses, backward, update."""
    batch = normalised(batch, ImageInput(config.data))
    memory: BEVMemory | None = None
    if isinstance(model, BEVFormer) and batch.history:
        memory = memory_from_history(model, batch, config.model.temporal)
    outputs, _ = model(batch.frames, memory)
    assert batch.targets is not None
    losses = model.losses(in_single_precision(outputs), batch.targets, lambda x: x)
    optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()


def _batches(config: ExperimentConfig, workers: int, count: int) -> Iterator[tuple[float, Batch]]:
    """(seconds waited, batch) of so many training batches."""
    reader = NuScenesReader(config.data)
    source = build_dataset(reader, config, config.data.train_split, training=True)
    training = config.training
    sampler = StepSampler(len(source), RunShare(training.batch_size, steps=count, seed=training.seed))
    loader = iter(build_loader(source, sampler, workers, pin_memory=False))
    for _ in range(count):
        start = time.perf_counter()
        batch = next(loader)
        if isinstance(batch, Failure):
            raise batch.error
        assert isinstance(batch, Batch), "without replacement a bad sample stops the run"
        yield time.perf_counter() - start, batch


def main(argv: Sequence[str] | None = None) -> int:
    """The program ``tools/benchmark.py data``.

    Args:
        argv: arguments after ``data``; None takes the program's own.

    Raises:
        BevError: a setting or the data set does not suffice.
    """
    parser = ConfigParser(
        "Samples a second that training reads, and the share of a training step spent waiting for them.",
        f"{program_name('benchmark')} data",
    )
    parser.add_argument("--workers", type=str, default="0,2", help="loader processes, comma-separated")
    add_number(
        parser, "--batches", int, Range(1, 1_000_000), default=20, help="batches to read without training"
    )
    add_number(parser, "--steps", int, Range(1, 1_000_000), default=10, help="training steps")
    add_number(parser, "--threads", int, Range(1, 1024), default=2, help="threads of the training process")
    config, options = parser.parse_experiment(argv)
    try:
        workers = [int(part) for part in options.workers.split(",")]
    except ValueError:
        raise ConfigError(f"--workers must be numbers such as 0,2, got {options.workers!r}") from None
    torch.set_num_threads(options.threads)
    height, width = config.data.image_size
    print(
        f"{config.data.root} ({config.data.version}, {config.data.train_split}): {len(config.data.cameras)} "
        f"cameras to {height} x {width}, queues of {config.data.history + 1} frames, "
        f"batches of {config.training.batch_size}, {options.threads} threads"
    )
    print(f"{'workers':>8}{'samples/s':>12}{'step, ms':>12}{'wait, ms':>12}{'waiting':>10}", flush=True)
    for count in workers:
        r = measure(config, count, options.batches, options.steps)
        print(
            f"{count:>8}{r.samples_per_s:>12.1f}{1e3 * r.step_s:>12.1f}{1e3 * r.wait_s:>12.1f}"
            f"{100 * r.waiting_share:>9.1f}%",
            flush=True,
        )
    return 0
