"""Compare angles up to whole turns."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wrap_angle(angle_rad: Tensor) -> Tensor:
    """The same angles in [-pi, pi).

    Args:
        angle_rad: (...) radians.
    """
    return torch.remainder(angle_rad + math.pi, 2 * math.pi) - math.pi
