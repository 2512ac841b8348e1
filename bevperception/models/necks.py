"""The feature pyramid between the image backbone and the BEV encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from bevperception.errors import ConfigError


class FPN(nn.Module):
    """Feature pyramid (Lin et al., Feature Pyramid Networks, CVPR 2017), as in mmdet 2.14.

    Levels beyond the backbone's are made by strided convolutions of the last output
    (``add_extra_convs='on_output'``); a ReLU stands before the second and later of them, not the first.

    Args:
        in_channels: channels of the backbone's maps, fine to coarse.
        out_channels: channels of every output.
        levels: outputs; at least as many as inputs.
        relu_before_extra: False leaves the ReLUs between extra levels out.

    Raises:
        ConfigError: fewer levels than inputs are asked for.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        levels: int,
        *,
        relu_before_extra: bool = True,
    ) -> None:
        super().__init__()
        if levels < len(in_channels):
            raise ConfigError(
                f"neck.levels ({levels}) is less than the {len(in_channels)} stages of "
                "backbone.out_indices: ask the backbone for fewer stages"
            )
        self.relu_before_extra = relu_before_extra
        self.laterals = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.outputs = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, stride=1 if i < len(in_channels) else 2, padding=1)
            for i in range(levels)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Compute the pyramid.

        Args:
            features: one (N, C_i, h_i, w_i) per input, fine to coarse, of any sizes.

        Returns:
            ``levels`` maps (N, out_channels, h, w): the inputs' sizes, then halved (rounded up) each.
        """
        merged = [lateral(x) for lateral, x in zip(self.laterals, features, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:])
        outputs: list[Tensor] = []
        for i, convolution in enumerate(self.outputs):
            if i < len(merged):
                outputs.append(convolution(merged[i]))
            else:
                relu = self.relu_before_extra and i > len(merged)
                outputs.append(convolution(F.relu(outputs[-1]) if relu else outputs[-1]))
        return outputs
