"""Choice of half precision: which machine computes in bfloat16, and what a CPU trains faster in float32.

PyTorch's CPU kernels of norm and attention are several times slower backward in bfloat16 than in float32,
casts included.
"""

from __future__ import annotations

import platform
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from bevperception.errors import ConfigError
from bevperception.ops.convolution import ONEDNN_HAS_BFLOAT16
from bevperception.ops.normalization import layer_norm

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; others convert back and forth, slower than in float32.

    On CPUs both the processor and oneDNN must: ``ONEDNN_MAX_CPU_ISA`` can take it away from the latter.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not ONEDNN_HAS_BFLOAT16:
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):  # oneDNN claims it on all processors with AVX-512
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return True


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """Lightning's name of the precision to run in.

    Args:
        precision: 'auto' takes bf16-mixed where the device computes in it and 32-true elsewhere; another name
            is returned as it is, with a warning where it will be slow.
        device: where the model runs.

    Raises:
        ConfigError: there is no such precision.
    """
    if precision == "auto":
        return "bf16-mixed" if computes_bfloat16(device) else "32-true"
    if precision not in get_args(Precision):
        raise ConfigError(
            f"precision must be auto or one of {', '.join(get_args(Precision))}, got {precision!r}"
        )
    if precision != "32-true" and device.type == "cpu" and not computes_bfloat16(device):
        warnings.warn(
            f"precision {precision}: this processor does not compute in bfloat16; it takes about ten times "
            "as long as with training.precision 32-true, or auto",
            stacklevel=2,
        )
    return cast(Precision, precision)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` of the last dimension, by the faster kernel where it only predicts.

    It trains in float32 under autocast on a CPU, and its result is float32 there; a frozen one below which
    nothing is trained predicts.

    Args:
        channels: of the last dimension.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension of a tensor of any shape."""
        if not _trains_in_half(input, self.weight, self.bias):
            return layer_norm(input, self.weight, self.bias, self.eps)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention; in float32 where a CPU trains under autocast.

    Args:
        query, key, value: (B, heads, n, channels of a head).
        mask: broadcast to (B, heads, n, n) bool, True where a query may look; None for everywhere.
        dropout: probability of an attention weight to be dropped.

    Returns:
        the shape of ``query``.
    """
    half = _trains_in_half(query, key, value)
    tensors = [x.float() if half else x for x in (query, key, value)]
    context: AbstractContextManager[object] = torch.autocast("cpu", enabled=False) if half else nullcontext()
    with context:
        return functional.scaled_dot_product_attention(
            tensors[0], tensors[1], tensors[2], attn_mask=mask, dropout_p=dropout
        )


def _trains_in_half(*tensors: Tensor) -> bool:
    return (
        tensors[0].device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and any(t.requires_grad for t in tensors)
    )
