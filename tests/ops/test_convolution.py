"""Convolution, norm, shortcut and ReLU at once give what the layers give one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from bevperception.ops import convolution as module
from bevperception.ops import use_backend
from bevperception.ops.convolution import convolve

LAYERS = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3, stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "3x3, grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "7x5, dilated": {"kernel_size": (7, 5), "padding": (3, 4), "dilation": (1, 2)},
}
MAPS = {
    "channels last": lambda: torch.randn(3, 6, 17, 13).contiguous(memory_format=torch.channels_last),
    "contiguous": lambda: torch.randn(2, 6, 9, 15),
    "strided": lambda: torch.randn(2, 12, 11, 26)[:, ::2, :, ::2],
    "transposed": lambda: torch.randn(1, 6, 13, 8).mT,
    "one pixel": lambda: torch.randn(2, 6, 1, 1),
    "no image": lambda: torch.randn(0, 6, 9, 9),
}


def layers(**settings: object) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    convolution = nn.Conv2d(6, 10, bias=False, **settings)  # type: ignore[arg-type]
    norm = nn.BatchNorm2d(10).eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        assert tensor is not None
        tensor.normal_()
    assert norm.running_var is not None
    norm.running_var.uniform_(0.2, 3.0)
    return convolution, norm


def one_after_the_other(
    x: Tensor, convolution: nn.Conv2d, norm: nn.BatchNorm2d, shortcut: Tensor | None, relu: bool
) -> Tensor:
    result = norm(convolution(x)) + (0.0 if shortcut is None else shortcut)
    return torch.relu(result) if relu else result


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("make", MAPS.values(), ids=MAPS.keys())
@pytest.mark.parametrize("relu", [False, True])
@torch.no_grad()
def test_same_as_the_layers(settings: dict[str, object], make: object, relu: bool) -> None:
    torch.manual_seed(2)
    x = make()  # type: ignore[operator]
    convolution, norm = layers(**settings)
    plain = one_after_the_other(x, convolution, norm, None, relu)
    torch.testing.assert_close(convolve(x, convolution, norm, relu=relu), plain, rtol=1e-5, atol=1e-5)
    for shortcut in (
        torch.randn(plain.shape),
        torch.randn(plain.shape).contiguous(memory_format=torch.channels_last),
        torch.randn(plain.mT.shape).mT,
    ):
        expected = one_after_the_other(x, convolution, norm, shortcut, relu)
        result = convolve(x, convolution, norm, shortcut=shortcut.clone(), relu=relu)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["auto", "reference"])
@pytest.mark.parametrize("size", [(2, 9, 11), (1, 1, 1), (3, 1, 5)])
@torch.no_grad()
def test_autocast_gives_half_precision(size: tuple[int, int, int], way: Literal["auto", "reference"]) -> None:
    torch.manual_seed(3)
    convolution, norm = layers(kernel_size=3, padding=1)
    x, shortcut = torch.randn(size[0], 6, *size[1:]), torch.randn(size[0], 10, *size[1:])
    expected = one_after_the_other(x, convolution, norm, shortcut, True)
    with use_backend(way), torch.autocast("cpu", torch.bfloat16):
        result = convolve(x, convolution, norm, shortcut=shortcut)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=2e-2, atol=5e-2)


FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("maps", FLOATS)
def test_every_way_gives_the_same_type(
    maps: torch.dtype, weights: torch.dtype, autocast: torch.dtype | None
) -> None:
    """On every processor: that of the layers one after the other, or a refusal where they refuse."""
    convolution, norm = layers(kernel_size=3, padding=1)
    x = torch.randn(2, 6, 3, 5).to(maps)
    convolution.to(weights), norm.to(weights)

    def dtype_of(run: Callable[[], Tensor]) -> torch.dtype | None:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            try:
                return run().dtype
            except RuntimeError:
                return None

    expected = dtype_of(lambda: norm(convolution(x)))
    for shortcut in (None, *(torch.randn(2, 10, 3, 5).to(dtype) for dtype in FLOATS)):
        for way in (torch.no_grad, torch.enable_grad, lambda: use_backend("reference")):
            with way():
                found = dtype_of(lambda kept=shortcut: convolve(x, convolution, norm, shortcut=kept))
            assert found == expected


@pytest.mark.skipif(not module._HAS_ONEDNN, reason="this PyTorch has no oneDNN")
def test_fast_way_is_taken_for_prediction_only() -> None:
    convolution, norm = layers(kernel_size=1)
    x = torch.randn(2, 6, 5, 7)
    assert not module._is_fast(x, convolution, norm, None)  # weights that learn
    with torch.no_grad():
        assert module._is_fast(x, convolution, norm, None)
        assert module._is_fast(x, convolution, norm, torch.randn(2, 10, 5, 7))
        assert not module._is_fast(x.double(), convolution, norm, None)
        with torch.autocast("cpu", torch.float16):
            assert not module._is_fast(x, convolution, norm, None)
        with use_backend("reference"):
            assert not module._is_fast(x, convolution, norm, None)
        norm.train()
        assert not module._is_fast(x, convolution, norm, None)
        norm.eval()
    for part in (convolution, norm):
        part.requires_grad_(False)
    assert module._is_fast(x, convolution, norm, None)  # frozen
    assert not module._is_fast(x.requires_grad_(), convolution, norm, None)


def test_gradients_reach_weights_and_norm() -> None:
    convolution, norm = layers(kernel_size=3, padding=1)
    x, shortcut = torch.randn(2, 6, 5, 7), torch.randn(2, 10, 5, 7)
    before = shortcut.clone()
    convolve(x, convolution, norm, shortcut=shortcut).sum().backward()
    assert torch.equal(shortcut, before)
    for parameter in (convolution.weight, norm.weight, norm.bias):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@torch.no_grad()
def test_new_statistics_count_at_once() -> None:
    convolution, norm = layers(kernel_size=1)
    x = torch.randn(4, 6, 5, 7)
    before = convolve(x, convolution, norm)
    norm.train()
    norm(convolution(x + 1.0))
    norm.eval()
    after = convolve(x, convolution, norm)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(
        after, one_after_the_other(x, convolution, norm, None, True), rtol=1e-5, atol=1e-5
    )
