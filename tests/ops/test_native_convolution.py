"""The native convolutions against a direct sum in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from bevperception.ops import convolution as module
from bevperception.ops import use_backend
from bevperception.ops.convolution import convolve
from tests.ops.problems import ISAS, cpu_isa, needs_native, threads
from tests.ops.test_convolution import one_after_the_other

pytestmark = needs_native
EACH_ISA = pytest.mark.parametrize("isa", ISAS)
needs_amx = pytest.mark.skipif("amx" not in ISAS, reason="needs AMX; emulated in test_hostile.py")
CHANNELS = st.sampled_from([32, 64, 96])
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


def problem(seed: int, outputs: int, inputs: int, kernel: int, *size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (N, H, W, C), weight (O, C, k, k) and bias (O,): outputs of about 1."""
    generator = torch.Generator().manual_seed(seed)
    scale = (inputs * kernel**2) ** -0.5
    return (
        torch.randn(*size, inputs, generator=generator),
        torch.randn(outputs, inputs, kernel, kernel, generator=generator) * scale,
        torch.randn(outputs, generator=generator),
    )


def direct(
    pixels: Tensor, weight: Tensor, bias: Tensor, relu: bool, shortcut: Tensor | None = None
) -> Tensor:
    """By its definition, in float64."""
    maps = pixels.permute(0, 3, 1, 2).double()
    padding = weight.shape[-1] // 2
    result = functional.conv2d(maps, weight.double(), bias.double(), padding=padding).permute(0, 2, 3, 1)
    if shortcut is not None:
        result = result + shortcut.double()
    return result.relu() if relu else result


@EACH_ISA
@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 14), st.integers(1, 14)),
    inputs=CHANNELS,
    outputs=CHANNELS,
    relu=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_3x3_of_any_size(
    isa: str, size: tuple[int, ...], inputs: int, outputs: int, relu: bool, seed: int
) -> None:
    pixels, weight, bias = problem(seed, outputs, inputs, 3, *size)
    with cpu_isa(isa):
        result = torch.ops.bevperception.convolve_3x3(pixels, weight, bias, relu)
    torch.testing.assert_close(result.double(), direct(pixels, weight, bias, relu), rtol=0, atol=2e-5)


