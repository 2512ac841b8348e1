"""Cost of a model: parameters by part, time per stage and peak memory, with either operator backend."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

from bevperception.benchmarks.model_input import FrameSource
from bevperception.benchmarks.model_process import (
    BackendName,
    Memory,
    ModelProcess,
    Setting,
)
from bevperception.config import ExperimentConfig
from bevperception.config_io import ConfigParser
from bevperception.errors import ConfigError
from bevperception.ops import backend_report
from bevperception.ops.backend import HOW_TO_BUILD
from bevperception.processes import program_name
from bevperception.ranges import Range, add_number

FreedMemory = Literal["auto", "keep", "return"]
TRANSFORMER = ("encoder", "decoder")
"""Stages whose sum is shown too."""

DESCRIPTION = """\
Parameters, time per stage and peak memory of a model. Each backend runs in a process of its own; they take
turns, so that a busy machine is as bad for one as for the other."""


def time_stages(
    processes: dict[BackendName, ModelProcess], warmup: int, repeats: int
) -> dict[BackendName, dict[str, float]]:
    """Median seconds per stage of a frame with as much memory as the model uses.

    Args:
        processes: what to compare.
        warmup: forwards of each that do not count.
        repeats: forwards that do.
    """
    rounds: dict[BackendName, list[dict[str, float]]] = {backend: [] for backend in processes}
    for index in range(warmup + repeats):
        for backend, process in processes.items():
            seconds = process.time_frame()
            if index >= warmup:
                rounds[backend].append(seconds)
    return {
        backend: {stage: statistics.median(r[stage] for r in found) for stage in found[0]}
        for backend, found in rounds.items()
    }


def format_parameters(counts: dict[str, int]) -> str:
    """Parameter counts as lines."""
    return "\n".join(f"  {name:<20}{count / 1e6:>12.3f} M" for name, count in counts.items())


def format_costs(seconds: dict[BackendName, dict[str, float]], memory: dict[BackendName, Memory]) -> str:
    """Times and memory as a table: a column per backend and, with two, the second's over the first's.

    Args:
        seconds: by backend and stage, of :func:`time_stages`.
        memory: by backend.
    """
    rows = {f"{stage}, ms": [1e3 * by[stage] for by in seconds.values()] for stage in _common(seconds)}
    if all(stage in _common(seconds) for stage in TRANSFORMER):
        together = [1e3 * sum(by[stage] for stage in TRANSFORMER) for by in seconds.values()]
        rows[f"{' + '.join(TRANSFORMER)}, ms"] = together
    rows["peak memory, MB"] = [memory[backend].peak / 1e6 for backend in seconds]
    rows["of it before the forward, MB"] = [memory[backend].before / 1e6 for backend in seconds]
    compare = len(seconds) == 2
    heading = [*seconds, *(["ratio"] if compare else [])]
    lines = [f"  {'':<30}" + "".join(f"{name:>14}" for name in heading)]
    for name, values in rows.items():
        ratio = f"{values[1] / values[0]:>14.2f}" if compare else ""
        lines.append(f"  {name:<30}" + "".join(f"{value:>14.1f}" for value in values) + ratio)
    return "\n".join(lines)


def _common(seconds: dict[BackendName, dict[str, float]]) -> list[str]:
    """Stages in the order they run; all backends have the same."""
    return list(next(iter(seconds.values())))


def chosen_backends(choice: str) -> tuple[BackendName, ...]:
    """Backends to measure.

    Args:
        choice: 'native', 'reference', 'both', or 'auto': both where native is built.

    Raises:
        ConfigError: native is asked for and not built.
    """
    if choice == "reference":
        return ("reference",)
    problem = backend_report().problem
    if problem is None:
        return ("native",) if choice == "native" else ("native", "reference")
    if choice == "auto":
        return ("reference",)
    raise ConfigError(
        f"--backend {choice}: {problem}\nto build them {HOW_TO_BUILD}; or use --backend reference"
    )


def keeps_memory(choice: FreedMemory, backend: BackendName) -> bool:
    """Whether a backend's process keeps what it frees.

    Args:
        choice: for both backends alike, or 'auto': as each is used, see ``--help``.
        backend: of the process.
    """
    return choice == "keep" or (choice == "auto" and backend == "native")


def main(argv: Sequence[str] | None = None) -> int:
    """The program ``tools/benchmark.py model``.

    Args:
        argv: arguments after ``model``; None takes the program's own.

    Raises:
        BevError: a setting, the data set or the memory of the machine does not suffice.
    """
    parser = ConfigParser(DESCRIPTION, f"{program_name('benchmark')} model")
    parser.add_argument(
        "--backend",
        choices=("auto", "native", "reference", "both"),
        default="auto",
        help="operators to measure; auto: both where the native ones are built",
    )
    parser.add_argument(
        "--images",
        choices=("random", "data"),
        default="random",
        help="noise from a ring of cameras, or the first sample of data.val_split",
    )
    parser.add_argument(
        "--freed-memory",
        choices=("auto", "keep", "return"),
        default="auto",
        help="keep it for the next tensors, as evaluate, predict and visualize do on CPUs, or return it to "
        "the system, as the C library does by itself and so the published code; auto: native keeps, the "
        "reference returns",
    )
    add_number(
        parser, "--threads", int, Range(1, 1024), default=2, help="threads of PyTorch and of the operators"
    )
    add_number(
        parser,
        "--warmup",
        int,
        Range(0, 1_000_000),
        default=1,
        help="forwards with each backend that do not count",
    )
    add_number(parser, "--repeats", int, Range(1, 1_000_000), default=5, help="forwards whose median counts")
    config, options = parser.parse_experiment(argv)
    settings = [
        Setting(backend, options.threads, keeps_memory(options.freed_memory, backend))
        for backend in chosen_backends(options.backend)
    ]
    height, width = config.data.image_size
    print(
        f"{' '.join(options.config)}: {len(config.data.cameras)} cameras of {height} x {width}, "
        f"BEV {config.model.bev.rows} x {config.model.bev.columns}, float32, "
        f"{options.threads} threads, {options.images} images"
    )
    print(_costs(config, options.images, settings, options.warmup, options.repeats))
    return 0


def _costs(
    config: ExperimentConfig, source: FrameSource, settings: Sequence[Setting], warmup: int, repeats: int
) -> str:
    """Everything that is measured, as text."""
    with ExitStack() as stack:
        processes = {s.backend: stack.enter_context(ModelProcess(config, source, s)) for s in settings}
        counts = next(iter(processes.values())).parameters()
        seconds = time_stages(processes, warmup, repeats)
        memory = {backend: process.memory() for backend, process in processes.items()}
    freed = ", ".join(f"{s.backend} {'keeps' if s.keep_memory else 'returns'}" for s in settings)
    return "\n".join(
        (
            "parameters",
            format_parameters(counts),
            f"one frame, median of {repeats}; freed memory: {freed}",
            format_costs(seconds, memory),
        )
    )
