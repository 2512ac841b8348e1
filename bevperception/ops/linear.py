"""Linear layers for prediction on CPUs: the same numbers as PyTorch's own, by the faster library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bevperception.ops.backend import predicts_on_cpu

Activation = Literal["none", "relu", "gelu", "silu"]
_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}
_IN_ONEDNN: dict[Activation, tuple[str, str]] = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "silu": ("swish", ""),
}
"""Name and algorithm of each."""
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation = "none") -> Tensor:
    """``x @ weight.T + bias``, if wanted with an activation.

    PyTorch multiplies dense float32 matrices on CPUs by its BLAS, which copies the bias into the result
    first; oneDNN, which it has on board and uses in compiled code, does all in one pass and is a quarter
    faster on AMD processors. That way is taken for prediction. With gradients, in other dtypes, on other
    devices, under autocast, with the reference backend and while compiling it is
    :func:`torch.nn.functional.linear`.

    Args:
        x: (..., in) any number of dimensions.
        weight: (out, in).
        bias: (out,).
        activation: of the result; 'gelu' by the error function.

    Returns:
        (..., out).
    """
    if _is_fast(x, weight, bias):
        name, algorithm = _IN_ONEDNN[activation]
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)
        return result
    return _ACTIVATIONS[activation](functional.linear(x, weight, bias))


def _is_fast(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    tensors = (x, weight, bias)
    return (
        _HAS_ONEDNN
        and predicts_on_cpu(*tensors)
        and x.dim() > 1
        and x.numel() > 0
        and all(t.dtype == torch.float32 for t in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


class Linear(nn.Linear):
    """``torch.nn.Linear`` with a bias, by :func:`linear`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return linear(input, self.weight, self.bias)
