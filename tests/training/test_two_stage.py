"""Training the perspective head first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bevperception.config import ExperimentConfig, TrainingConfig
from bevperception.config_model import ModelConfig, PerspectiveConfig
from bevperception.errors import ConfigError
from bevperception.structures import BEVMemory, CameraFrames, ModelOutputs
from bevperception.training.run import train
from tests.training.standin import TinyModel, TinySource, no_evaluation, tiny_config


class Watched(TinyModel):
    """Notes which of its stages every step asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def see(self, frames: CameraFrames) -> ModelOutputs:
        self.asked.append("first stage")
        return TinyModel.forward(self, frames, None)[0]

    def forward(
        self, frames: CameraFrames, memory: BEVMemory | None = None
    ) -> tuple[ModelOutputs, BEVMemory]:
        self.asked.append("whole")
        return super().forward(frames, memory)


def test_the_first_steps_ask_for_the_perspective_head_alone(tmp_path: Path) -> None:
    config = tiny_config(steps=5)
    config.model.perspective.enabled = True
    config.training.perspective_steps = 2
    torch.manual_seed(0)
    model = Watched()
    train(config, model, TinySource(history=1), no_evaluation, tmp_path)
    assert model.asked == ["first stage"] * 2 + ["whole"] * 3


def test_it_needs_a_perspective_head() -> None:
    with pytest.raises(ConfigError, match=r"perspective_steps needs model\.perspective\.enabled"):
        ExperimentConfig(training=TrainingConfig(perspective_steps=3))
    model = ModelConfig(perspective=PerspectiveConfig(enabled=True))
    ExperimentConfig(model=model, training=TrainingConfig(perspective_steps=3))
