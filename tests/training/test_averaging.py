"""Moving average of the weights, against its definition written out."""

from __future__ import annotations

import pytest
import torch

from bevperception.training.averaging import WeightAverage, warmed_up_decay
from tests.training.standin import TinyModel


def test_decay_warms_up_to_its_limit() -> None:
    assert warmed_up_decay(0.9, 0) == pytest.approx(0.1)
    assert warmed_up_decay(0.9, 10) == pytest.approx(11 / 20)
    assert warmed_up_decay(0.9, 1000) == 0.9
    assert warmed_up_decay(0.0, 1000) == 0.0


def test_average_follows_its_recurrence() -> None:
    model, average = TinyModel(), WeightAverage(0.6)
    expected: dict[str, torch.Tensor] = {}
    for step in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(model)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            before = expected.get(name, parameter.detach())
            expected[name] = decay * before + (1 - decay) * parameter.detach()
    assert average.updates == 20
    for name, value in expected.items():
        torch.testing.assert_close(average.average[name], value)


def test_frozen_parameters_are_left_out() -> None:
    model, average = TinyModel(), WeightAverage(0.5)
    model.backbone.requires_grad_(False)
    average.update(model)
    assert not any(name.startswith("backbone.") for name in average.average)


def test_applied_swaps_and_gives_back_even_after_an_error() -> None:
    model, average = TinyModel(), WeightAverage(0.5)
    average.update(model)
    kept = {name: value.clone() for name, value in average.average.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}

    def fail_inside() -> None:
        with average.applied(model):
            assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    assert all(torch.equal(value, kept[name]) for name, value in average.average.items())
