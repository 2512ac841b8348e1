"""The ego car's pose, speed and turning over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bevperception.world.routes import Route
from bevperception.world.traffic import Motion, position_at

Array = NDArray[np.float64]

LENGTH_M, WIDTH_M, HEIGHT_M = 4.08, 1.73, 1.56
FRONT_M: Final = 3.46
"""From the ego frame's origin, the middle of the rear axle, to the front bumper."""
REAR_M: Final = LENGTH_M - FRONT_M


@dataclass(frozen=True)
class EgoPath:
    """The ego car's pose, speed and turning at any time of a scene.

    Attributes:
        route: what it follows with its rear axle.
        motion: of the simulation; it is driver 0.
        start_s: time of the first key frame in the simulation.
    """

    route: Route
    motion: Motion
    start_s: float

    def along(self, time_s: Array) -> tuple[Array, Array]:
        """(n,) arc length and speed at times from the first key frame."""
        return position_at(self.motion, 0, np.asarray(time_s) + self.start_s)

    def poses(self, time_s: Array) -> Array:
        """(n, 3) x, y and yaw in the global frame at times from the first key frame."""
        s, _ = self.along(time_s)
        return np.concatenate((self.route.path.at(s), self.route.path.yaw(s)[:, None]), axis=1)

    def dynamics(self, time_s: Array) -> tuple[Array, Array, Array]:
        """(n,) speed, forward acceleration and rate of turn (rad/s, left positive)."""
        s, speed = self.along(time_s)
        h = 0.05
        acceleration = (self.along(time_s + h)[1] - self.along(time_s - h)[1]) / (2 * h)
        turn = (self.route.path.yaw(s + 0.25) - self.route.path.yaw(s - 0.25)) / 0.5
        return speed, acceleration, turn * speed
