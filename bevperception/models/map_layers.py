"""Layers on maps that several parts share: normalisation by name and a residual block."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

MapNorm = Literal["batch", "group"]


def build_norm(name: MapNorm, channels: int, groups: int = 8) -> nn.Module:
    """Batch normalisation, or group normalisation, for which a batch of n equals n singles in training too.

    Args:
        name: 'batch' or 'group'.
        channels: width of the maps (B, channels, h, w).
        groups: largest number of groups, a power of two; fewer where they do not divide the width.
    """
    if name == "batch":
        return nn.BatchNorm2d(channels)
    while channels % groups:
        groups //= 2
    return nn.GroupNorm(groups, channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a residual sum (ResNet's basic block at stride 1).

    Args:
        in_channels, channels: width before and after; where they differ, the shortcut is a 3x3 convolution
            with a norm.
        norm: 'batch' or 'group'.
    """

    def __init__(self, in_channels: int, channels: int, norm: MapNorm = "group") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm1 = build_norm(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = build_norm(norm, channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), build_norm(norm, channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) to (B, channels, h, w)."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.shortcut(x) + self.norm2(self.conv2(y)))
