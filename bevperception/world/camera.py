"""Project a camera of the rig at one picture size, and look up flat ground and sky in its pixels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bevperception.world.rig import CameraMount

Array = NDArray[np.float64]

NEAR_M: Final = 0.12
"""Nothing nearer than this to the camera's plane is drawn."""


@dataclass(frozen=True)
class Band:
    """Rows of a picture in which the ground is looked up in one level of its picture."""

    start: int
    stop: int
    level: int


class Camera:
    """Projection of one camera, fixed to the ego car.

    Args:
        mount: of the rig.
        image_size: (height, width) in pixels.

    Attributes:
        height, width: of the picture.
        intrinsics: (3, 3).
        to_ego: (3, 3) rotation camera to ego.
        position: (3,) in the ego frame.
    """

    def __init__(self, mount: CameraMount, image_size: tuple[int, int]) -> None:
        self.height, self.width = image_size
        self.intrinsics = mount.intrinsics(image_size)
        self.to_ego, self.position = mount.camera_to_ego()
        self.focal_px = float(self.intrinsics[0, 0])

    def to_global(self, ego_pose: Array) -> tuple[Array, Array]:
        """(3, 3) rotation camera to global and (3,) position, for an ego pose (x, y, yaw)."""
        c, s = np.cos(ego_pose[2]), np.sin(ego_pose[2])
        turn = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
        return turn @ self.to_ego, turn @ self.position + [ego_pose[0], ego_pose[1], 0.0]

    @cached_property
    def side_planes(self) -> Array:
        """(4, 3) unit normals, inwards, of the planes through the picture's edges, camera frame."""
        k = self.intrinsics
        planes = np.array(
            [
                [k[0, 0], 0.0, k[0, 2] + 0.5],
                [-k[0, 0], 0.0, self.width - 0.5 - k[0, 2]],
                [0.0, k[1, 1], k[1, 2] + 0.5],
                [0.0, -k[1, 1], self.height - 0.5 - k[1, 2]],
            ]
        )
        return np.asarray(planes / np.linalg.norm(planes, axis=1, keepdims=True))

    def project(self, points: Array) -> Array:
        """(n, 2) pixels of (n, 3) camera-frame points; those behind the near plane mean nothing."""
        k = self.intrinsics
        depth = np.maximum(points[:, 2:], NEAR_M)
        return np.asarray(points[:, :2] / depth * [k[0, 0], k[1, 1]] + [k[0, 2], k[1, 2]])

    @cached_property
    def rays(self) -> Array:
        """(height, width, 3) directions through the pixels' centres, ego frame, 1 along the optical axis."""
        u, v = np.meshgrid(np.arange(self.width), np.arange(self.height))
        pixels = np.stack((u, v, np.ones_like(u)), axis=-1).astype(np.float64)
        return np.asarray(pixels @ (self.to_ego @ np.linalg.inv(self.intrinsics)).T)

    @cached_property
    def ground_distance(self) -> Array:
        """(height, width) metres to the ground along the ground; infinite above the horizon."""
        down = -self.rays[..., 2]
        flat = np.linalg.norm(self.rays[..., :2], axis=-1)
        return np.where(down > 1e-6, flat * self.position[2] / np.maximum(down, 1e-6), np.inf)

    @property
    def elevation(self) -> Array:
        """(height, width) angle of the pixels above the horizon in radians."""
        return np.asarray(np.arctan2(self.rays[..., 2], np.linalg.norm(self.rays[..., :2], axis=-1)))

    @cached_property
    def ground_homography(self) -> Array:
        """(3, 3) pixels (u, v, 1) to the ground in the ego frame (x, y, 1), up to scale."""
        direction = self.to_ego @ np.linalg.inv(self.intrinsics)
        x, y, z = self.position
        return np.stack(
            (x * direction[2] - z * direction[0], y * direction[2] - z * direction[1], direction[2])
        )

    def ground_bands(self, texel_m: float, levels: int, subrows: int) -> list[Band]:
        """Rows that see the ground, each with the level that is as fine as the picture there.

        Args:
            texel_m: metres a pixel of the finest level.
            levels: how many there are.
            subrows: samples a row.
        """
        sees = np.isfinite(self.ground_distance)
        start = int(np.argmax(sees.any(axis=1)))
        distance = np.where(sees, self.ground_distance, 1e4).min(axis=1)[start:]
        along = distance**2 / (self.focal_px * self.position[2]) / subrows
        across = distance / self.focal_px
        wanted = np.log2(np.maximum(np.maximum(across, 0.6 * along), 1e-6) / texel_m)
        level = np.clip(np.floor(wanted + 0.5), 0, levels - 1).astype(int)
        edges = [0, *(np.flatnonzero(np.diff(level)) + 1).tolist(), len(level)]
        return [Band(start + a, start + b, int(level[a])) for a, b in itertools.pairwise(edges) if b > a]
