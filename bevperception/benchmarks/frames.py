"""Frames a second of trained models as a vehicle runs them, several in turns on the same machine."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch

from bevperception.benchmarks.streaming import random_drive, recorded_drive
from bevperception.checkpoints.weights import load_model, read_weights
from bevperception.config import ExperimentConfig
from bevperception.errors import ConfigError
from bevperception.inference import StreamingPredictor
from bevperception.models.precision import Precision
from bevperception.processes import program_name
from bevperception.ranges import Range, add_number
from bevperception.structures import CameraFrames

PRECISIONS = get_args(Precision)


@dataclass(frozen=True)
class Candidate:
    """One way to run one model.

    Attributes:
        name: of its row.
        predictor: streams through it.
    """

    name: str
    predictor: StreamingPredictor


@dataclass(frozen=True)
class FrameCost:
    """Duration of a frame, from the network's input to boxes and segmentation.

    Attributes:
        name: of the candidate.
        milliseconds: of every frame that counts.
    """

    name: str
    milliseconds: list[float]

    @property
    def median_ms(self) -> float:
        """Median over the frames."""
        return statistics.median(self.milliseconds)

    @property
    def p95_ms(self) -> float:
        """What 95 % of the frames do not exceed."""
        ordered = sorted(self.milliseconds)
        return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def measure(
    candidates: Sequence[Candidate], drives: Sequence[Sequence[CameraFrames]], warmup: int
) -> list[FrameCost]:
    """Drive with all candidates, frame by frame in turns, so that a busy machine is as bad for all.

    Args:
        candidates: with memories of their own.
        drives: each candidate's frames, equally many.
        warmup: first frames that do not count, in which memories fill.
    """
    spent: list[list[float]] = [[] for _ in candidates]
    for index, frames in enumerate(zip(*drives, strict=True)):
        for candidate, now, mine in zip(candidates, frames, spent, strict=True):
            begin = time.perf_counter()
            _perceive(candidate.predictor, now)
            if index >= warmup:
                mine.append(1e3 * (time.perf_counter() - begin))
    return [FrameCost(c.name, mine) for c, mine in zip(candidates, spent, strict=True)]


def _perceive(predictor: StreamingPredictor, frames: CameraFrames) -> None:
    """Compute boxes and segmentation of a frame that is already the network's input."""
    outputs = predictor.observe(frames, "drive")
    predictor.decode(outputs)
    if outputs.segmentation_logits is not None:
        outputs.segmentation_logits.float().sigmoid()


def format_costs(costs: Sequence[FrameCost]) -> str:
    """A table, one row a candidate; ratios are to the first."""
    width = max(len(cost.name) for cost in costs) + 2
    lines = [f"{'':<{width}}{'median, ms':>12}{'p95, ms':>10}{'frames/s':>10}{'ratio':>8}"]
    for cost in costs:
        median = cost.median_ms
        numbers = (
            f"{median:>12.1f}{cost.p95_ms:>10.1f}{1e3 / median:>10.1f}{median / costs[0].median_ms:>8.2f}"
        )
        lines.append(f"{cost.name:<{width}}{numbers}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The program ``tools/benchmark.py frames``.

    Args:
        argv: arguments after ``frames``; None takes the program's own.

    Raises:
        BevError: weights or the data set cannot be read, or a setting does not suffice.
    """
    options = _parser().parse_args(argv)
    names, precisions = options.weights.split(","), options.precision.split(",")
    unknown = [precision for precision in precisions if precision not in PRECISIONS]
    if unknown:
        raise ConfigError(f"--precision takes {', '.join(PRECISIONS)}, got {', '.join(unknown)}")
    torch.set_num_threads(options.threads)
    candidates, drives = [], []
    for name in names:
        weights = read_weights(name)
        config = _with_root(weights.config(), options.data_root)
        drive = recorded_drive if options.data_root else random_drive
        frames = drive(config, options.warmup + options.frames)
        if len(frames) <= options.warmup:
            raise ConfigError(f"the drive has {len(frames)} frames, no more than --warmup {options.warmup}")
        for precision in precisions:
            predictor = StreamingPredictor(
                load_model(weights, config), "cpu", precision, compiled=options.compiled
            )
            candidates.append(Candidate(f"{name}, {precision}", predictor))
            drives.append(frames)
    print(f"{options.threads} threads, {len(drives[0]) - options.warmup} frames", flush=True)
    print(format_costs(measure(candidates, drives, options.warmup)))
    return 0


def _with_root(config: ExperimentConfig, root: str | None) -> ExperimentConfig:
    return config if root is None else replace(config, data=replace(config.data, root=root))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{program_name('benchmark')} frames",
        description="Time from the network's input to boxes and segmentation, streaming, on the CPU.",
        epilog="example: bevperception benchmark frames --weights world_micro --precision 32-true,bf16-mixed",
    )
    parser.add_argument("--weights", required=True, help="files, folders or shipped names, comma-separated")
    parser.add_argument("--precision", default="32-true", help=f"of {', '.join(PRECISIONS)}, comma-separated")
    parser.add_argument("--data-root", help="frames of this data set's val_split instead of noise")
    add_number(
        parser,
        "--threads",
        int,
        Range(1, 1024),
        default=2,
        help="threads of PyTorch and of the operators (2)",
    )
    add_number(
        parser, "--frames", int, Range(1, 1_000_000), default=40, help="frames that count, two a second (40)"
    )
    add_number(
        parser,
        "--warmup",
        int,
        Range(0, 1_000_000),
        default=10,
        help="frames before them, which fill memories (10)",
    )
    parser.add_argument("--compiled", action="store_true", help="backbone and neck through torch.compile")
    return parser
