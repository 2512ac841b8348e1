"""The network that fuses the BEV features of several frames: concatenation and residual blocks.

The temporal encoder of BEVFormer v2 (Yang et al., CVPR 2023, section 3.4): the BEV features of every frame
come from that frame alone, so a vehicle keeps them and only warps them when a new frame comes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bevperception.config_model import ModelConfig
from bevperception.models.map_layers import MapNorm, ResidualBlock
from bevperception.models.precision import LayerNorm


class FusionNetwork(nn.Module):
    """Concatenation of frames along the channels, residual blocks, a linear layer.

    Args:
        channels: width of the BEV features.
        frames: how many are fused, the current one included.
        inner_channels: width of the residual blocks; None takes frames * channels, as published.
        blocks: residual blocks, at least one.
        norm: 'batch' (published) or 'group'.
        coverage: one more input channel for every frame but the current, 1 in cells that the frame's map
            covers and 0 where nothing is known.
        residual: add the result to the current frame's features, beginning with nothing; otherwise it
            replaces them, after a LayerNorm, as published.
        checkpointing: recompute activations in backward.

    Source: ResNetFusion of the published BEVFormer v2 for coverage and residual False.
    """

    def __init__(
        self,
        channels: int,
        frames: int,
        *,
        inner_channels: int | None = None,
        blocks: int = 2,
        norm: MapNorm = "group",
        coverage: bool = True,
        residual: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.coverage, self.residual, self.checkpointing = coverage, residual, checkpointing
        width = frames * channels + (frames - 1 if coverage else 0)
        inner = inner_channels or frames * channels
        self.blocks = nn.ModuleList(
            ResidualBlock(width if i == 0 else inner, inner, norm) for i in range(blocks)
        )
        self.projection = nn.Linear(inner, channels)
        self.norm = nn.Identity() if residual else LayerNorm(channels)
        if residual:
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)

    def forward(self, maps: Sequence[Tensor], coverages: Sequence[Tensor], current: int) -> Tensor:
        """Fuse.

        Args:
            maps: the frames in order of time, (B, C, rows, columns) each, in the current BEV frame.
            coverages: (B, rows, columns) in [0, 1] of every frame but the current, in the same order; not
                looked at unless the module has coverage channels.
            current: position of the current frame in ``maps``.

        Returns:
            (B, C, rows, columns).
        """
        # Channels last, as warping leaves them: faster on a CPU.
        # (B, C, rows, columns) -> (B, rows, columns, C)
        parts = [x.permute(0, 2, 3, 1) for x in maps]
        if self.coverage:
            parts.append(torch.stack(list(coverages), dim=-1).to(maps[current].dtype))
        x = torch.cat(parts, dim=-1).permute(0, 3, 1, 2)  # (B, frames*C + coverages, rows, columns)
        for block in self.blocks:
            recompute = self.checkpointing and torch.is_grad_enabled() and x.requires_grad
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        # (B, inner, rows, columns) -> (B, C, rows, columns)
        fused: Tensor = self.norm(self.projection(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return maps[current] + fused if self.residual else fused


def build_fusion(config: ModelConfig) -> FusionNetwork | None:
    """The network that a model's settings ask for; None for a model that fuses no frames."""
    settings = config.temporal
    if settings.recurrent or settings.single_frame:
        return None
    published = settings.published_fusion
    return FusionNetwork(
        config.bev.channels,
        settings.frames,
        inner_channels=settings.inner_channels,
        blocks=settings.blocks,
        norm="batch" if published else "group",
        coverage=not published,
        residual=not published,
        checkpointing=config.backbone.checkpointing,
    )
