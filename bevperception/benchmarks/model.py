"""What a model costs: parameters by part, time per stage and peak memory, with either operator backend."""

from __future__ import annotations

import math
import multiprocessing
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bevperception.can_bus import CAN_BUS_SIZE
from bevperception.config import ExperimentConfig
from bevperception.config_io import ConfigParser
from bevperception.config_model import ModelConfig
from bevperception.data.dataset import NuScenesDataset
from bevperception.data.nuscenes import NuScenesReader
from bevperception.errors import BevError, ConfigError
from bevperception.malloc import keep_freed_memory
from bevperception.models.bevformer import BEVFormer
from bevperception.ops import backend_report, use_backend
from bevperception.ops.backend import HOW_TO_BUILD
from bevperception.structures import BEVMemory, CameraFrames

BackendName = Literal["native", "reference"]

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
TRANSFORMER = ("encoder", "decoder")
REST, TOTAL = "rest", "total"
_INTERVAL_S = 0.5
"""Between key frames."""


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


def random_frames(config: ExperimentConfig, seed: int = 0) -> CameraFrames:
    """Noise seen by a ring of level cameras with nuScenes' field of view, for one vehicle.

    Args:
        config: number of cameras and image size.
        seed: of the noise.

    Returns:
        one frame; the car stands at the origin of the global frame.
    """
    height, width = config.data.image_size
    cameras = len(config.data.cameras)
    focal = 0.79 * width  # nuScenes: 1266 of 1600 pixels
    intrinsics = torch.tensor(
        [[focal, 0, width / 2, 0], [0, focal, height / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
        dtype=torch.float64,
    )
    projections = [
        intrinsics @ _ring_camera(2 * math.pi * index / cameras, height_m=1.5) for index in range(cameras)
    ]
    generator = torch.Generator().manual_seed(seed)
    return CameraFrames(
        images=torch.randn(1, cameras, 3, height, width, generator=generator),
        bev_to_image=torch.stack(projections)[None].float(),
        bev_to_global=torch.eye(4, dtype=torch.float64)[None],
        timestamps_s=torch.zeros(1, dtype=torch.float64),
    )


def _ring_camera(yaw_rad: float, height_m: float) -> Tensor:
    """(4, 4) ego to a camera that looks along a yaw from above the ego's origin."""
    c, s = math.cos(yaw_rad), math.sin(yaw_rad)
    return torch.tensor(
        [[s, -c, 0, 0], [0, 0, -1, height_m], [c, s, 0, 0], [0, 0, 0, 1]], dtype=torch.float64
    )


def data_frames(config: ExperimentConfig) -> CameraFrames:
    """The first sample of the validation split.

    Raises:
        DataError: the data set or the sample cannot be read.
    """
    return NuScenesDataset(NuScenesReader(config.data), config.data.val_split, config.data).load(0).frames


def load_frames(config: ExperimentConfig, source: str) -> CameraFrames:
    """Input for the model.

    Args:
        config: of the experiment.
        source: 'random' or 'data'.
    """
    frames = data_frames(config) if source == "data" else random_frames(config)
    if frames.can_bus is None and uses_can_bus(config.model):
        frames.can_bus = torch.zeros(frames.batch_size, CAN_BUS_SIZE, dtype=torch.float64)
    return frames


def uses_can_bus(config: ModelConfig) -> bool:
    """Whether a model needs the CAN-bus vector."""
    return config.bev.can_bus or config.bev.alignment == "published"


def build_model(config: ModelConfig) -> BEVFormer:
    """The model with random weights from a fixed seed, ready to predict."""
    torch.manual_seed(0)
    return BEVFormer(config).eval()


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


def time_stages(
    model: BEVFormer, frames: CameraFrames, backends: Sequence[BackendName], warmup: int, repeats: int
) -> dict[BackendName, dict[str, float]]:
    """Median seconds per stage of a frame with as much memory as the model uses.

    The backends take turns, so that a busy machine is as bad for one as for the other.

    Args:
        model: in evaluation mode.
        frames: input.
        backends: what to compare.
        warmup: forwards with each backend that do not count.
        repeats: forwards that do.
    """
    clock = StageClock(model)
    rounds: dict[BackendName, list[dict[str, float]]] = {backend: [] for backend in backends}
    with torch.inference_mode():
        with use_backend(backends[0]):
            frames, memory = with_memory(model, frames)
        for index in range(warmup + repeats):
            for backend in backends:
                with use_backend(backend):
                    seconds = clock.time(lambda: model(frames, memory))
                if index >= warmup:
                    rounds[backend].append(seconds)
    return {
        backend: {stage: statistics.median(r[stage] for r in found) for stage in found[0]}
        for backend, found in rounds.items()
    }


def with_memory(model: BEVFormer, frames: CameraFrames) -> tuple[CameraFrames, BEVMemory]:
    """A frame as it is seen after all the earlier ones that it is made with, and the memory of them.

    Args:
        model: remembers.
        frames: what is seen every time.
    """
    temporal = model.config.temporal
    memory: BEVMemory | None = None
    for _ in range(max(1, temporal.needed)):
        _, memory = model(frames, memory)
        stamps_s = frames.timestamps_s + (temporal.interval_s or _INTERVAL_S)
        frames = replace(frames, timestamps_s=stamps_s)
    assert memory is not None
    return frames, memory


def measure_memory(
    config: ExperimentConfig, source: str, backend: BackendName, threads: int, *, keep: bool
) -> Memory:
    """Peak memory of forwards with more and more memory in a process of its own.

    Args:
        config: of the experiment.
        source: 'random' or 'data'.
        backend: that it runs with.
        threads: of PyTorch.
        keep: what is freed, see :func:`~bevperception.malloc.keep_freed_memory`.

    Raises:
        BevError: the process died, most likely because memory ran out.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(_run_for_memory, config, source, backend, threads, keep).result()
        except BrokenProcessPool:
            raise BevError(
                f"the process that measures the {backend} backend's memory was killed: "
                "most likely this machine has too little memory for the configuration"
            ) from None


def _run_for_memory(
    config: ExperimentConfig, source: str, backend: BackendName, threads: int, keep: bool
) -> Memory:
    if keep:
        keep_freed_memory()
    torch.set_num_threads(threads)
    model, frames = build_model(config.model), load_frames(config, source)
    before = peak_resident_bytes()
    with torch.inference_mode(), use_backend(backend):
        model(*with_memory(model, frames))
    return Memory(before, peak_resident_bytes())


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


def main(argv: Sequence[str] | None = None) -> int:
    """The program ``tools/benchmark.py model``.

    Args:
        argv: arguments after ``model``; None takes the program's own.

    Raises:
        BevError: a setting, the data set or the memory of the machine does not suffice.
    """
    parser = ConfigParser(
        "Parameters, time per stage and peak memory of a model.", "tools/benchmark.py model"
    )
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
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch and of the operators")
    parser.add_argument("--warmup", type=int, default=1, help="forwards with each backend that do not count")
    parser.add_argument("--repeats", type=int, default=5, help="forwards whose median counts")
    parser.add_argument(
        "--freed-memory",
        choices=("keep", "return"),
        default="keep",
        help="keep it for the next tensors, as this project's programs do on CPUs, or return it to the "
        "system, as the C library does by itself",
    )
    config, options = parser.parse_experiment(argv)
    if min(options.threads, options.repeats) < 1 or options.warmup < 0:
        raise ConfigError("--threads and --repeats must be at least 1, --warmup at least 0")
    backends = chosen_backends(options.backend)
    keep = options.freed_memory == "keep" and keep_freed_memory()
    torch.set_num_threads(options.threads)
    height, width = config.data.image_size
    print(
        f"{options.config}: {len(config.data.cameras)} cameras of {height} x {width}, "
        f"BEV {config.model.bev.rows} x {config.model.bev.columns}, float32, "
        f"{options.threads} threads, {options.images} images, freed memory {'kept' if keep else 'returned'}"
    )
    memory = {b: measure_memory(config, options.images, b, options.threads, keep=keep) for b in backends}
    model = build_model(config.model)
    print("parameters", format_parameters(count_parameters(model)), sep="\n", flush=True)
    frames = load_frames(config, options.images)
    seconds = time_stages(model, frames, backends, options.warmup, options.repeats)
    print(f"one frame, median of {options.repeats}", format_costs(seconds, memory), sep="\n")
    return 0
