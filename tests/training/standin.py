"""A model and samples of a few numbers with the interfaces of the real ones, for tests of training itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bevperception.config import ExperimentConfig
from bevperception.config_io import load_config
from bevperception.structures import (
    BadSample,
    Batch,
    BEVMemory,
    Boxes3D,
    CameraFrames,
    ModelOutputs,
    Targets,
)

SIDE = 4


class TinyModel(nn.Module):
    """Pixels and memory to a map of SIDE x SIDE cells.

    Args:
        channels: width.
        dropout: active in training mode.
    """

    def __init__(self, channels: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.GroupNorm(1, channels))
        self.bev_queries = nn.Embedding(SIDE * SIDE, channels)
        self.norm = nn.LayerNorm(channels)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(channels, 1, 1)
        self.unused = nn.Linear(2, 2)  # a parameter without a part in the loss, as a head may be

    def forward(
        self, frames: CameraFrames, memory: BEVMemory | None = None
    ) -> tuple[ModelOutputs, BEVMemory]:
        bev = self.encode(self.image_features(frames), frames, memory)
        outputs = ModelOutputs(bev=bev, detection=None, segmentation_logits=self.head(bev))
        return outputs, self.temporal.remember(bev, frames)

    def image_features(self, frames: CameraFrames) -> list[Tensor]:
        return [self.backbone(frames.images.flatten(0, 1)).unflatten(0, frames.images.shape[:2])]

    def encode(self, features: list[Tensor], frames: CameraFrames, memory: BEVMemory | None) -> Tensor:
        queries = self.norm(self.bev_queries.weight).T.unflatten(1, (SIDE, SIDE))
        bev = queries + features[0].mean(1)
        if memory is not None:
            bev = bev + 0.5 * torch.where(memory.valid[:, None, None, None], memory.features, 0.0)
        return self.dropout(torch.tanh(self.mix(bev)))

    @property
    def temporal(self) -> TinyModel:
        return self

    def remember(
        self,
        bev: Tensor,
        frames: CameraFrames,
        memory: BEVMemory | None = None,
        valid: Tensor | None = None,
    ) -> BEVMemory:
        valid = torch.ones(frames.batch_size, dtype=torch.bool) if valid is None else valid
        return BEVMemory(bev, frames.bev_to_global, frames.timestamps_s, valid)

    def losses(self, outputs: ModelOutputs, targets: Targets, reduce_mean: Any) -> dict[str, Tensor]:
        assert outputs.segmentation_logits is not None
        difference = outputs.segmentation_logits - targets.segmentation
        weight = reduce_mean(difference.new_tensor(float(len(targets.boxes))))
        return {
            "square": difference.square().mean((1, 2, 3)).sum() / weight,
            "size": 1e-3 * outputs.bev.square().mean(),
        }

    def decode(self, outputs: ModelOutputs) -> list[Boxes3D]:
        return [Boxes3D(torch.zeros(0, 9), torch.zeros(0).long(), torch.zeros(0)) for _ in outputs.bev]


@dataclass
class TinySource:
    """Samples whose pixels depend on (index, draw).

    Args:
        samples: how many.
        history: earlier frames; sample 0 has none of them.
        bad: indices that cannot be read.
        poison: index whose target is NaN; -1 for none.
    """

    samples: int = 7
    history: int = 0
    bad: frozenset[int] = field(default_factory=frozenset)
    poison: int = -1

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, item: tuple[int, int]) -> Batch | BadSample:
        index, draw = item
        if index in self.bad:
            return BadSample(f"token-{index}", "its image is missing")
        rng = np.random.default_rng((index, draw))
        target = torch.full((1, 1, SIDE, SIDE), index / self.samples)
        if index == self.poison:
            target[0, 0, 0, 0] = float("nan")
        return Batch(
            history=[make_frames(rng) for _ in range(self.history)],
            history_valid=torch.full((1, self.history), index > 0),
            frames=make_frames(rng),
            targets=Targets([make_boxes()], target, torch.ones(1, 1, dtype=torch.bool)),
            tokens=[f"token-{index}"],
            scene_tokens=["scene"],
        )


def make_frames(rng: np.random.Generator, cameras: int = 2, time_s: float = 0.0) -> CameraFrames:
    images = torch.from_numpy(rng.standard_normal((1, cameras, 3, SIDE, SIDE)).astype(np.float32))
    eye = torch.eye(4)
    return CameraFrames(
        images=images,
        bev_to_image=eye.expand(1, cameras, 4, 4),
        bev_to_global=eye.double()[None],
        timestamps_s=torch.tensor([time_s], dtype=torch.float64),
    )


def make_boxes() -> Boxes3D:
    return Boxes3D(torch.zeros(1, 9), torch.zeros(1, dtype=torch.int64))


def tiny_config(**overrides: Any) -> ExperimentConfig:
    """A run of a few steps on the CPU; ``overrides`` are of the training section, or the data's streams."""
    settings = {
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "accelerator": "cpu",
        "tensorboard": False,
        "log_every": 1,
        "checkpoint_every": 100,
        "keep_checkpoints": 0,
    }
    streams = {f"data.{name}": overrides.pop(name) for name in tuple(overrides) if name.startswith("stream_")}
    values: dict[str, Any] = {f"training.{k}": v for k, v in (settings | overrides).items()}
    return load_config(None, values | {"data.workers": 0} | streams)


def no_evaluation(model: nn.Module, device: torch.device, folder: Path) -> dict[str, Any]:
    """An evaluation that looks at the weights it is given."""
    return {"norm": float(sum(p.detach().square().sum() for p in model.parameters()))}


@dataclass
class TinyScenes(TinySource):
    """The same samples in scenes, half a second apart.

    Args:
        scene_lengths: samples of each scene.
    """

    scene_lengths: tuple[int, ...] = (4, 3)

    def __getitem__(self, item: tuple[int, int]) -> Batch | BadSample:
        batch = super().__getitem__(item)
        place, scene = item[0], 0
        while place >= self.scene_lengths[scene]:
            place, scene = place - self.scene_lengths[scene], scene + 1
        if isinstance(batch, Batch):
            batch.scene_tokens = [f"scene-{scene}"]
            batch.frames.timestamps_s = torch.tensor([0.5 * place], dtype=torch.float64)
        return batch
