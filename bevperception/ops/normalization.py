"""Layer norm and softmax for prediction on CPUs: PyTorch's own are slow on rows of few numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bevperception.ops import native
from bevperception.ops.backend import predicts_on_cpu

_DTYPES = (torch.float32, torch.float64)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Normalise the last dimension; as :func:`torch.nn.functional.layer_norm`.

    By the native kernel for prediction on CPUs where the native operators are in use: PyTorch's own spends
    most of its time between the rows when these hold a small backbone's 8 to 64 numbers.

    Args:
        x: (..., C), float32, float64, or bfloat16 with float32 parameters.
        weight, bias: (C,).
        epsilon: added to the variance.

    Returns:
        (..., C) in the dtype of ``x``.
    """
    parameters = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    if _is_fast(x, weight, bias) and weight.dtype == bias.dtype == parameters and parameters in _DTYPES:
        result: Tensor = torch.ops.bevperception.layer_norm(x, weight, bias, epsilon)
        return result
    return functional.layer_norm(x, weight.shape, weight, bias, epsilon)


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension; as :func:`torch.softmax`.

    Rows may hold few numbers, such as the nine points of a deformable convolution: the native kernel is used
    as in :func:`layer_norm`.

    Args:
        logits: (..., n) of any floating-point dtype.

    Returns:
        (..., n) in the same dtype.
    """
    if not _is_fast(logits):
        return logits.softmax(-1)
    working = logits if logits.dtype in _DTYPES else logits.float()
    result: Tensor = torch.ops.bevperception.softmax(working)
    return result.to(logits.dtype)


def _is_fast(*tensors: Tensor) -> bool:
    return (
        native.STATUS.loaded and predicts_on_cpu(*tensors) and tensors[0].dim() > 0 and tensors[0].numel() > 0
    )
