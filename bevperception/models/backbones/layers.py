"""Small layers that the backbones share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor, nn

from bevperception.errors import ConfigError
from bevperception.models.precision import LayerNorm

Norm = Literal["layer", "batch"]
Activation = Literal["gelu", "relu", "silu"]

LAYER_NORM_EPS = 1e-6

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for whole samples while training.

    A kept branch is divided by the probability of keeping it, so the expected output is the input.
    Source: Huang et al., Deep Networks with Stochastic Depth, 2016.

    Args:
        rate: probability of dropping a sample's branch, 0 <= rate < 1.

    Raises:
        ConfigError: the rate lies outside that range.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ConfigError(f"drop path rate must lie in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """Drop samples of a branch (N, ...); the input itself in evaluation or at rate 0."""
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        kept = branch.new_empty((branch.shape[0],) + (1,) * (branch.ndim - 1)).bernoulli_(keep)
        return branch * (kept / keep)

    def extra_repr(self) -> str:
        """The rate, for printing the module."""
        return f"rate={self.rate:.3g}"


class ChannelsLastBatchNorm(nn.BatchNorm2d):
    """Batch normalisation of (N, H, W, C)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel of (N, H, W, C)."""
        return channels_last(super().forward(channels_first(input)))


def make_norm(channels: int, kind: Norm = "layer") -> nn.Module:
    """Normalisation of the last dimension: layer norm (eps 1e-6, as published) or batch norm."""
    if kind == "batch":
        return ChannelsLastBatchNorm(channels)
    return LayerNorm(channels, eps=LAYER_NORM_EPS)


def make_activation(kind: Activation) -> nn.Module:
    """An activation by name."""
    return _ACTIVATIONS[kind]()


def channels_first(features: Tensor) -> Tensor:
    """View (N, H, W, C) as (N, C, H, W), in channels_last memory where the input is contiguous."""
    return features.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


def channels_last(features: Tensor) -> Tensor:
    """View (N, C, H, W) as (N, H, W, C), contiguous where the input lies in channels_last memory."""
    return features.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)


def freeze(module: nn.Module) -> None:
    """Put a module into evaluation mode and let none of its parameters train."""
    module.eval()
    module.requires_grad_(False)


def check_stages(out_indices: Iterable[int], frozen_stages: int, stages: int) -> tuple[int, ...]:
    """Check the stages a backbone hands out and freezes.

    Args:
        out_indices: stages to hand out, from 0.
        frozen_stages: -1 for none, 0 for the stem, k for the stem and the first k stages.
        stages: number of stages of the variant.

    Returns:
        ``out_indices`` as a tuple.

    Raises:
        ConfigError: out_indices is empty, out of range or not strictly ascending, or frozen_stages
            is out of range.
    """
    indices = tuple(out_indices)
    ascending = indices == tuple(sorted(set(indices)))
    if not indices or not ascending or indices[0] < 0 or indices[-1] >= stages:
        raise ConfigError(
            f"backbone.out_indices must be ascending stages from 0 to {stages - 1}, got {list(indices)}"
        )
    if not -1 <= frozen_stages <= stages:
        raise ConfigError(f"backbone.frozen_stages must lie in -1 ... {stages}, got {frozen_stages}")
    return indices


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as transformers do: truncated normal of deviation 0.02, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
