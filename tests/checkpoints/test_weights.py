"""Weights on disk: round trips, and what damaged or foreign files are told."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bevperception.checkpoints import weights
from bevperception.checkpoints.weights import (
    WEIGHTS_NAME,
    Card,
    Weights,
    code_commit,
    load_into,
    load_model,
    read_checkpoint,
    read_weights,
    save_weights,
)
from bevperception.config import ExperimentConfig
from bevperception.config_io import config_to_dict, load_config
from bevperception.errors import CheckpointError, ConfigError
from bevperception.models.bevformer import BEVFormer

SMALL = {
    "model.bev.rows": 6,
    "model.bev.columns": 6,
    "model.bev.channels": 16,
    "model.bev.layers": 1,
    "model.detection.queries": 5,
    "model.detection.layers": 1,
    "model.segmentation.channels": 8,
}


def small_config(**overrides: Any) -> ExperimentConfig:
    return load_config(None, SMALL | {f"model.{k.replace('__', '.')}": v for k, v in overrides.items()})


def write(folder: Path, model: nn.Module, config: ExperimentConfig) -> Path:
    return save_weights(folder, model.state_dict(), Card(config_to_dict(config), step=7, metrics={"a": 0.5}))


def test_weights_and_card_come_back_the_same(tmp_path: Path) -> None:
    config = small_config()
    model = BEVFormer(config.model)
    path = write(tmp_path / "new" / "run", model, config)
    assert sorted(p.name for p in path.parent.iterdir()) == ["card.json", WEIGHTS_NAME]
    for source in (path, path.parent):
        weights = read_weights(source)
        assert weights.config() == config
        assert (weights.card.step, weights.card.metrics) == (7, {"a": 0.5})
        loaded = load_model(weights, weights.config())
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
    assert json.loads((path.parent / "card.json").read_text())["step"] == 7


def test_shipped_weights_go_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHIPPED_FOLDER", tmp_path / "weights")
    assert weights.shipped_weights() == []
    with pytest.raises(CheckpointError, match=r"no weights at small;.*shipped weights \(none\)"):
        read_weights("small")
    save_weights(tmp_path / "weights" / "small", {"a": torch.ones(2)}, Card({}, step=3))
    assert weights.shipped_weights() == ["small"]
    assert read_weights("small").card.step == 3
    with pytest.raises(CheckpointError, match=r"no weights at smal;.*\(small\)"):
        read_weights("smal")
    monkeypatch.chdir(tmp_path)
    save_weights(tmp_path / "small", {"a": torch.ones(2)}, Card({}, step=4))
    assert read_weights("small").card.step == 4, "a folder of the user's comes first"


def test_weights_that_share_memory_are_saved(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    state = read_weights(write(tmp_path, model, ExperimentConfig())).state
    assert torch.equal(state["a.weight"], state["b.weight"])


def test_another_architecture_is_named_with_its_cause(tmp_path: Path) -> None:
    config = small_config()
    write(tmp_path, BEVFormer(config.model), config)
    other = small_config(bev__rows=8, detection__layers=2)
    with pytest.raises(CheckpointError, match="is of another architecture") as caught:
        load_model(read_weights(tmp_path), other)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert "missing (detection." in message
    assert "bev_queries.weight [36, 16] instead of [48, 16]" in message
    assert "model.bev.rows is 8 here, 6 there" in message
    assert "model.detection.layers is 2 here, 1 there" in message


def test_unexpected_weights_are_refused_too(tmp_path: Path) -> None:
    config = small_config()
    write(tmp_path, BEVFormer(config.model), config)
    without = small_config(segmentation__enabled=False)
    with pytest.raises(CheckpointError, match=r"(?s)unexpected \(segm.*segmentation\.enabled is False"):
        load_model(read_weights(tmp_path), without)


def test_the_same_configuration_with_other_names_blames_the_code(tmp_path: Path) -> None:
    config = ExperimentConfig()
    path = write(tmp_path, nn.Linear(2, 2), config)
    with pytest.raises(CheckpointError, match="the code of the model has changed"):
        load_into(nn.Linear(2, 3), read_weights(path), config)


def test_parts_of_another_architecture(tmp_path: Path) -> None:
    config, other = small_config(), small_config(detection__layers=2, segmentation__enabled=False)
    source = BEVFormer(config.model)
    path = write(tmp_path, source, config)
    model = BEVFormer(other.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_into(model, read_weights(path), other, ("backbone", "neck"))
    for name, value in model.state_dict().items():
        taken = name.startswith(("backbone.", "neck."))
        assert torch.equal(value, source.state_dict()[name] if taken else before[name]), name
    with pytest.raises(CheckpointError, match=r"(?s)missing .*detection\.layers is 2 here, 1 there"):
        load_into(model, read_weights(path), other, ("detection",))
    with pytest.raises(CheckpointError, match=r"the model has no part 'segmentation'; it has .*neck"):
        load_into(model, read_weights(path), other, ("neck", "segmentation"))
    back = write(tmp_path / "other", model, other)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors has no part 'segmentation'; it has"):
        load_into(source, read_weights(back), config, ("segmentation",))


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    state = model.state_dict() | {"bias": torch.tensor([float("nan"), 0.0])}
    weights = Weights(state, Card(config_to_dict(ExperimentConfig())), tmp_path / "x")
    with pytest.raises(CheckpointError, match="NaN or infinite weights in bias"):
        load_into(model, weights)


def test_damaged_missing_and_foreign_files(tmp_path: Path) -> None:
    path = write(tmp_path, nn.Linear(2, 2), ExperimentConfig())
    with pytest.raises(CheckpointError, match="no weights at"):
        read_weights(tmp_path / "nothing")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="is damaged or not a safetensors file"):
        read_weights(path)
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="was not written by this project"):
        read_weights(tmp_path / "foreign.safetensors")
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match="is not a training checkpoint of this project"):
        read_weights(tmp_path / "foreign.pth")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
        read_weights(tmp_path / "text.ckpt")


class Harmful:
    """What a pickle could do on load."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("harmed",))


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, "bad.ckpt")
    with pytest.raises(
        CheckpointError, match=r"bad\.ckpt holds an object of posix\.mkdir; only tensors"
    ) as told:
        read_checkpoint("bad.ckpt")
    assert "weights_only" not in str(told.value), "PyTorch's own text advises to let the code run"
    Path("plain.ckpt").write_bytes(pickle.dumps(Harmful(), protocol=2))
    with pytest.raises(CheckpointError, match=r"plain\.ckpt holds an object of posix\.mkdir"):
        read_checkpoint("plain.ckpt")
    assert not Path("harmed").exists()


def test_a_card_of_an_unknown_configuration_is_named(tmp_path: Path) -> None:
    values = config_to_dict(ExperimentConfig())
    values["model"]["bev"]["wings"] = 2
    path = save_weights(tmp_path, nn.Linear(2, 2).state_dict(), Card(values))
    with pytest.raises(CheckpointError, match=r"unknown key model\.bev\.wings"):
        read_weights(path).config()


def test_a_backbone_variant_that_does_not_exist_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        BEVFormer(small_config(backbone__variant="internimage_xxl").model)


def test_the_commit_is_a_hash_or_unknown() -> None:
    commit = code_commit()
    assert commit is None or len(commit) in (40, 64)


def test_weights_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = weights.shipped_weights()[0]
    monkeypatch.chdir(tmp_path)
    assert weights.absolute_weights(name) == name
    assert weights.absolute_weights("out/run") == str(tmp_path / "out" / "run")
    (tmp_path / name).mkdir()  # a folder of that name goes first, as in read_weights
    assert weights.absolute_weights(name) == str(tmp_path / name)
