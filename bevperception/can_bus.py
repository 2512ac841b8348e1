"""The 18-number CAN-bus vector of the published BEVFormer, as models and data both see it.

Layout: position 3 (metres, global), orientation 4 (w, x, y, z, global), acceleration 3, rotation rate 3,
velocity 3, ego yaw in radians, ego yaw in degrees. Absolute outside the model; the model looks at
differences to the frame in its memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

CAN_BUS_SIZE = 18


def relative_can_bus(current: Tensor, previous: Tensor, valid: Tensor) -> Tensor:
    """CAN-bus vectors as the published model takes them: position and yaw in degrees as differences.

    Args:
        current: (B, 18) absolute.
        previous: (B, 18) absolute, of the frame in memory; ignored where not valid.
        valid: (B,) bool, False for samples without history, whose differences are zero.

    Returns:
        (B, 18): ``[:3]`` displacement in metres in the global frame, ``[-1]`` change of yaw in degrees,
        not wrapped (it may be about 359); ``[-2]`` stays the absolute yaw in radians.
    """
    result = current.clone()
    moved = valid[:, None]
    zero = torch.zeros_like(current)
    result[:, :3] = torch.where(moved, current - previous, zero)[:, :3]
    result[:, -1:] = torch.where(moved, current - previous, zero)[:, -1:]
    return result
