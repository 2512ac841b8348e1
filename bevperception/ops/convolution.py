"""Convolution, batch norm, residual sum and ReLU for prediction on CPUs: one pass over memory, not four."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bevperception.malloc import reusable_empty
from bevperception.ops import native
from bevperception.ops.backend import requested_backend

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
ONEDNN_HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_FAST_ISAS = ("amx", "avx512", "avx2")
_FEW_CHANNELS, _FEW_CHANNELS_WITH_AMX = 128, 64
"""Up to which, at either end, a 1x1 convolution waits for memory more than it computes."""
_MANY_WEIGHTS = 512 * 512
"""Of channels: from which on a 3x3 convolution's transformed kernels take longer to fetch than they spare."""
_DEPTH_OF_FEW_CHANNELS = 512
"""Inputs times taps: up to which the native operator by split numbers takes any number of inputs."""
_DTYPES = (torch.float32, torch.bfloat16) if ONEDNN_HAS_BFLOAT16 else (torch.float32,)


def convolve(
    x: Tensor,
    convolution: nn.Conv2d,
    norm: nn.BatchNorm2d,
    *,
    shortcut: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """``relu(norm(convolution(x)) + shortcut)``.

    A batch norm that only predicts is a factor and a shift of every channel: the convolution can take them
    in, and oneDNN adds the shortcut and clamps while the result is still in the cache. That way is taken for
    prediction on CPUs, under autocast to bfloat16 too; with gradients, norms that go by the batch, other
    dtypes or devices, the reference backend, and while compiling, the layers are called one after the other.

    In float32, where the native operators are built and the CPU has AVX2, two kinds are theirs. 3x3
    convolutions take a quarter of the multiplications (Winograd's minimal filtering; its rounding errors are
    up to twice a direct sum's, and what is not a number spreads over tiles of 4 x 4 outputs). 1x1
    convolutions of few channels, which in oneDNN wait for memory, fetch ahead what they need next. With AMX
    the others, strided ones and those of images too, take six products of bfloat16 numbers for one of
    float32, which this unit is still faster at and about as exact; what is infinite, or above 3.38e38,
    becomes NaN.

    Args:
        x: (N, C_in, H, W).
        convolution: with zeros around the map and without a bias.
        norm: of its outputs, with factors, shifts and running statistics.
        shortcut: (N, C, H', W') or None; the result may overwrite it, so nobody else may need it.
        relu: clamp the result at zero from below.

    Returns:
        (N, C, H', W') in the dtype that the layers give, the same by every way: the map's, or autocast's. A
        shortcut of another dtype is converted.
    """
    if _is_fast(x, convolution, norm, shortcut):
        return _convolve_at_once(x, convolution, norm, shortcut, relu)
    result: Tensor = norm(convolution(x))
    if shortcut is not None:
        result = result + shortcut.to(result.dtype)
    return result.relu_() if relu else result


def _is_fast(x: Tensor, convolution: nn.Conv2d, norm: nn.BatchNorm2d, shortcut: Tensor | None) -> bool:
    learned = [convolution.weight, norm.weight, norm.bias]
    tensors = [x, *learned] if shortcut is None else [x, *learned, shortcut]
    return (
        _HAS_ONEDNN
        and not torch.compiler.is_compiling()
        and requested_backend() != "reference"
        and not norm.training
        and x.numel() > 0
        and all(t.device.type == "cpu" for t in tensors)
        and all(t.dtype == torch.float32 for t in learned)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and _dtype(x) in _allowed_dtypes()
    )


def _allowed_dtypes() -> tuple[torch.dtype, ...]:
    """Of results: float32, as the weights are; autocast may ask for bfloat16 where oneDNN computes in it."""
    return _DTYPES if torch.is_autocast_enabled("cpu") else _DTYPES[:1]


def _convolve_1x1(x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """The native 1x1 convolution, (N, C_in, H, W) to (N, C, H, W); into the shortcut's memory if it can."""
    pixels = x.permute(0, 2, 3, 1)
    result = _pixels_of_result(pixels, (*pixels.shape[:3], weight.shape[0]), shortcut)
    torch.ops.bevperception.convolve_1x1_(
        result.flatten(0, 2), pixels.flatten(0, 2), weight.flatten(1), bias, shortcut is not None, relu
    )
    return result.permute(0, 3, 1, 2)


def _convolve_split(
    x: Tensor, weight: Tensor, bias: Tensor, convolution: nn.Conv2d, shortcut: Tensor | None, relu: bool
) -> Tensor:
    """The convolution by split numbers, (N, C_in, H, W) to (N, C, H', W'); as :func:`_convolve_1x1`."""
    pixels = x.permute(0, 2, 3, 1)
    stride, padding, kernel = convolution.stride[0], int(convolution.padding[0]), convolution.kernel_size[0]
    height, width = ((size + 2 * padding - kernel) // stride + 1 for size in pixels.shape[1:3])
    result = _pixels_of_result(pixels, (len(x), height, width, weight.shape[0]), shortcut)
    activation = "relu" if relu else "none"
    torch.ops.bevperception.convolve_split_(
        result, pixels, weight, bias, stride, padding, shortcut is not None, activation
    )
    return result.permute(0, 3, 1, 2)


def _pixels_of_result(pixels: Tensor, shape: tuple[int, ...], shortcut: Tensor | None) -> Tensor:
    """Memory for a result (N, H', W', C): the shortcut's, if it is contiguous so."""
    if shortcut is None:
        return reusable_empty(*shape)
    return shortcut.to(pixels.dtype).permute(0, 2, 3, 1).contiguous()


def _is_winograd(convolution: nn.Conv2d) -> bool:
    """Whether the native 3x3 convolution can take it, and is the fastest."""
    return (
        _is_plain(convolution, (3,))
        and _has_whole_channels(convolution)
        and convolution.stride == (1, 1)
        and not (_has_amx() and convolution.in_channels * convolution.out_channels >= _MANY_WEIGHTS)
    )


def _is_thin(convolution: nn.Conv2d) -> bool:
    """Whether the native 1x1 convolution can take it, and is the fastest."""
    few = min(convolution.in_channels, convolution.out_channels)
    return (
        _is_plain(convolution, (1,))
        and _has_whole_channels(convolution)
        and convolution.stride == (1, 1)
        and few <= (_FEW_CHANNELS_WITH_AMX if _has_amx() else _FEW_CHANNELS)
    )


def _is_split(convolution: nn.Conv2d) -> bool:
    """Whether the convolution by split numbers can take it, and is the fastest, but for those above."""
    if not _has_amx():
        return False
    if _has_whole_channels(convolution):
        return _is_plain(convolution, (1, 3))
    depth = convolution.in_channels * convolution.kernel_size[0] ** 2
    return (
        _is_plain(convolution, (3, 5, 7))
        and depth <= _DEPTH_OF_FEW_CHANNELS
        and convolution.out_channels % 32 == 0
    )


def _has_amx() -> bool:
    return native.STATUS.loaded and native.cpu_isa() == "amx"


def _has_whole_channels(convolution: nn.Conv2d) -> bool:
    return convolution.in_channels % 32 == convolution.out_channels % 32 == 0


def _is_plain(convolution: nn.Conv2d, sizes: tuple[int, ...]) -> bool:
    """Whether it is dense, its kernel square, of one of these sizes, around its pixel, and so its stride."""
    size = convolution.kernel_size[0]
    return (
        native.STATUS.loaded
        and native.cpu_isa() in _FAST_ISAS
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and size in sizes
        and convolution.kernel_size == (size, size)
        and convolution.padding == (size // 2, size // 2)
        and convolution.stride == convolution.stride[:1] * 2
    )


def _dtype(x: Tensor) -> torch.dtype:
    """Of the result: what autocast asks for, otherwise the map's own; autocast leaves float64 as it is."""
    is_cast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if is_cast else x.dtype


def _convolve_at_once(
    x: Tensor, convolution: nn.Conv2d, norm: nn.BatchNorm2d, shortcut: Tensor | None, relu: bool
) -> Tensor:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    # Folded anew every time: a hundredth of the convolution's own work, and never out of date.
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = convolution.weight * factor[:, None, None, None]
    bias = norm.bias - norm.running_mean * factor
    dtype = _dtype(x)
    x, weight, bias = x.to(dtype, memory_format=torch.channels_last), weight.to(dtype), bias.to(dtype)
    shape = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
    pixels: Tensor
    result: Tensor
    if dtype == torch.float32 and _is_thin(convolution):
        return _convolve_1x1(x, weight, bias, shortcut, relu)
    if shortcut is None and dtype == torch.float32 and _is_winograd(convolution):
        pixels = torch.ops.bevperception.convolve_3x3(x.permute(0, 2, 3, 1), weight, bias, relu)
        return pixels.permute(0, 3, 1, 2)
    if dtype == torch.float32 and _is_split(convolution):
        return _convolve_split(x, weight, bias, convolution, shortcut, relu)
    if shortcut is None:
        activation = "relu" if relu else "none"
        result = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *shape, activation, [], "")
    else:
        # Into the shortcut's memory: fresh memory of this size costs as much as the sum itself.
        shortcut = shortcut.to(dtype, memory_format=torch.channels_last)
        activation_after = "relu" if relu else None
        result = torch.ops.mkldnn._convolution_pointwise_.binary(
            shortcut, x, weight, bias, *shape, "add", 1.0, activation_after, [], ""
        )
    return result
