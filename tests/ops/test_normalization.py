"""Layer norm and softmax for prediction give what PyTorch's own give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from bevperception.models.precision import LayerNorm
from bevperception.ops import normalization as module
from bevperception.ops import use_backend
from bevperception.ops.normalization import layer_norm, softmax
from tests.ops.problems import ISAS, cpu_isa, needs_native

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def expected_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """By its definition, in float64."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight + bias


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    channels=st.integers(1, 70),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    is_strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_size(
    isa: str, shape: list[int], channels: int, dtype: torch.dtype, is_strided: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, channels * (1 + is_strided), generator=generator, dtype=torch.float64)
    x = (3 * x[..., :: 1 + is_strided] + 1).to(dtype)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.randn(2, channels, generator=generator, dtype=parameters)
    with torch.inference_mode(), cpu_isa(isa):
        result = layer_norm(x, weight, bias, 1e-3)
        expected = expected_norm(x, weight, bias, 1e-3)
        assert result.dtype == dtype
        if dtype == torch.bfloat16:  # half a unit in the last of eight places, and what float32 moves
            assert bool(((result.double() - expected).abs() <= expected.abs() / 256 + 1e-4).all())
            return
        torch.testing.assert_close(result.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(
            softmax(x), torch.softmax(x, -1), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@torch.inference_mode()
def test_bfloat16_is_rounded_to_the_nearest_even(isa: str) -> None:
    x = torch.randn(50, 37).bfloat16()
    weight, bias = torch.rand(37) + 0.5, torch.randn(37)
    with cpu_isa(isa):
        exact = layer_norm(x.float(), weight, bias, 1e-5)
        assert torch.equal(layer_norm(x, weight, bias, 1e-5), exact.bfloat16())
        # Halfway cases: every pattern of the sixteen bits that are cut.
        ties = torch.arange(0x3F800000, 0x3F800000 + (1 << 17), 7, dtype=torch.int32).view(torch.float32)
        rows = torch.zeros(len(ties)).bfloat16()
        assert torch.equal(layer_norm(rows, torch.ones_like(ties), ties, 1.0), ties.bfloat16())


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@torch.inference_mode()
def test_bad_numbers_stay_in_their_rows(isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(6, 21).to(dtype)
        x[1, 3], x[4, 20], x[5, 0] = float("nan"), float("inf"), -float("inf")
        with cpu_isa(isa):
            result = layer_norm(x, torch.ones(21), torch.zeros(21), 1e-5)
        assert result[[0, 2, 3]].isfinite().all()
        assert result[[1, 4, 5]].isnan().any(-1).all()
    with cpu_isa(isa):
        weights = softmax(x.float())
    assert weights[[0, 2, 3, 5]].isfinite().all()
    assert weights[[1, 4]].isnan().any(-1).all()


@needs_native
def test_bad_shapes_are_refused() -> None:
    operators = torch.ops.bevperception
    for rows, channels in ((torch.randn(3, 4), 5), (torch.tensor(1.0), 1), (torch.randn(2, 0), 1)):
        with pytest.raises(RuntimeError, match=r"layer_norm: "):
            operators.layer_norm(rows, torch.ones(channels), torch.zeros(channels), 1e-5)
    with pytest.raises(RuntimeError, match="one dtype"):
        operators.layer_norm(torch.randn(3, 4), torch.ones(4).double(), torch.zeros(4).double(), 1e-5)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        operators.softmax(torch.randn(3, 4).half())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(3, 5, dtype=dtype), *torch.randn(2, 5, dtype=dtype)
    torch.library.opcheck(torch.ops.bevperception.layer_norm.default, (x, weight, bias, 1e-5))
    torch.library.opcheck(torch.ops.bevperception.softmax.default, (x.mT,))


@needs_native
def test_native_kernels_only_predict() -> None:
    layer, x = LayerNorm(6), torch.randn(4, 6)
    assert not module._is_fast(x, layer.weight, layer.bias)
    with torch.no_grad():
        assert module._is_fast(x, layer.weight, layer.bias)
        with use_backend("reference"):
            assert not module._is_fast(x, layer.weight, layer.bias)
        assert not module._is_fast(x.to("meta"), layer.weight, layer.bias)
        assert not module._is_fast(x[:0], layer.weight, layer.bias)
    layer(softmax(x.requires_grad_())).square().sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None


@pytest.mark.parametrize("x", [torch.randn(3, 5), torch.randn(0, 5), torch.randn(2, 5).half()])
@torch.no_grad()
def test_module_is_pytorchs(x: Tensor) -> None:
    layer = LayerNorm(5)
    layer.weight.normal_()
    layer.bias.normal_()
    if x.dtype == torch.float16:
        layer.half()
    expected = functional.layer_norm(x, (5,), layer.weight, layer.bias, layer.eps)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert softmax(x).dtype == x.dtype


@torch.no_grad()
def test_autocast_keeps_pytorchs_dtypes() -> None:
    layer, x = LayerNorm(9), torch.randn(4, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == functional.layer_norm(x, (9,), layer.weight, layer.bias).dtype
        assert softmax(x).dtype == torch.softmax(x, -1).dtype
        torch.testing.assert_close(softmax(x), torch.softmax(x, -1), rtol=1e-2, atol=1e-3)