@EACH_ISA
@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 14), st.integers(1, 14)),
    inputs=CHANNELS,
    outputs=CHANNELS,
    relu=st.booleans(),
    adds=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_1x1_of_any_size(
    isa: str, size: tuple[int, ...], inputs: int, outputs: int, relu: bool, adds: bool, seed: int
) -> None:
    pixels, weight, bias = problem(seed, outputs, inputs, 1, *size)
    held = torch.randn(*size, outputs)
    result = held.clone() if adds else torch.full_like(held, float("nan"))
    with cpu_isa(isa):
        torch.ops.bevperception.convolve_1x1_(
            result.flatten(0, 2), pixels.flatten(0, 2), weight.flatten(1), bias, adds, relu
        )
    expected = direct(pixels, weight, bias, relu, held if adds else None)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "outputs", "size"),
    [
        (64, 64, (2, 61, 45)),  # several blocks for each thread
        (160, 128, (1, 81, 86)),  # kernels beyond the cache: several blocks, step by step
    ],
)
def test_many_blocks_on_any_number_of_threads(inputs: int, outputs: int, size: tuple[int, ...]) -> None:
    pixels, weight, bias = problem(0, outputs, inputs, 3, *size)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(torch.ops.bevperception.convolve_3x3(pixels, weight, bias, True))
    torch.testing.assert_close(results[0].double(), direct(pixels, weight, bias, True), rtol=0, atol=2e-5)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_batch_is_as_its_images_alone() -> None:
    pixels, weight, bias = problem(1, 64, 32, 3, 3, 7, 9)
    together = torch.ops.bevperception.convolve_3x3(pixels, weight, bias, True)
    alone = [torch.ops.bevperception.convolve_3x3(pixels[i : i + 1], weight, bias, True) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("relu", [False, True])
def test_what_is_not_a_number_does_not_get_lost(relu: bool) -> None:
    """It spreads over tiles of 4 x 4 in the 3x3 convolution, not to other images."""
    pixels, weight, bias = problem(2, 32, 32, 3, 2, 9, 13)
    pixels[0, 4, 6, 5] = float("nan")
    result = torch.ops.bevperception.convolve_3x3(pixels, weight, bias, relu)
    assert result[0, 3:6, 5:8].isnan().all()
    assert result[1].isfinite().all()
    assert result[0, 8:, 12:].isfinite().all()
    rows = torch.zeros(9 * 13, 32)
    operator = torch.ops.bevperception.convolve_1x1_
    operator(rows, pixels[0].flatten(0, 1), weight[:, :, 1, 1].contiguous(), bias, True, relu)
    assert torch.equal(rows.isnan().any(1), pixels[0].flatten(0, 1).isnan().any(1))


@pytest.mark.parametrize("size", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty(size: tuple[int, ...]) -> None:
    pixels, weight, bias = problem(0, 64, 32, 3, *size)
    assert torch.ops.bevperception.convolve_3x3(pixels, weight, bias, True).shape == (*size, 64)
    empty = torch.zeros(0, 64)
    torch.ops.bevperception.convolve_1x1_(empty, pixels.flatten(0, 2), weight[:, :, 0, 0], bias, True, True)


@EACH_ISA
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("has_shortcut", [False, True])
@pytest.mark.parametrize("channels", [64, 160])
@torch.no_grad()
def test_layers_give_the_same_numbers(
    isa: str, stride: int, kernel: int, has_shortcut: bool, channels: int
) -> None:
    """As one after the other, for strided maps and weights too."""
    convolution = torch.nn.Conv2d(channels, 96, kernel, stride, kernel // 2, bias=False)
    convolution = convolution.to(memory_format=torch.channels_last)
    norm = torch.nn.BatchNorm2d(96).eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()  # type: ignore[union-attr]
    x = torch.randn(2, 2 * channels, 9, 26)[:, ::2, :, ::2]
    shortcut = torch.randn(2, 96, (9 - 1) // stride + 1, (13 - 1) // stride + 1) if has_shortcut else None
    expected = one_after_the_other(x, convolution, norm, shortcut, True)
    with cpu_isa(isa):
        given_shortcut = shortcut.clone() if shortcut is not None else None
        result = convolve(x, convolution, norm, shortcut=given_shortcut)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-5)
        with use_backend("reference"):
            assert torch.equal(convolve(x, convolution, norm, shortcut=shortcut), expected)


@EACH_ISA
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "settings", "way", "way_with_amx"),
    [
        (64, 256, 1, {}, "thin", "thin"),
        (128, 256, 1, {}, "thin", "split"),
        (256, 256, 1, {}, None, "split"),
        (64, 256, 1, {"stride": 2}, None, "split"),
        (96, 96, 3, {"padding": 1}, "winograd", "winograd"),
        (512, 512, 3, {"padding": 1}, "winograd", "split"),
        (96, 96, 3, {"padding": 1, "stride": 2}, None, "split"),
        (96, 96, 3, {"padding": 2, "dilation": 2}, None, None),
        (96, 96, 3, {"padding": 1, "groups": 3}, None, None),
        (96, 96, 3, {"padding": 1, "stride": (2, 1)}, None, None),
        (96, 96, (3, 1), {"padding": (1, 0)}, None, None),
        (96, 96, 3, {}, None, None),
        (96, 96, 3, {"padding": "same"}, None, None),
        (48, 96, 1, {}, None, None),
        (96, 48, 1, {}, None, None),
        (3, 64, 7, {"padding": 3, "stride": 2}, None, "split"),
        (3, 48, 7, {"padding": 3, "stride": 2}, None, None),
        (11, 64, 7, {"padding": 3}, None, None),
        (56, 64, 3, {"padding": 1}, None, "split"),
        (32, 32, 5, {"padding": 2}, None, None),
    ],
)
def test_layers_go_the_fastest_way(
    isa: str, inputs: int, outputs: int, kernel: int, settings: dict[str, int], way: str, way_with_amx: str
) -> None:
    convolution = torch.nn.Conv2d(inputs, outputs, kernel, bias=False, **settings)  # type: ignore[arg-type]
    expected = {"amx": way_with_amx, "baseline": None}.get(isa, way)
    ways = {"thin": module._is_thin, "winograd": module._is_winograd, "split": module._is_split}
    with cpu_isa(isa):
        possible = [name for name, is_possible in ways.items() if is_possible(convolution)]
    assert (possible or [None])[0] == expected


@pytest.mark.parametrize(
    ("pixels", "weight", "bias", "message"),
    [
        ((1, 4, 4, 32), (32, 32, 1, 1), (32,), "the weight has a shape"),
        ((1, 4, 4, 32), (32, 64, 3, 3), (32,), "the weight has a shape"),
        ((1, 4, 4, 32), (32, 32, 3, 3), (64,), "the bias has a shape"),
        ((1, 4, 4, 20), (32, 20, 3, 3), (32,), "multiples of 32, got 20 and 32"),
        ((1, 4, 4, 0), (32, 0, 3, 3), (32,), "multiples of 32"),
        ((1, 4, 4, 32), (40, 32, 3, 3), (40,), "multiples of 32"),
        ((4, 4, 32), (32, 32, 3, 3), (32,), "4 dimensions"),
    ],
)
def test_3x3_says_what_does_not_fit(
    pixels: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...], message: str
) -> None:
    tensors = [torch.zeros(shape) for shape in (pixels, weight, bias)]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bevperception.convolve_3x3(*tensors, True)


