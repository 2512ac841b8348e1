"""Cast the shadows of boxes on the flat ground."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def shadow_points(poses: Array, bounds: Array, sun: Array) -> Array:
    """(n, 8, 2) points on the ground whose convex hulls are the shadows of boxes.

    Args:
        poses: (n, 3) x, y, yaw of the boxes' frames.
        bounds: (n, 6) x, y, z from and to in them.
        sun: (3,) unit vector towards the sun.
    """
    c, s = np.cos(poses[:, 2:3]), np.sin(poses[:, 2:3])
    x, y = bounds[:, [0, 0, 1, 1]], bounds[:, [2, 3, 2, 3]]
    base = np.stack((c * x - s * y, s * x + c * y), axis=-1) + poses[:, None, :2]
    away = -sun[:2] / max(float(sun[2]), 0.2)
    low, high = bounds[:, 4], np.minimum(bounds[:, 5], 14.0)
    return np.concatenate((base + away * low[:, None, None], base + away * high[:, None, None]), axis=1)
