"""Small models and inputs for tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bevperception.config_model import (
    BackboneConfig,
    BEVConfig,
    DetectionConfig,
    ModelConfig,
    NeckConfig,
    SegmentationConfig,
)
from bevperception.geometry import invert_rigid, planar_pose
from bevperception.models.bevformer import BEVFormer
from bevperception.structures import CameraFrames


def tiny_config(**bev: object) -> ModelConfig:
    """A model of odd sizes that runs in milliseconds."""
    return ModelConfig(
        backbone=BackboneConfig("internimage_micro", out_indices=(2, 3), drop_path_rate=0.0),
        neck=NeckConfig(levels=2),
        bev=BEVConfig(
            **{
                "channels": 32,
                "rows": 9,
                "columns": 7,
                "layers": 2,
                "heads": 4,
                "temporal_points": 3,
                "feedforward_channels": 48,
                **bev,
            }
        ),
        detection=DetectionConfig(queries=11, layers=2, max_boxes=9),
        segmentation=SegmentationConfig(range_m=50.0, cell_m=10.0, channels=8, blocks=1),
    )


def tiny_model(
    config: ModelConfig | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
) -> BEVFormer:
    """A tiny model whose attention looks somewhere else for every query (the initial one does not)."""
    torch.manual_seed(seed)
    model = BEVFormer(config or tiny_config()).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
                parameter.normal_(0, 0.05)
    return model


def camera_ring(cameras: int, height: int, width: int) -> Tensor:
    """(cameras, 4, 4) bev_to_image of cameras that look out in all directions, 1.6 m above the ground."""
    optical_to_forward = torch.tensor(
        [[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64
    )
    intrinsics = torch.eye(4, dtype=torch.float64)
    intrinsics[0, 0] = intrinsics[1, 1] = width * 0.6
    intrinsics[0, 2], intrinsics[1, 2] = width / 2, height / 2
    matrices = []
    for k in range(cameras):
        camera_to_bev = planar_pose(0.5, 0.1 * k, 2 * math.pi * k / cameras) @ optical_to_forward
        camera_to_bev[2, 3] = 1.6
        matrices.append(intrinsics @ invert_rigid(camera_to_bev))
    return torch.stack(matrices)


def random_frames(
    batch: int = 2,
    cameras: int = 3,
    size: tuple[int, int] = (67, 101),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> CameraFrames:
    """Frames with random pixels, slightly different calibration a sample and a driving ego."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, cameras, 3, *size, generator=generator, dtype=dtype)
    ring = camera_ring(cameras, *size)
    poses = [planar_pose(3.0 + 2 * seed + b, -1.0 + b, 0.1 + 0.2 * b + 0.03 * seed) for b in range(batch)]
    jitter = [planar_pose(0.1 * b, 0.05 * b, 0.02 * b) for b in range(batch)]
    return CameraFrames(
        images,
        torch.stack([ring @ j for j in jitter]),
        torch.stack(poses),
        torch.arange(batch, dtype=torch.float64) + 0.5 * seed,
    )


def take(frames: CameraFrames, index: int) -> CameraFrames:
    """One sample of a batch, as a batch of one."""
    return frames._map(lambda tensor: tensor[index : index + 1])
