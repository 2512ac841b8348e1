"""The BEVFormer v2 configurations: every backbone with every setting, and the published names and shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bevperception.checkpoints.official_models import official_table
from bevperception.config import ExperimentConfig
from bevperception.config_io import load_config
from bevperception.models.bevformer import BEVFormer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MANIFESTS = Path(__file__).parent / "golden" / "manifests"
SETTINGS = {"t1_base": 1, "t1": 1, "t2": 2, "t8": 8}
BACKBONES = ("", *(f"internimage_{size}" for size in ("t", "s", "b", "l", "xl")))


def v2_files(setting: str, backbone: str) -> list[Path]:
    schedule = CONFIGS / f"bevformer_v2_r50_{setting}.yaml"
    return [schedule, CONFIGS / "backbones" / f"{backbone}.yaml"] if backbone else [schedule]


def build(config: ExperimentConfig) -> BEVFormer:
    with torch.device("meta"):
        return BEVFormer(config.model)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_has_every_setting(setting: str, backbone: str) -> None:
    config = load_config(v2_files(setting, backbone))
    model, temporal = build(config), config.model.temporal
    assert config.model.backbone.variant == (backbone or "resnet50_caffe")
    assert config.model.backbone.checkpointing == (backbone in ("internimage_l", "internimage_xl"))
    assert config.data.channel_order == ("rgb" if backbone else "bgr")
    assert config.data.history == temporal.past
    assert temporal.frames == SETTINGS[setting]
    assert (model.fusion is None) == (temporal.past == 0)
    assert config.model.detection.groups == (1 if setting == "t1_base" else 11)


def test_every_backbone_is_named_here() -> None:
    assert {path.stem for path in (CONFIGS / "backbones").glob("*.yaml")} == {*BACKBONES} - {""}
    v2 = {path.stem.removeprefix("bevformer_v2_r50_") for path in CONFIGS.glob("bevformer_v2_r50_*.yaml")}
    assert v2 == {*SETTINGS}


def test_the_world_model_streams_longer_than_it_remembers() -> None:
    config = load_config(CONFIGS / "bevformer_v2_world.yaml")
    assert config.data.stream_length > config.model.temporal.past
    build(config)


def test_later_files_win_on_the_command_line_too(tmp_path: Path) -> None:
    from bevperception.config_io import ConfigParser

    own = tmp_path / "own.yaml"
    own.write_text("model: {backbone: {variant: internimage_s}}\n", encoding="utf-8")
    files = [str(path) for path in (*v2_files("t2", "internimage_t"), own)]
    config, _ = ConfigParser().parse_experiment(["--config", *files, "--training.steps", "7"])
    assert config.model.backbone.variant == "internimage_s"
    assert (config.model.temporal.past, config.data.channel_order, config.training.steps) == (1, "rgb", 7)
    composed = tmp_path / "composed.yaml"
    composed.write_text(f"base: [{', '.join(files)}]\ntraining: {{steps: 7}}\n", encoding="utf-8")
    assert load_config(composed) == config


@pytest.mark.parametrize("setting", SETTINGS)
def test_published_names_and_shapes(setting: str) -> None:
    path = MANIFESTS / f"bevformerv2-r50-{setting.replace('_', '-')}-24ep.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    model = build(load_config(v2_files(setting, "")))
    table = official_table("resnet50_caffe", None)
    published = {table.to_own(name): tuple(value[0]) for name, value in manifest["state_dict"].items()}
    published.pop(None)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert own == published
    # The published count includes ten weights of the loss.
    assert sum(p.numel() for p in model.parameters()) + 10 == manifest["num_parameters"]
