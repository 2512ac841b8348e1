"""The one place that knows what the detection head regresses.

A box code has ten entries: (cx, cy, log width, log length, cz, log height, sin yaw, cos yaw, vx, vy),
centres in metres in the BEV frame (the published BEVFormer's, from mmdet3d 0.17).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

CODE_SIZE = 10
CODE_CENTRE = (0, 1, 4)
"""Entries of the code that hold x, y, z; they are refined from layer to layer."""

YawConvention = Literal["standard", "mmdet3d_0.17"]


def flip_yaw_convention(yaw_rad: Tensor) -> Tensor:
    """Yaw counter-clockwise from x (ours, nuScenes) to mmdet3d 0.17's LiDAR yaw, and back.

    Args:
        yaw_rad: (...) radians.

    Returns:
        (...) ``-yaw - pi / 2``, not wrapped; the map is its own inverse.
    """
    return -yaw_rad - math.pi / 2


class BoxCodec:
    """Boxes to codes and back.

    Args:
        yaw_convention: 'standard', or 'mmdet3d_0.17' for the published checkpoints.
    """

    def __init__(self, yaw_convention: YawConvention = "standard") -> None:
        self.yaw_convention = yaw_convention

    def encode(self, boxes: Tensor) -> Tensor:
        """Codes of boxes.

        Args:
            boxes: (..., 9) rows as in ``geometry.BOX_COLUMNS``; sizes positive, velocity may be NaN.

        Returns:
            (..., 10).
        """
        x, y, z, length, width, height, yaw, vx, vy = boxes.unbind(-1)
        yaw = self._convert(yaw)
        entries = (x, y, width.log(), length.log(), z, height.log(), yaw.sin(), yaw.cos(), vx, vy)
        return torch.stack(entries, dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Boxes of codes; the inverse of :meth:`encode` up to whole turns of yaw.

        Args:
            codes: (..., 10).

        Returns:
            (..., 9).
        """
        x, y, log_width, log_length, z, log_height, sin, cos, vx, vy = codes.unbind(-1)
        yaw = self._convert(torch.atan2(sin, cos))
        entries = (x, y, z, log_length.exp(), log_width.exp(), log_height.exp(), yaw, vx, vy)
        return torch.stack(entries, dim=-1)

    def _convert(self, yaw: Tensor) -> Tensor:
        return flip_yaw_convention(yaw) if self.yaw_convention == "mmdet3d_0.17" else yaw
