from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bevperception.errors import ConfigError
from bevperception.models.necks import FPN


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def nearest(coarse: Tensor, height: int, width: int) -> Tensor:
    """Nearest neighbour by explicit indices: row r of the fine map reads floor(r * h / height)."""
    rows = torch.arange(height) * coarse.shape[-2] // height
    columns = torch.arange(width) * coarse.shape[-1] // width
    return coarse[..., rows[:, None], columns]


def test_pyramid_against_its_definition() -> None:
    neck = FPN([3, 5], 4, 4).double()
    fine, coarse = torch.randn(2, 3, 7, 11).double(), torch.randn(2, 5, 4, 6).double()

    def lateral(index: int, features: Tensor) -> Tensor:
        layer = neck.laterals[index]
        return torch.einsum("nchw,oc->nohw", features, layer.weight[:, :, 0, 0]) + layer.bias[:, None, None]

    def output(index: int, features: Tensor, stride: int = 1) -> Tensor:
        layer = neck.outputs[index]
        return F.conv2d(features, layer.weight, layer.bias, stride=stride, padding=1)

    top = lateral(1, coarse)
    expected = [output(0, lateral(0, fine) + nearest(top, 7, 11)), output(1, top)]
    expected.append(output(2, expected[-1], stride=2))
    expected.append(output(3, expected[-1].relu(), stride=2))
    actual = neck([fine, coarse])
    assert [tuple(x.shape) for x in actual] == [(2, 4, 7, 11), (2, 4, 4, 6), (2, 4, 2, 3), (2, 4, 1, 2)]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_inputs_are_not_changed() -> None:
    inputs = [torch.randn(1, 3, 5, 5), torch.randn(1, 5, 3, 3)]
    copies = [x.clone() for x in inputs]
    FPN([3, 5], 4, 2)(inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_every_parameter_gets_a_gradient() -> None:
    neck = FPN([3, 5], 4, 4)
    torch.stack([x.sum() for x in neck([torch.randn(1, 3, 8, 8), torch.randn(1, 5, 4, 4)])]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in neck.parameters())


def test_fewer_levels_than_inputs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"neck.levels \(1\).*2 stages"):
        FPN([3, 5], 4, 1)


def test_wrong_number_of_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        FPN([3, 5], 4, 2)([torch.randn(1, 3, 8, 8)])
