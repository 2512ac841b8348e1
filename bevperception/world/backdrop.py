"""Draw sky, horizon and flat ground of one camera's pictures, with the actors' shadows."""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from bevperception.world.camera import NEAR_M, Camera
from bevperception.world.ground import Ground
from bevperception.world.weather import Weather

Array = NDArray[np.float64]
Picture = NDArray[np.uint8]

SHIFT: Final = 4
SHADOW_M: Final = 60.0
"""Shadows further away are not drawn."""
SKY_RAD: Final = float(np.deg2rad(28.0))
"""Elevation from which on the sky has its upper colour."""


class Backdrop:
    """Draws sky and ground without any object, for one camera.

    Args:
        eye: the camera.
        ground: picture of the ground from above, lit.
        weather: sky, haze and shadow.
    """

    def __init__(self, eye: Camera, ground: Ground, weather: Weather) -> None:
        self._eye, self._ground, self._weather = eye, ground, weather
        self._subrows = 3 if eye.width <= 800 else 2
        self._bands = eye.ground_bands(ground.texel_m, len(ground.levels), self._subrows)
        self._first = self._bands[0].start
        elevation = eye.elevation
        height = np.clip(elevation / SKY_RAD, 0.0, 1.0)[..., None] ** 0.7
        sky = weather.sky_low * (1 - height) + weather.sky_top * height
        self._empty: Picture = np.where(elevation[..., None] < 0, weather.haze, sky).astype(np.uint8)
        keep = np.exp(-eye.ground_distance[self._first :] / weather.haze_m).astype(np.float32)
        self._keep, self._fade = keep, np.float32(1.0) - keep

    def draw(self, ego_pose: Array, shadows: Array) -> Picture:
        """Draw a (height, width, 3) picture without anything that stands on the ground.

        Args:
            ego_pose: (3,) x, y, yaw.
            shadows: (n, k, 2) global points whose convex hulls lie in shadow.
        """
        eye, first = self._eye, self._first
        image = self._empty.copy()
        rows = np.empty((eye.height - first, eye.width, 3), dtype=np.uint8)
        c, s = np.cos(ego_pose[2]), np.sin(ego_pose[2])
        ego_to_global = np.array([[c, -s, ego_pose[0]], [s, c, ego_pose[1]], [0.0, 0.0, 1.0]])
        to_global = ego_to_global @ eye.ground_homography
        for band in self._bands:
            count = band.stop - band.start
            row = np.array([0.0, 1 / self._subrows, band.start + 0.5 / self._subrows - 0.5])
            subrow_to_row = np.array([[1.0, 0.0, 0.0], row, [0.0, 0.0, 1.0]])
            fine = cv2.warpPerspective(
                self._ground.levels[band.level],
                self._ground.to_texel(band.level) @ to_global @ subrow_to_row,
                (eye.width, count * self._subrows),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REPLICATE,
            )
            target = rows[band.start - first : band.stop - first]
            cv2.resize(fine, (eye.width, count), dst=target, interpolation=cv2.INTER_AREA)
        # The third row of the inverse, so scaled, gives the depth of a point of the ground.
        self._darken(rows, np.linalg.inv(to_global) * -eye.position[2], shadows)
        image[first:] = cv2.blendLinear(rows, image[first:], self._keep, self._fade)
        return image

    def _darken(self, rows: Picture, to_pixels: Array, shadows: Array) -> None:
        mask = np.zeros(rows.shape[:2], dtype=np.uint8)
        points = np.concatenate((shadows, np.ones((*shadows.shape[:2], 1))), axis=-1) @ to_pixels.T
        for outline in points[points[..., 2].max(axis=1) > NEAR_M]:
            pixels = self._clip(outline)
            hull = cv2.convexHull(pixels.astype(np.float32))[:, 0] - [0.0, self._first]
            cv2.fillConvexPoly(mask, np.round(hull * 16).astype(np.int32), (255,), cv2.LINE_8, SHIFT)
        cv2.copyTo(cv2.convertScaleAbs(rows, alpha=self._weather.shadow), mask, rows)

    @staticmethod
    def _clip(points: Array) -> Array:
        """Pixels of a hull's points (u, v, 1) * depth, cut off at the near plane."""
        front = points[:, 2] > NEAR_M
        if front.all():
            return np.asarray(points[:, :2] / points[:, 2:])
        a, b = points[front][:, None], points[~front][None]
        part = (NEAR_M - a[..., 2:]) / (b[..., 2:] - a[..., 2:])
        points = np.concatenate((points[front], (a + (b - a) * part).reshape(-1, 3)))
        return np.asarray(points[:, :2] / points[:, 2:])
