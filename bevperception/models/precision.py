"""What a CPU trains faster in float32 than in the half precision of autocast: backward of norm and attention.

PyTorch's CPU kernels of both are several times slower backward in bfloat16 than in float32, casts included.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` that trains in float32 under autocast on a CPU; its result is float32 there."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimensions of a tensor of any shape."""
        if not _trains_in_half(input):
            return super().forward(input)
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
    half = _trains_in_half(query)
    tensors = [x.float() if half else x for x in (query, key, value)]
    context: AbstractContextManager[object] = torch.autocast("cpu", enabled=False) if half else nullcontext()
    with context:
        return functional.scaled_dot_product_attention(
            tensors[0], tensors[1], tensors[2], attn_mask=mask, dropout_p=dropout
        )


def _trains_in_half(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
