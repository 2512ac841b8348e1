"""Parts of a model that stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bevperception.errors import ConfigError
from bevperception.training.run import freeze, train
from tests.models.builders import random_frames, tiny_model
from tests.training.standin import TinyModel, TinySource, no_evaluation, tiny_config


def parted() -> nn.ModuleDict:
    """Two parts with statistics and one without parameters."""
    parts = {name: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)) for name in ("backbone", "head")}
    return nn.ModuleDict({**parts, "glue": nn.ReLU()}).train()


def test_a_frozen_part_takes_no_gradient_and_keeps_its_statistics() -> None:
    model = parted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    freeze(model, ["backbone"])
    loss = model["head"](model["glue"](model["backbone"](torch.randn(5, 2, 3, 3)))).square().sum()
    loss.backward()
    assert [p.grad for p in model["backbone"].parameters()] == [None] * 4
    assert all(p.grad is not None for p in model["head"].parameters())
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"head.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_a_run_leaves_frozen_parts_bit_for_bit_and_trains_the_rest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyModel()
    names = [name for name, child in model.named_children() if list(child.parameters())]
    config = tiny_config(steps=3)
    config.training.frozen_parts = (names[0],)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(config, model, TinySource(history=1), no_evaluation, tmp_path)
    moved = {n.split(".")[0] for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert names[0] not in moved
    assert moved


def test_nothing_is_remembered_for_a_gradient_in_a_frozen_backbone() -> None:
    model = tiny_model(dtype=torch.float32).train()
    freeze(model, ["backbone", "neck"])
    assert not any(f.requires_grad for f in model.image_features(random_frames(1, dtype=torch.float32)))


def test_wrong_parts_are_named() -> None:
    with pytest.raises(ConfigError, match=r"no part 'neck'; it has backbone, head"):
        freeze(parted(), ["neck"])
    with pytest.raises(ConfigError, match=r"frozen_parts \(head, backbone\) leave nothing to train"):
        freeze(parted(), ["head", "backbone"])
