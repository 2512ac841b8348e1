"""Cost of a lost camera: NDS without each camera in turn, beside the share of objects only it sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bevperception.benchmarks.trained import detect, load_trained, parse_trained
from bevperception.data.dataset import NuScenesDataset
from bevperception.data.nuscenes import NuScenesReader
from bevperception.errors import ConfigError
from bevperception.evaluation.detection import class_ranges_m
from bevperception.evaluation.runner import SplitEvaluator
from bevperception.files import output_folder
from bevperception.geometry import MIN_DEPTH_M, box_corners, project_points
from bevperception.structures import BEVMemory, Boxes3D, CameraFrames, ModelOutputs

ALLOWED_FALL = 0.02
"""NDS that may be lost beyond the share of objects that only the lost camera sees."""


@dataclass(frozen=True)
class LostCamera:
    """Result without one camera.

    Attributes:
        channel: the camera that was lost; None for all there.
        nds: NuScenes detection score.
        mean_ap: mAP.
        only_share: share of the objects that no other camera sees.
    """

    channel: str | None
    nds: float
    mean_ap: float
    only_share: float


class WithoutCamera(nn.Module):
    """A model to which one camera is missing in every frame, masked as a vehicle masks it.

    Args:
        model: a BEVFormer.
        camera: its place among the cameras; None for none.
    """

    def __init__(self, model: nn.Module, camera: int | None) -> None:
        super().__init__()
        self.model, self.camera = model, camera

    def forward(
        self, frames: CameraFrames, memory: BEVMemory | None = None
    ) -> tuple[ModelOutputs, BEVMemory]:
        """The model's outputs and memory."""
        if self.camera is not None:
            mask = frames.camera_mask
            mask = frames.images.new_ones(frames.images.shape[:2], dtype=torch.bool) if mask is None else mask
            mask = mask.clone()
            mask[:, self.camera] = False
            frames = replace(frames, camera_mask=mask)
        found: tuple[ModelOutputs, BEVMemory] = self.model(frames, memory)
        return found

    def decode(self, outputs: ModelOutputs) -> list[Boxes3D]:
        """The model's boxes."""
        model: Any = self.model
        boxes: list[Boxes3D] = model.decode(outputs)
        return boxes


def seen_by(boxes: Tensor, bev_to_image: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Which cameras see some corner or the centre of a box.

    Args:
        boxes: (n, 7 or more) BEV frame.
        bev_to_image: (N, 4, 4).
        image_size: (height, width) in pixels.

    Returns:
        (n, N) bool.
    """
    points = torch.cat((box_corners(boxes), boxes[:, None, :3]), dim=1)  # n 9 3
    pixels, depth = project_points(points.flatten(0, 1).to(bev_to_image), bev_to_image)
    size = pixels.new_tensor([image_size[1], image_size[0]])
    inside = ((pixels > 0) & (pixels < size)).all(-1) & (depth > MIN_DEPTH_M)
    seen: Tensor = inside.unflatten(1, points.shape[:2]).any(-1).T
    return seen


def only_shares(dataset: NuScenesDataset, cameras: int) -> list[float]:
    """For every camera, the share of a split's objects that no other camera sees.

    Counted are objects of the detection classes within the devkit's range for their class.

    Args:
        dataset: samples with boxes.
        cameras: number of cameras.
    """
    reach = torch.tensor(class_ranges_m())
    only, total = torch.zeros(cameras), 0
    for index in range(len(dataset)):
        sample = dataset.load(index)
        assert sample.targets is not None
        boxes = sample.targets.boxes[0]
        near = boxes.values[:, :2].norm(dim=-1) < reach[boxes.labels]
        frames = sample.frames
        height, width = frames.images.shape[-2:]
        seen = seen_by(boxes.values[near].float(), frames.bev_to_image[0].float(), (height, width))
        only += seen[seen.sum(1) == 1].sum(0)
        total += int(near.sum())
    return (only / max(total, 1)).tolist()


def measure(evaluator: SplitEvaluator, model: nn.Module, device: torch.device, out: Path) -> list[LostCamera]:
    """Evaluate with all cameras and without each.

    Args:
        evaluator: of the split.
        model: a BEVFormer.
        device: where it runs.
        out: folder for the submissions and metrics, one below it for every row.

    Raises:
        ConfigError: the model has no detection head, or only one camera.
    """
    channels: list[str | None] = [None, *evaluator.config.data.cameras]
    if len(channels) < 3 or not evaluator.config.model.detection.enabled:
        raise ConfigError("losing a camera is measured on a detection model with two cameras or more")
    shares = [0.0, *only_shares(evaluator.dataset, len(channels) - 1)]
    found = []
    for place, (channel, share) in enumerate(zip(channels, shares, strict=True)):
        lame = WithoutCamera(model, place - 1 if channel else None)
        overall = detect(evaluator, lame, device, out / (channel or "all"))
        found.append(LostCamera(channel, overall.NDS, overall.mAP, share))
        print(format_row(found[-1], found[0]), flush=True)
    return found


def format_row(row: LostCamera, whole: LostCamera) -> str:
    """A row of the table."""
    line = f"{row.channel or 'none':<18}{row.nds:>8.4f}{row.mean_ap:>8.4f}"
    if row.channel is None:
        return line
    fall = whole.nds - row.nds
    verdict = "within" if fall <= row.only_share + ALLOWED_FALL else "more than"
    return f"{line}{fall:>10.4f}{row.only_share:>12.4f}   {verdict} share + {ALLOWED_FALL}"


def main(argv: Sequence[str] | None = None) -> int:
    """The program ``tools/benchmark.py cameras``.

    Args:
        argv: arguments after ``cameras``; None takes the program's own.

    Raises:
        BevError: a setting, the weights or the data set do not suffice.
    """
    about = "NDS without each camera in turn, and the share of objects that only it sees."
    config, options = parse_trained(argv, "cameras", about, writes=True)
    with output_folder(options.out) as out:
        model, device = load_trained(config, options.weights)
        evaluator = SplitEvaluator(config, NuScenesReader(config.data), options.split)
        print(f"{'lost camera':<18}{'NDS':>8}{'mAP':>8}{'fall':>10}{'seen by it':>12}")
        measure(evaluator, model, device, out)
    return 0
