"""Cost of history: features kept and warped against everything computed anew at every frame."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bevperception.benchmarks.model_input import build_model, random_frames
from bevperception.config import ExperimentConfig
from bevperception.config_io import ConfigParser
from bevperception.data.dataset import NuScenesDataset, without_queue
from bevperception.data.nuscenes import NuScenesReader
from bevperception.errors import ConfigError
from bevperception.geometry import planar_pose
from bevperception.models.bevformer import BEVFormer
from bevperception.processes import program_name
from bevperception.ranges import Range, add_number
from bevperception.structures import BEVMemory, CameraFrames, ModelOutputs

_STEP_S, _STEP_M, _STEP_RAD = 0.5, 3.0, 0.03


@dataclass(frozen=True)
class StreamingCost:
    """Cost of one frame with a full history.

    Args:
        past: frames of history.
        streaming_s: seconds a frame with features kept, median.
        recomputing_s: seconds a frame with all of them made anew, median; None where not measured.
        difference: largest difference between the two's outputs over the whole drive, as a share of the
            largest magnitude of each output; None where not compared.
    """

    past: int
    streaming_s: float
    recomputing_s: float | None
    difference: float | None


def random_drive(config: ExperimentConfig, count: int) -> list[CameraFrames]:
    """Noise seen from a car that drives a gentle curve, two frames a second.

    Args:
        config: number of cameras and image size.
        count: frames.
    """
    frames, pose = [], torch.eye(4, dtype=torch.float64)
    for index in range(count):
        still = random_frames(config, seed=index)
        stamp = torch.full((1,), index * _STEP_S, dtype=torch.float64)
        frames.append(replace(still, bev_to_global=pose[None].clone(), timestamps_s=stamp))
        pose = pose @ planar_pose(_STEP_M, 0.0, _STEP_RAD)
    return frames


def recorded_drive(config: ExperimentConfig, count: int) -> list[CameraFrames]:
    """The first key frames of the validation split's first scene.

    Args:
        config: of the experiment.
        count: frames, or all there are.

    Raises:
        DataError: the data set or a sample cannot be read.
    """
    dataset = NuScenesDataset(NuScenesReader(config.data), config.data.val_split, without_queue(config.data))
    length = len(dataset.scenes[0].sample_tokens)
    return [dataset.load(index).frames for index in range(min(count, length))]


def with_history(config: ExperimentConfig, past: int) -> BEVFormer:
    """The model of a configuration with so many past frames, random weights whose fusion matters.

    Args:
        config: of the experiment; its model fuses frames.
        past: frames of history.
    """
    model = build_model(replace(config.model, temporal=replace(config.model.temporal, past=past)))
    assert model.fusion is not None
    with torch.no_grad():
        torch.nn.init.normal_(model.fusion.projection.weight, std=0.05)
    return model


def recompute(model: BEVFormer, history: Sequence[CameraFrames], frames: CameraFrames) -> ModelOutputs:
    """Outputs of a frame with the whole history made anew.

    Args:
        model: fuses as many past frames as ``history`` holds, or more.
        history: oldest first.
        frames: the current frame.
    """
    memory: BEVMemory | None = None
    for earlier in history:
        bev = model.encode(model.image_features(earlier), earlier, None)
        memory = model.temporal.remember(bev, earlier, memory)
    outputs: ModelOutputs = model(frames, memory)[0]
    return outputs


def relative_difference(one: ModelOutputs, other: ModelOutputs) -> float:
    """Largest difference between two outputs, each tensor's relative to its largest magnitude."""
    worst = 0.0
    for name in ("bev", "segmentation_logits"):
        worst = max(worst, _difference(getattr(one, name), getattr(other, name)))
    if one.detection is not None and other.detection is not None:
        for name in ("class_logits", "box_codes"):
            worst = max(worst, _difference(getattr(one.detection, name), getattr(other.detection, name)))
    return worst


def _difference(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        return 0.0
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))


