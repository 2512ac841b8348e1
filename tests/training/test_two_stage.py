"""A perspective head is trained first, and the whole model starts from its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bevperception.checkpoints.weights import Card, load_into, load_model, read_weights, save_weights
from bevperception.config_io import config_to_dict, load_config
from bevperception.errors import CheckpointError, ConfigError
from bevperception.models.bevformer import BEVFormer
from bevperception.models.build import build_model
from bevperception.models.perspective_model import PerspectiveModel

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "world_perspective.yaml"
PARTS = ("backbone", "neck", "perspective")


def test_the_whole_model_starts_from_the_first_stage(tmp_path: Path) -> None:
    config = load_config(CONFIG)
    first = build_model(config.model)
    assert isinstance(first, PerspectiveModel)
    save_weights(tmp_path, first.state_dict(), Card(config_to_dict(config)))
    whole = build_model(load_config(CONFIG, {"model.perspective.only": False}).model)
    assert isinstance(whole, BEVFormer)
    weights = read_weights(tmp_path)
    assert load_into(whole, weights, parts=PARTS) == {}
    for name, value in first.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    with pytest.raises(CheckpointError, match="missing"):
        load_into(whole, weights)


def test_a_first_stage_of_version_0_1_loads(tmp_path: Path) -> None:
    """It had the parts of the BEV beside the perspective head, which stood still."""
    whole = build_model(load_config(CONFIG, {"model.perspective.only": False}).model)
    config = config_to_dict(load_config(CONFIG))
    config["model"]["perspective"]["alone"] = config["model"]["perspective"].pop("only")
    config["training"]["perspective_steps"] = 0
    save_weights(tmp_path, whole.state_dict(), Card(config))
    weights = read_weights(tmp_path)
    model = load_model(weights, weights.config())
    assert isinstance(model, PerspectiveModel)
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_the_schedule_of_version_0_1_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"train with model\.perspective\.only first"):
        load_config(None, {"training.perspective_steps": 2})
