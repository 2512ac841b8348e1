"""Convolution, batch norm, residual sum and ReLU by oneDNN, for prediction on CPUs: one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bevperception.ops.backend import predicts_on_cpu

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
ONEDNN_HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
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

    Args:
        x: (N, C_in, H, W).
        convolution: with zeros around the map and without a bias; one of a class of its own is called itself.
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
        and type(convolution) is nn.Conv2d
        and predicts_on_cpu(*tensors)
        and not norm.training
        and x.numel() > 0
        and all(t.dtype == torch.float32 for t in learned)
        and _dtype(x) in _allowed_dtypes()
    )


def _allowed_dtypes() -> tuple[torch.dtype, ...]:
    """Of results: float32, as the weights are; autocast may ask for bfloat16 where oneDNN computes in it."""
    return _DTYPES if torch.is_autocast_enabled("cpu") else _DTYPES[:1]


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
    result: Tensor
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
