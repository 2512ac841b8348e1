"""Polylines that actors follow: places and headings by arc length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Path:
    """A smooth line in the ground plane, given by closely spaced points.

    Args:
        points: (n, 2) metres, n at least 2; repeated points are dropped.

    Attributes:
        points: (n, 2).
        s: (n,) arc length of each point from the start, metres.
        length: of the whole, metres.
    """

    def __init__(self, points: Array) -> None:
        keep = np.ones(len(points), dtype=bool)
        keep[1:] = np.linalg.norm(np.diff(points, axis=0), axis=1) > 1e-6
        self.points = points[keep]
        steps = np.linalg.norm(np.diff(self.points, axis=0), axis=1)
        self.s = np.concatenate(([0.0], np.cumsum(steps)))
        self.length = float(self.s[-1])
        slope = np.diff(self.points, axis=0) / steps[:, None]
        tangent = np.concatenate((slope[:1], slope[:-1] + slope[1:], slope[-1:]))
        self._yaw = np.unwrap(np.arctan2(tangent[:, 1], tangent[:, 0]))

    def at(self, s: Array | float) -> Array:
        """(..., 2) places at arc lengths; beyond the ends the line goes straight on."""
        s = np.asarray(s, dtype=np.float64)
        inside = np.clip(s, 0.0, self.length)
        x = np.interp(inside, self.s, self.points[:, 0])
        y = np.interp(inside, self.s, self.points[:, 1])
        places = np.stack((x, y), axis=-1)
        beyond = s - inside
        if np.any(beyond):
            yaw = self.yaw(inside)
            places += beyond[..., None] * np.stack((np.cos(yaw), np.sin(yaw)), axis=-1)
        return places

    def yaw(self, s: Array | float) -> Array:
        """(...) headings in radians, without jumps, at arc lengths."""
        return np.asarray(np.interp(np.asarray(s, dtype=np.float64), self.s, self._yaw))

    def curvature(self) -> Array:
        """(n,) turn in radians a metre at each point."""
        return np.asarray(np.gradient(self._yaw, self.s))

    def offset(self, left_m: float) -> Path:
        """The line that runs ``left_m`` metres to the left of this one."""
        return Path(self.beside(self.s, left_m))

    def beside(self, s: Array | float, left_m: Array | float) -> Array:
        """(..., 2) places at arc lengths, so many metres to the left of the line."""
        yaw = self.yaw(s)
        normal = np.stack((-np.sin(yaw), np.cos(yaw)), axis=-1)
        return np.asarray(self.at(s) + normal * np.asarray(left_m, dtype=np.float64)[..., None])

    def reversed(self) -> Path:
        """Reverse the line."""
        return Path(self.points[::-1].copy())

    def part(self, start_m: float, stop_m: float) -> Path:
        """The stretch between two arc lengths."""
        inside = self.s[(self.s > start_m + 1e-6) & (self.s < stop_m - 1e-6)]
        return Path(self.at(np.concatenate(([start_m], inside, [stop_m]))))

    def strip(self, right_m: float, left_m: float, start_m: float, stop_m: float, step_m: float) -> Array:
        """(n, 2) outline of the band between two offsets (left positive), counter-clockwise."""
        count = max(2, int(np.ceil((stop_m - start_m) / step_m)) + 1)
        s = np.linspace(start_m, stop_m, count)
        return np.concatenate((self.beside(s, right_m), self.beside(s[::-1], left_m)))


def join(paths: Sequence[Path]) -> Path:
    """Join several lines that follow each other."""
    return Path(np.concatenate([path.points for path in paths]))


def hermite(start: Array, start_tangent: Array, end: Array, end_tangent: Array, step_m: float) -> Array:
    """(n, 2) points of a cubic curve with given ends and derivatives there."""
    count = max(4, int(np.ceil(np.linalg.norm(end - start) / step_m)) + 1)
    t = np.linspace(0.0, 1.0, count)[:, None]
    a, b = 2 * t**3 - 3 * t**2 + 1, t**3 - 2 * t**2 + t
    c, d = -2 * t**3 + 3 * t**2, t**3 - t**2
    return np.asarray(a * start + b * start_tangent + c * end + d * end_tangent)
