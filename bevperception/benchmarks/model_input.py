"""Inputs of the benchmarks of models: a model with random weights, and frames for it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from bevperception.can_bus import CAN_BUS_SIZE
from bevperception.config import ExperimentConfig
from bevperception.config_model import ModelConfig
from bevperception.data.dataset import NuScenesDataset
from bevperception.data.nuscenes import NuScenesReader
from bevperception.models.bevformer import BEVFormer
from bevperception.structures import BEVMemory, CameraFrames

FrameSource = Literal["random", "data"]
_INTERVAL_S = 0.5
"""Between key frames."""


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
    return config.bev.alignment == "published"


def build_model(config: ModelConfig) -> BEVFormer:
    """The model with random weights from a fixed seed, ready to predict."""
    torch.manual_seed(0)
    return BEVFormer(config).eval()


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