def test_takes_float32_only() -> None:
    pixels, weight, bias = problem(0, 32, 32, 3, 1, 4, 4)
    with pytest.raises(RuntimeError, match="takes float32"):
        torch.ops.bevperception.convolve_3x3(pixels.double(), weight, bias, True)
    rows = torch.zeros(16, 32), pixels.flatten(0, 2), weight[:, :, 0, 0].double(), bias
    with pytest.raises(RuntimeError, match="takes float32"):
        torch.ops.bevperception.convolve_1x1_(*rows, False, True)


@pytest.mark.parametrize(
    ("result", "pixels", "weight", "bias", "message"),
    [
        ((5, 32), (6, 32), (32, 32), (32,), "the result has a shape"),
        ((6, 32), (6, 32), (32, 64), (32,), "the weight has a shape"),
        ((6, 32), (6, 32), (32, 32), (31,), "the bias has a shape"),
        ((6, 33), (6, 32), (33, 32), (33,), "multiples of 32"),
        ((6, 32), (6, 32, 1), (32, 32), (32,), "2 dimensions"),
    ],
)
def test_1x1_says_what_does_not_fit(
    result: tuple[int, ...],
    pixels: tuple[int, ...],
    weight: tuple[int, ...],
    bias: tuple[int, ...],
    message: str,
) -> None:
    tensors = [torch.zeros(shape) for shape in (result, pixels, weight, bias)]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bevperception.convolve_1x1_(*tensors, False, True)


def test_1x1_writes_to_contiguous_memory_only() -> None:
    with pytest.raises(RuntimeError, match="must be contiguous"):
        torch.ops.bevperception.convolve_1x1_(
            torch.zeros(6, 64)[:, ::2], torch.zeros(6, 32), torch.zeros(32, 32), torch.zeros(32), False, True
        )


def test_opcheck() -> None:
    pixels, weight, bias = problem(3, 64, 32, 3, 2, 5, 6)
    torch.library.opcheck(torch.ops.bevperception.convolve_3x3.default, (pixels, weight, bias, True))
    rows = torch.randn(60, 64), pixels.flatten(0, 2), weight[:, :, 0, 0], bias
    torch.library.opcheck(torch.ops.bevperception.convolve_1x1_.default, (*rows, True, False))


