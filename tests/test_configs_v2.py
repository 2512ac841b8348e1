"""The BEVFormer v2 configurations: all of them build, and those published have the published shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bevperception.checkpoints.published_v2 import model_key
from bevperception.config_io import load_config
from bevperception.models.bevformer import BEVFormer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MANIFESTS = Path(__file__).parent / "golden" / "manifests"
SETTINGS = {"t1_base": 1, "t1": 1, "t2": 2, "t8": 8}


def build(path: Path) -> BEVFormer:
    with torch.device("meta"):
        return BEVFormer(load_config(path).model)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("bevformer_v2_*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_builds(path: Path) -> None:
    config = load_config(path)
    model = build(path)
    temporal = config.model.temporal
    if config.data.stream_length:
        assert config.data.stream_length > temporal.past
    else:
        assert config.data.history == temporal.past
    assert (model.fusion is None) == (temporal.past == 0)
    for setting, frames in SETTINGS.items():
        if path.stem.endswith(f"_{setting}"):
            assert temporal.frames == frames
            assert config.model.detection.groups == (1 if setting == "t1_base" else 11)


def test_every_backbone_has_every_setting() -> None:
    backbones = ("r50", *(f"internimage_{size}" for size in ("t", "s", "b", "l", "xl")))
    wanted = {f"bevformer_v2_{backbone}_{setting}" for backbone in backbones for setting in SETTINGS}
    found = {path.stem for path in CONFIGS.glob("bevformer_v2_*.yaml")}
    assert found == {*wanted, "bevformer_v2_world"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_published_names_and_shapes(setting: str) -> None:
    path = MANIFESTS / f"bevformerv2-r50-{setting.replace('_', '-')}-24ep.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    model = build(CONFIGS / f"bevformer_v2_r50_{setting}.yaml")
    published = {model_key(name): tuple(value[0]) for name, value in manifest["state_dict"].items()}
    published.pop(None)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert own == published
    # The published count includes ten weights of the loss.
    assert sum(p.numel() for p in model.parameters()) + 10 == manifest["num_parameters"]
