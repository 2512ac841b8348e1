"""A process that runs one model with one backend: memory and the C library's settings are a process' own."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from bevperception.benchmarks.model_input import FrameSource, build_model, load_frames, with_memory
from bevperception.config import ExperimentConfig
from bevperception.errors import BevError
from bevperception.malloc import keep_freed_memory
from bevperception.models.bevformer import BEVFormer
from bevperception.ops import set_backend
from bevperception.processes import WorkerPool
from bevperception.structures import BEVMemory, CameraFrames

BackendName = Literal["native", "reference"]
_Answer = TypeVar("_Answer")

STAGES = {
    "backbone": "backbone",
    "neck": "neck",
    "perspective head": "perspective",
    "encoder": "bev_transformer",
    "fusion": "fusion",
    "decoder": "detection.decoder",
    "detection head": "detection",
    "segmentation head": "segmentation",
}
"""Printed name to the model's submodule; a stage within another does not count for that one."""
REST, TOTAL = "rest", "total"


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process that does nothing but one model's forwards.

    Args:
        before: bytes with the model and its input in place.
        peak: most bytes up to the end of the forwards.
    """

    before: int
    peak: int


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of every direct part of a model, in its order, and ``total``."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    return {name: count for name, count in counts.items() if count} | {
        TOTAL: sum(p.numel() for p in model.parameters())
    }


class StageClock:
    """Adds up the time spent in a model's stages while it is open.

    Args:
        model: a BEVFormer.

    Attributes:
        seconds: by stage; ``total`` and ``rest`` are added by :meth:`time`.
    """

    def __init__(self, model: BEVFormer) -> None:
        self.seconds: dict[str, float] = {}
        self._model = model

    def time(self, forward: Callable[[], Any]) -> dict[str, float]:
        """Run a forward and return its seconds by stage, with ``rest`` and ``total``."""
        self.seconds = {}
        handles = [
            handle
            for stage, name in STAGES.items()
            if (part := self._part(name)) is not None
            for handle in self._watch(stage, part)
        ]
        start = time.perf_counter()
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()
        total = time.perf_counter() - start
        found = {stage: self.seconds[stage] for stage in STAGES if stage in self.seconds}
        return {**found, REST: total - sum(found.values()), TOTAL: total}

    def _part(self, name: str) -> nn.Module | None:
        """A submodule, or None if the model does without."""
        part: nn.Module | None = self._model
        for step in name.split("."):
            part = getattr(part, step, None)
        return part

    def _watch(self, stage: str, part: nn.Module) -> list[Any]:
        within = [other for other, name in STAGES.items() if STAGES[stage].startswith(f"{name}.")]

        def add(seconds: float) -> None:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
            for other in within:
                self.seconds[other] = self.seconds.get(other, 0.0) - seconds

        def enter(*_: object) -> None:
            add(-time.perf_counter())

        def leave(*_: object) -> None:
            add(time.perf_counter())

        return [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]


def peak_resident_bytes() -> int:
    """Most memory that this process has had at once."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux: getrusage would start at the parent's peak, which exec does not reset.
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"), re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Setting:
    """How a process runs a model.

    Args:
        backend: of the operators.
        threads: of PyTorch and of the operators.
        keep_memory: what is freed, see :func:`~bevperception.malloc.keep_freed_memory`.
    """

    backend: BackendName
    threads: int
    keep_memory: bool


class ModelProcess:
    """A process with a model, its input and the memory of earlier frames in place.

    Args:
        config: of the experiment.
        source: of the frames, see :func:`load_frames`.
        setting: how to run.

    Raises:
        BevError: the process died, most likely because memory ran out, or the data cannot be read.
    """

    def __init__(self, config: ExperimentConfig, source: FrameSource, setting: Setting) -> None:
        self._backend = setting.backend
        self._pool = WorkerPool(1)
        try:
            self._ask(_start, config, source, setting)
        except BaseException:
            self._pool.end_now()
            raise

    def __enter__(self) -> ModelProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.__exit__(kind, value, trace)

    def parameters(self) -> dict[str, int]:
        """See :func:`count_parameters`."""
        return self._ask(_parameters)

    def time_frame(self) -> dict[str, float]:
        """Seconds of one forward by stage, see :meth:`StageClock.time`."""
        return self._ask(_time_frame)

    def memory(self) -> Memory:
        """Of the process, up to now."""
        return self._ask(_memory)

    def _ask(self, function: Callable[..., _Answer], *arguments: object) -> _Answer:
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise BevError(
                f"the process that measures the {self._backend} backend was killed: "
                "most likely this machine has too little memory for the configuration"
            ) from None


@dataclass(frozen=True)
class _Running:
    """State of a benchmark process."""

    model: BEVFormer
    frames: CameraFrames
    memory: BEVMemory
    bytes_before: int


_running: list[_Running] = []
"""In the process of a :class:`ModelProcess`: one entry."""


def _start(config: ExperimentConfig, source: FrameSource, setting: Setting) -> None:
    if setting.keep_memory:
        keep_freed_memory()
    torch.set_num_threads(setting.threads)
    set_backend(setting.backend)
    model, frames = build_model(config.model), load_frames(config, source)
    before = peak_resident_bytes()
    with torch.inference_mode():
        _running.append(_Running(model, *with_memory(model, frames), before))


def _parameters() -> dict[str, int]:
    return count_parameters(_running[0].model)


def _time_frame() -> dict[str, float]:
    running = _running[0]
    with torch.inference_mode():
        return StageClock(running.model).time(lambda: running.model(running.frames, running.memory))


def _memory() -> Memory:
    return Memory(_running[0].bytes_before, peak_resident_bytes())
