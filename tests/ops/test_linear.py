"""The linear layer for prediction gives what PyTorch's own gives, in every case that it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bevperception.ops import linear as module
from bevperception.ops import use_backend
from bevperception.ops.linear import Activation, Linear, linear
from tests.ops.problems import ISAS, cpu_isa, needs_native

INPUTS = {
    "rows": torch.randn(7, 16),
    "more dimensions": torch.randn(2, 3, 5, 16),
    "one row": torch.randn(1, 16),
    "strided": torch.randn(5, 32)[:, ::2],
    "transposed": torch.randn(16, 7).t(),
    "permuted": torch.randn(3, 5, 16).transpose(0, 1),
    "one dimension": torch.randn(16),
    "empty": torch.randn(0, 16),
}
WEIGHTS = {"own": torch.randn(11, 16), "part": torch.randn(30, 16)[5:9], "transposed": torch.randn(16, 3).t()}


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@torch.inference_mode()
def test_same_as_pytorch(x: Tensor, weight: Tensor, activation: Activation) -> None:
    bias = torch.randn(weight.shape[0])
    expected = functional.linear(x, weight, bias)
    if activation != "none":
        expected = {"relu": torch.relu, "gelu": nn.GELU(), "silu": nn.SiLU()}[activation](expected)
    torch.testing.assert_close(linear(x, weight, bias, activation), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not module._HAS_ONEDNN, reason="this PyTorch has no oneDNN")
def test_fast_way_is_taken_for_prediction_only(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(4, 3), torch.randn(2, 4)
    taken: list[bool] = []
    decide = module._is_fast

    def note(*tensors: Tensor) -> bool:
        taken.append(decide(*tensors))
        return taken[-1]

    monkeypatch.setattr(module, "_is_fast", note)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with use_backend("reference"):
            layer(x)
        layer.double()(x.double())
    assert taken == [False, True, False, False, False]


def test_compiled_layer_is_one_graph() -> None:
    torch.compiler.reset()
    layer, x = Linear(4, 3), torch.randn(2, 4)
    with torch.inference_mode():
        expected = functional.linear(x, layer.weight, layer.bias)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)


def test_starts_like_pytorchs() -> None:
    torch.manual_seed(3)
    own = Linear(5, 2)
    torch.manual_seed(3)
    other = nn.Linear(5, 2)
    assert torch.equal(own.weight, other.weight)
    assert torch.equal(own.bias, other.bias)
    assert list(own.state_dict()) == list(other.state_dict())


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@torch.inference_mode()
def test_many_numbers(isa: str, activation: Activation) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 171, 2, 160, generator=generator).transpose(0, 1)
    weight = torch.randn(192, 160, generator=generator) * 0.1
    bias = torch.randn(192, generator=generator)
    exact = functional.linear(x.double(), weight.double(), bias.double())
    if activation != "none":
        exact = {"relu": torch.relu, "gelu": nn.GELU(), "silu": nn.SiLU()}[activation](exact)
    with cpu_isa(isa):
        result = linear(x, weight, bias, activation)
    assert result.shape == exact.shape
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=5e-6)