@needs_amx
@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 14), st.integers(1, 14)),
    inputs=st.one_of(CHANNELS, st.integers(1, 32)),
    outputs=CHANNELS,
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    adds=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_split_of_any_size(
    size: tuple[int, ...],
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int,
    padding: int,
    activation: str,
    adds: bool,
    seed: int,
) -> None:
    padding = min(padding, kernel - 1)
    assume(min(size[1:]) + 2 * padding >= kernel)
    pixels, weight, bias = problem(seed, outputs, inputs, kernel, *size)
    maps = pixels.permute(0, 3, 1, 2).double()
    expected = functional.conv2d(maps, weight.double(), bias.double(), stride, padding).permute(0, 2, 3, 1)
    held = torch.randn(expected.shape)
    result = held.clone() if adds else torch.full_like(held, float("nan"))
    expected = expected + held.double() if adds else expected
    torch.ops.bevperception.convolve_split_(result, pixels, weight, bias, stride, padding, adds, activation)
    # As exact as sums of float32 numbers can be.
    torch.testing.assert_close(result.double(), ACTIVATIONS[activation](expected), rtol=0, atol=2e-6)


@needs_amx
@pytest.mark.parametrize(("inputs", "outputs", "kernel"), [(2048, 32, 1), (96, 160, 3), (3, 64, 7)])
def test_split_sums_are_as_exact_as_of_float32(inputs: int, outputs: int, kernel: int) -> None:
    """For numbers of any size, over several rounds of steps, many blocks, any number of threads."""
    pixels, weight, bias = problem(4, outputs, inputs, kernel, 2, 23, 31)
    generator = torch.Generator().manual_seed(4)
    pixels = pixels * 10.0 ** torch.randint(-15, 15, (inputs,), generator=generator)
    weight = weight * 10.0 ** torch.randint(-15, 15, (outputs, 1, 1, 1), generator=generator)
    exact = direct(pixels, weight, bias, False)
    results = []
    for count in (1, 2, 5):
        result = torch.empty(2, 23, 31, outputs)
        with threads(count):
            torch.ops.bevperception.convolve_split_(
                result, pixels, weight, bias, 1, kernel // 2, False, "none"
            )
        results.append(result)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    magnitude = direct(pixels.abs(), weight.abs(), bias.abs(), False)
    error = (results[0] - exact) / magnitude
    # What rounding while summing up leaves in float32 throughout.
    assert error.pow(2).mean().sqrt() < 2.0**-23
    assert error.abs().max() < 2.0**-20


@needs_amx
def test_split_batch_is_as_its_images_alone() -> None:
    pixels, weight, bias = problem(1, 64, 32, 3, 3, 7, 9)
    results = [torch.empty(count, 4, 5, 64) for count in (3, 1, 1, 1)]
    for result, first in zip(results, (0, 0, 1, 2), strict=True):
        images = pixels[first : first + len(result)]
        torch.ops.bevperception.convolve_split_(result, images, weight, bias, 2, 1, False, "relu")
    assert torch.equal(results[0], torch.cat(results[1:]))


@needs_amx
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_split_makes_what_is_no_number_nan(value: float, activation: str) -> None:
    """Of whatever sees it, and of nothing else."""
    pixels, weight, bias = problem(2, 32, 32, 3, 2, 9, 13)
    pixels[0, 4, 6, 5] = value
    result = torch.empty(2, 9, 13, 32)
    torch.ops.bevperception.convolve_split_(result, pixels, weight, bias, 1, 1, False, activation)
    assert result[0, 3:6, 5:8].isnan().all()
    result[0, 3:6, 5:8] = 0
    assert result.isfinite().all()


@needs_amx
def test_split_leaves_the_tiles_to_others() -> None:
    """oneDNN multiplies bfloat16 numbers by the same registers."""
    left, right = torch.randn(64, 96).bfloat16(), torch.randn(96, 64).bfloat16()
    expected = left @ right
    pixels, weight, bias = problem(5, 32, 32, 1, 1, 9, 13)
    torch.ops.bevperception.convolve_split_(
        torch.empty(1, 9, 13, 32), pixels, weight, bias, 1, 0, False, "relu"
    )
    assert torch.equal(left @ right, expected)


