"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bevperception.training.optimizer import build_optimizer, parameter_groups, rate_factor
from tests.training.standin import TinyModel, tiny_config


def test_every_trainable_parameter_is_in_one_group() -> None:
    model = TinyModel()
    model.unused.requires_grad_(False)
    groups = parameter_groups(model, tiny_config().training)
    found = [id(p) for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_norms_biases_and_embeddings_are_not_decayed() -> None:
    model = TinyModel()
    groups = parameter_groups(model, tiny_config(weight_decay=0.1, backbone_rate_factor=0.5).training)
    names = {id(p): name for name, p in model.named_parameters()}
    by_name = {names[id(p)]: group for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    decayed = {name for name, group in by_name.items() if group["weight_decay"]}
    assert decayed == {"backbone.0.weight", "mix.weight", "head.weight", "unused.weight"}
    slow = {name for name, group in by_name.items() if group["lr"] == pytest.approx(5e-3)}
    assert slow == {name for name in names.values() if name.startswith("backbone.")}


def test_a_positional_embedding_given_as_module_is_not_decayed() -> None:
    model = nn.ModuleDict({"position": nn.Embedding(3, 2), "linear": nn.Linear(2, 2)})
    decayed = [g for g in parameter_groups(model, tiny_config().training) if g["weight_decay"]]
    assert [list(g["params"]) for g in decayed] == [[model["linear"].weight]]  # type: ignore[call-overload]


def test_the_rate_warms_up_and_ends_at_its_final_share() -> None:
    factor = rate_factor(tiny_config(steps=12, warmup_steps=4, final_rate_factor=0.1).training)
    assert [factor(s) for s in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (s - 4) / 7)) for s in range(4, 12)]
    assert [factor(s) for s in range(4, 12)] == pytest.approx(expected)
    assert factor(4) == 1.0
    assert factor(11) == pytest.approx(0.1)
    assert factor(50) == pytest.approx(0.1)


def test_a_warm_up_as_long_as_the_run_is_allowed() -> None:
    factor = rate_factor(tiny_config(steps=3, warmup_steps=50).training)
    assert [factor(s) for s in range(3)] == pytest.approx([0.25, 0.5, 0.75])


def test_the_optimiser_steps_at_the_scheduled_rate() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer, schedule = build_optimizer(model, tiny_config(warmup_steps=1, weight_decay=0.0).training)
    assert schedule.get_last_lr() == pytest.approx([5e-3])
    before = model.weight.item()
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert before - model.weight.item() == pytest.approx(5e-3, rel=1e-4)  # AdamW's first step is the rate
