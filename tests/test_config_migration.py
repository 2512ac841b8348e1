"""Configurations of version 0.1: shipped cards, people's own runs, and settings that are gone."""

from __future__ import annotations

import copy
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from bevperception.checkpoints.weights import (
    CONFIG_KEY,
    MODEL_PREFIX,
    SHIPPED_FOLDER,
    load_model,
    read_weights,
    shipped_weights,
)
from bevperception.config_io import config_from_dict, config_to_dict, load_config
from bevperception.config_migration import migrate_config, replacement
from bevperception.config_model import ModelConfig
from bevperception.errors import ConfigError
from bevperception.training.checkpointing import check_resumable

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OLD = json.loads((SHIPPED_FOLDER / "world_v2" / "card.json").read_text(encoding="utf-8"))["config"]
"""Written by version 0.1."""


def old_with(key: str, value: object) -> dict[str, Any]:
    changed = copy.deepcopy(OLD)
    section = changed
    *path, name = key.split(".")
    for part in path:
        section = section[part]
    section[name] = value
    return changed


@pytest.mark.parametrize("name", shipped_weights())
def test_shipped_weights_build_their_models(name: str) -> None:
    weights = read_weights(name)
    config = weights.config()
    load_model(weights, config)
    assert config.model.detection.nms_radius_ratio == 0.5
    assert config.model.bev.initial_reach_cells == 1.0
    assert (config.model.temporal.mode, config.model.temporal.past) == {
        "world_micro": ("recurrent", 1),
        "world_micro_single": ("fusion", 0),
        "world_v2": ("fusion", 2),
    }[name]


def test_a_training_checkpoint_of_version_0_1_loads(tmp_path: Path) -> None:
    shipped = read_weights("world_v2")
    state = {f"{MODEL_PREFIX}{name}": value for name, value in shipped.state.items()}
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": state, "global_step": 7, CONFIG_KEY: OLD}, path)
    weights = read_weights(path)
    assert weights.config().model == shipped.config().model
    model = load_model(weights, weights.config())
    for name, value in model.state_dict().items():
        assert torch.equal(value, shipped.state[name]), name


def test_a_run_is_not_resumed_with_settings_that_are_gone(tmp_path: Path) -> None:
    old = old_with("model.detection.focal_alpha", 0.5)
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": {}, "global_step": 7, CONFIG_KEY: old}, path)
    config = read_weights("world_v2").config()
    with pytest.raises(ConfigError, match=r"other settings: model\.detection\.focal_alpha \(0\.5 there"):
        check_resumable(path, config, torch.nn.Linear(1, 1))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_todays_configurations_stay_as_they_are(path: Path) -> None:
    config = config_to_dict(load_config(path))
    assert migrate_config(config, "x") == (config, {})


def test_at_most_seventy_settings() -> None:
    """Fewer settings: what no published model, shipped configuration or user needs does not exist."""
    model = ModelConfig()
    assert sum(len(fields(getattr(model, part.name))) for part in fields(model)) <= 70


def test_the_published_fusion_has_a_mode() -> None:
    published = {"norm": "batch", "coverage": False, "missing": "nearest", "residual": False}
    old = copy.deepcopy(OLD)
    old["model"]["temporal"] |= published | {"history_frame": "current"}
    config, dropped = migrate_config(old, "x")
    assert config["model"]["temporal"]["mode"] == "fusion_published"
    assert not dropped
    config_from_dict(config, "x")
    old["model"]["temporal"]["history_frame"] = "own"  # only training tells the difference
    assert migrate_config(old, "x")[1] == {"model.temporal.history_frame": "own"}
    old["model"]["temporal"]["coverage"] = True
    with pytest.raises(ConfigError, match=r"x: model\.temporal is .* in the weights"):
        migrate_config(old, "x")
    old["model"]["temporal"]["past"] = 0  # nothing is fused
    migrate_config(old, "x")


def test_the_published_alignment_includes_its_embeddings() -> None:
    old = copy.deepcopy(OLD)
    old["model"]["temporal"] |= {"mode": "recurrent", "interval_s": 0.0}
    old["model"]["bev"] |= {"alignment": "published", "can_bus": True, "feature_levels_embedding": 4}
    config = config_from_dict(migrate_config(old, "x")[0], "x")
    assert config.model.level_embeddings == 4
    old["model"]["bev"]["can_bus"] = False
    with pytest.raises(ConfigError, match=r"model\.bev\.can_bus is False in the weights"):
        migrate_config(old, "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.bev.pillar_points", 2),
        ("model.bev.rotate_center", [50.0, 100.0]),
        ("model.bev.can_bus", True),
        ("model.bev.feature_levels_embedding", 7),
        ("model.detection.heads", 8),
        ("model.detection.points", 2),
        ("model.detection.score_range_m", [-10.0, -10.0, -10.0, 10.0, 10.0, 10.0]),
        ("model.perspective.levels", 2),
        ("model.perspective.image_iou", 0.5),
    ],
)
def test_what_would_predict_something_else_is_refused(key: str, value: object) -> None:
    with pytest.raises(
        ConfigError, match=rf"x: {key} is .* in the weights, which this version does not have"
    ):
        migrate_config(old_with(key, value), "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.detection.focal_alpha", 0.5),
        ("model.detection.box_cost_weight", 1.0),
        ("model.segmentation.focal_gamma", 1.0),
        ("model.perspective.min_side_px", 2.0),
        ("training.perspective_steps", 5),
    ],
)
def test_what_only_training_used_is_named(key: str, value: object) -> None:
    config, dropped = migrate_config(old_with(key, value), "x")
    assert dropped == {key: value}
    config_from_dict(config, "x")


@pytest.mark.parametrize("value", [None, [], "text", {"bev": None, "temporal": 3, "detection": []}])
def test_damaged_configurations_are_left_to_the_parser(value: object) -> None:
    config = migrate_config({"model": value, "training": None}, "x")[0]
    with pytest.raises(ConfigError):
        config_from_dict({"model": value, "training": 3}, "x")
    assert "model" in config


def test_old_settings_say_what_took_their_place(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("model: {detection: {merge_share: 0.5}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"it is called model\.detection\.nms_radius_ratio now"):
        load_config(file)
    assert replacement("model.bev.pillar_points") == "it is always 4 now"
    assert replacement("model.detection.focal_alpha") == "it is always 0.25 now"
    assert replacement("model.bev.rows") is None
