"""The sensor rig: the cameras and the lidar of nuScenes' cars, in plain numbers.

The calibration of one nuScenes car: intrinsics in pixels of 1600 x 900 images, mounts as position and
quaternion (w, x, y, z) of the sensor in the ego frame, and when each camera fires before the end of a
lidar sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FULL_SIZE: Final = (900, 1600)
"""(height, width) in pixels that the intrinsics below are for."""


@dataclass(frozen=True)
class CameraMount:
    """Position, orientation and intrinsics of one camera of the rig.

    Attributes:
        channel: for example CAM_FRONT.
        position_m: in the ego frame.
        rotation_wxyz: camera to ego.
        focal_px, centre_px: of the 1600 x 900 image; square pixels.
        delay_us: when it fires relative to the end of the lidar sweep.
    """

    channel: str
    position_m: tuple[float, float, float]
    rotation_wxyz: tuple[float, float, float, float]
    focal_px: float
    centre_px: tuple[float, float]
    delay_us: int

    def intrinsics(self, image_size: tuple[int, int]) -> Array:
        """(3, 3) camera to pixels of an image of (height, width); pixel centres are whole numbers."""
        scale_y, scale_x = image_size[0] / FULL_SIZE[0], image_size[1] / FULL_SIZE[1]
        return np.array(
            [
                [self.focal_px * scale_x, 0.0, self.centre_px[0] * scale_x],
                [0.0, self.focal_px * scale_y, self.centre_px[1] * scale_y],
                [0.0, 0.0, 1.0],
            ]
        )

    def camera_to_ego(self) -> tuple[Array, Array]:
        """(3, 3) rotation and (3,) position."""
        return rotation_matrix(self.rotation_wxyz), np.array(self.position_m)


CAMERAS: Final = (
    CameraMount(
        "CAM_FRONT",
        (1.70079, 0.01595, 1.51096),
        (-0.499802, 0.503032, -0.499780, 0.497371),
        1266.42,
        (816.27, 491.51),
        -35491,
    ),
    CameraMount(
        "CAM_FRONT_RIGHT",
        (1.55085, -0.49340, 1.49575),
        (0.206035, -0.202694, 0.682451, -0.671361),
        1260.85,
        (807.97, 495.33),
        -27612,
    ),
    CameraMount(
        "CAM_FRONT_LEFT",
        (1.52388, 0.49463, 1.50933),
        (0.675727, -0.673627, 0.212140, -0.211228),
        1272.60,
        (826.62, 479.75),
        -43107,
    ),
    CameraMount(
        "CAM_BACK",
        (0.02833, 0.00345, 1.57910),
        (0.503787, -0.497402, -0.494185, 0.504550),
        809.22,
        (829.22, 481.78),
        -10426,
    ),
    CameraMount(
        "CAM_BACK_LEFT",
        (1.03569, 0.48480, 1.59097),
        (-0.692419, 0.703162, 0.116483, -0.112033),
        1256.74,
        (792.11, 492.78),
        -528,
    ),
    CameraMount(
        "CAM_BACK_RIGHT",
        (1.01488, -0.48057, 1.56240),
        (-0.122810, 0.132401, 0.700431, -0.690496),
        1259.51,
        (807.25, 501.20),
        -20058,
    ),
)
"""In the order of ``taxonomy.CAMERA_NAMES``."""

LIDAR_CHANNEL: Final = "LIDAR_TOP"
LIDAR_POSITION_M: Final = (0.94371, 0.0, 1.84023)
LIDAR_ROTATION_WXYZ: Final = (0.707796, -0.006492, 0.010646, -0.706307)


def rotation_matrix(quaternion_wxyz: tuple[float, float, float, float]) -> Array:
    """(3, 3) rotation matrix of a quaternion, which is normalised here."""
    w, x, y, z = np.array(quaternion_wxyz) / np.linalg.norm(quaternion_wxyz)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