@needs_amx
@pytest.mark.parametrize(
    ("result", "pixels", "weight", "bias", "stride", "padding", "message"),
    [
        ((1, 4, 4, 32), (1, 4, 4, 32), (32, 32, 3, 3), (32,), 1, 0, "the result has a shape"),
        ((1, 4, 4, 32), (1, 4, 4, 32), (32, 64, 3, 3), (32,), 1, 1, "the weight has a shape"),
        ((1, 4, 4, 32), (1, 4, 4, 32), (32, 32, 3, 1), (32,), 1, 1, "the weight has a shape"),
        ((1, 4, 4, 32), (1, 4, 4, 32), (32, 32, 3, 3), (64,), 1, 1, "the bias has a shape"),
        ((1, 4, 4, 32), (1, 4, 4, 57), (32, 57, 3, 3), (32,), 1, 1, "multiples of 32, got 57 and 32"),
        ((1, 4, 4, 32), (1, 4, 4, 600), (32, 600, 1, 1), (32,), 1, 0, "multiples of 32, got 600 and 32"),
        ((1, 4, 4, 32), (1, 4, 4, 0), (32, 0, 1, 1), (32,), 1, 0, "multiples of 32, got 0 and 32"),
        ((1, 4, 4, 40), (1, 4, 4, 32), (40, 32, 1, 1), (40,), 1, 0, "multiples of 32"),
        ((1, 4, 4, 32), (4, 4, 32), (32, 32, 3, 3), (32,), 1, 1, "4 dimensions"),
        ((1, 4, 4, 32), (1, 4, 4, 32), (32, 32, 3, 3), (32,), 0, 1, "must be 1 to 1024"),
        ((1, 4, 4, 32), (1, 4, 4, 32), (32, 32, 3, 3), (32,), 2**62, 1, "must be 1 to 1024"),
        ((1, 4, 4, 32), (1, 4, 4, 32), (32, 32, 3, 3), (32,), 1, 3, "less than the kernel, got 3, 1 and 3"),
        ((1, 4, 4, 32), (1, 1, 4, 32), (32, 32, 3, 3), (32,), 1, 0, "as large as the kernel"),
    ],
)
def test_split_says_what_does_not_fit(
    result: tuple[int, ...],
    pixels: tuple[int, ...],
    weight: tuple[int, ...],
    bias: tuple[int, ...],
    stride: int,
    padding: int,
    message: str,
) -> None:
    tensors = [torch.zeros(shape) for shape in (result, pixels, weight, bias)]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bevperception.convolve_split_(*tensors, stride, padding, False, "relu")


@needs_amx
def test_split_empty_strided_and_checked_by_pytorch() -> None:
    pixels, weight, bias = problem(3, 64, 32, 3, 2, 5, 6)
    operator = torch.ops.bevperception.convolve_split_
    operator(torch.empty(0, 5, 6, 64), pixels[:0], weight, bias, 1, 1, False, "relu")
    result = torch.empty(2, 5, 6, 64)
    torch.library.opcheck(operator.default, (result, pixels, weight, bias, 1, 1, True, "none"))
    operator(result, pixels, weight, bias, 1, 1, False, "none")
    strided = torch.empty_like(result)
    pixels = pixels.transpose(1, 3).contiguous().transpose(1, 3)
    operator(strided, pixels, weight.to(memory_format=torch.channels_last), bias, 1, 1, False, "none")
    assert torch.equal(strided, result)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        operator(torch.empty(2, 5, 64, 6).transpose(2, 3), pixels, weight, bias, 1, 1, False, "none")


def test_split_needs_its_unit() -> None:
    pixels, weight, bias = problem(3, 64, 32, 3, 2, 5, 6)
    with cpu_isa("baseline"), pytest.raises(RuntimeError, match="needs the instruction set amx"):
        torch.ops.bevperception.convolve_split_(
            torch.empty(2, 5, 6, 64), pixels, weight, bias, 1, 1, True, "relu"
        )


@needs_amx
def test_split_knows_its_activations() -> None:
    pixels, weight, bias = problem(3, 64, 32, 1, 1, 5, 6)
    result = torch.empty(1, 5, 6, 64)
    with pytest.raises(RuntimeError, match="must be none, relu, gelu or silu, got 'tanh'"):
        torch.ops.bevperception.convolve_split_(result, pixels, weight, bias, 1, 0, False, "tanh")