def measure(
    config: ExperimentConfig, frames: Sequence[CameraFrames], pasts: Sequence[int], recomputing: bool
) -> list[StreamingCost]:
    """Drive once with every length of history, frame by frame in turns, so that all meet the same machine.

    Args:
        config: of the experiment.
        frames: of the drive; times count from the frame on at which the longest history is full.
        pasts: lengths of history.
        recomputing: also make everything anew at every frame, and compare.
    """
    models = {past: with_history(config, past) for past in pasts}
    memories: dict[int, BEVMemory | None] = dict.fromkeys(pasts)
    streaming: dict[int, list[float]] = {past: [] for past in pasts}
    anew: dict[int, list[float]] = {past: [] for past in pasts}
    differences = dict.fromkeys(pasts, 0.0)
    with torch.inference_mode():
        for index, now in enumerate(frames):
            for past, model in models.items():
                start = time.perf_counter()
                streamed, memories[past] = model(now, memories[past])
                spent = time.perf_counter() - start
                if index >= max(pasts):
                    streaming[past].append(spent)
                if not recomputing:
                    continue
                start = time.perf_counter()
                again = recompute(model, frames[max(0, index - past) : index], now)
                if index >= max(pasts):
                    anew[past].append(time.perf_counter() - start)
                differences[past] = max(differences[past], relative_difference(streamed, again))
    return [
        StreamingCost(
            past,
            statistics.median(streaming[past]),
            statistics.median(anew[past]) if recomputing else None,
            differences[past] if recomputing else None,
        )
        for past in pasts
    ]


def format_costs(costs: Sequence[StreamingCost]) -> str:
    """A table: a row a length of history, ratios to the first row's."""
    first = costs[0]
    headings = [("history", 9), ("streaming, ms", 16), ("ratio", 8)]
    if first.recomputing_s is not None:
        headings += [("recomputing, ms", 18), ("ratio", 8), ("difference", 13)]
    lines = ["".join(f"{name:>{width}}" for name, width in headings)]
    for cost in costs:
        line = f"  {cost.past:>7}{1e3 * cost.streaming_s:>16.1f}{cost.streaming_s / first.streaming_s:>8.2f}"
        if cost.recomputing_s is not None and first.recomputing_s is not None:
            line += f"{1e3 * cost.recomputing_s:>18.1f}{cost.recomputing_s / first.recomputing_s:>8.2f}"
            line += f"{cost.difference:>13.1e}"
        lines.append(line)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The program ``tools/benchmark.py streaming``.

    Args:
        argv: arguments after ``streaming``; None takes the program's own.

    Raises:
        BevError: a setting or the data set does not suffice.
    """
    parser = ConfigParser("Time per frame by length of history.", f"{program_name('benchmark')} streaming")
    parser.add_argument("--history", type=str, default="1,8", help="numbers of past frames, comma-separated")
    add_number(parser, "--frames", int, Range(1, 1_000_000), default=20, help="frames of the drive")
    parser.add_argument(
        "--images",
        choices=("random", "data"),
        default="random",
        help="noise, or data.val_split's first scene",
    )
    add_number(
        parser, "--threads", int, Range(1, 1024), default=2, help="threads of PyTorch and of the operators"
    )
    parser.add_argument(
        "--recompute",
        choices=("yes", "no"),
        default="yes",
        help="also make the whole history anew, and compare",
    )
    config, options = parser.parse_experiment(argv)
    pasts = _lengths(options)
    if config.model.temporal.recurrent or config.model.perspective.only:
        raise ConfigError("this measures models that fuse frames: set model.temporal.mode=fusion")
    torch.set_num_threads(options.threads)
    drive = recorded_drive if options.images == "data" else random_drive
    frames = drive(config, options.frames)
    if len(frames) <= max(pasts):
        raise ConfigError(f"a drive of {len(frames)} frames never fills a history of {max(pasts)}")
    print(
        f"{' '.join(options.config)}: {len(frames)} frames, {len(config.data.cameras)} cameras of "
        f"{config.data.image_size[0]} x {config.data.image_size[1]}, {options.threads} threads",
        flush=True,
    )
    print(format_costs(measure(config, frames, pasts, options.recompute == "yes")))
    return 0


def _lengths(options: Any) -> list[int]:
    try:
        lengths = [int(part) for part in options.history.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1 or options.frames < 1 or options.threads < 1:
        raise ConfigError("--history needs positive numbers like 1,8; --frames and --threads at least 1")
    return lengths
