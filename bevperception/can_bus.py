"""The 18-number CAN-bus vector of the published BEVFormer, as models, data and vehicles see it.

Layout: position 3 (metres, global), orientation 4 (w, x, y, z, global), acceleration 3, rotation rate 3,
velocity 3, ego yaw in radians, ego yaw in degrees. Absolute outside the model; the model looks at
differences to the frame in its memory. Accelerations include gravity (some 9.8 along z at rest), as an IMU
measures them; velocity, acceleration and rotation rate are in the ego frame.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pyquaternion import Quaternion
from torch import Tensor

from bevperception.calibration import TimedPose
from bevperception.geometry import rotation_from_quaternion, yaw_of

CAN_BUS_SIZE = 18
GRAVITY_M_S2 = 9.81
POSE_SPACING_S = 0.25
"""Ego poses at least this far apart are differentiated; nearer ones would amplify their noise."""
POSE_GAP_S = 1.5
"""Ego poses further apart than this say nothing about the instant between them (the devkit's limit)."""

Style = Literal["exact", "published"]
"""How the vector is filled; see ``DataConfig.can_bus``."""

_Array = NDArray[np.float64]
_ROTATION_TOLERANCE = 1e-2


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


class CanBusTrail:
    """Makes the CAN-bus vectors of a vehicle's frames from their poses, one frame after the other.

    As the data set's reader does where a scene has no messages, but for the pose after a frame, which a
    vehicle does not know yet: the velocity is that since the pose before, the acceleration gravity alone.

    Args:
        style: see ``DataConfig.can_bus``; what was measured is taken from the poses in both styles.
    """

    def __init__(self, style: Style) -> None:
        self._style = style
        self._poses: deque[TimedPose] = deque()

    def forget(self) -> None:
        """Begin anew: the poses so far are of another place or time."""
        self._poses.clear()

    def vector(self, stamp_s: float, ego_to_global: Tensor) -> Tensor:
        """The absolute CAN-bus vector of the next frame.

        Args:
            stamp_s: the frame's instant, later than that of the frame before.
            ego_to_global: (4, 4) float64, rigid.

        Returns:
            (18,) float64; of the two quaternions of a rotation the one with w >= 0 counts.
        """
        turn = Quaternion(
            matrix=ego_to_global[:3, :3].numpy(), rtol=_ROTATION_TOLERANCE, atol=_ROTATION_TOLERANCE
        )
        turn = turn if turn.w >= 0 else -turn
        x, y, z = ego_to_global[:3, 3].tolist()
        here = TimedPose(round(stamp_s * 1e9), (x, y, z), tuple(turn.elements.tolist()))
        while self._poses and _seconds(here) - _seconds(self._poses[0]) > POSE_GAP_S:
            self._poses.popleft()
        earlier = [pose for pose in self._poses if _seconds(here) - _seconds(pose) >= POSE_SPACING_S]
        measured = measured_by_poses(earlier[-1] if earlier else None, here, None)
        self._poses.append(here)
        return with_ego_pose(
            torch.from_numpy(measured),
            ego_to_global[:3, 3],
            torch.tensor(here.quaternion_wxyz, dtype=torch.float64),
            published_orientation=self._style == "published",
        )


def measured_by_poses(before: TimedPose | None, here: TimedPose, after: TimedPose | None) -> _Array:
    """What the vehicle's sensors would measure at a pose, from it and its neighbours in time.

    Returns:
        (18,) of which acceleration, rotation rate and velocity are filled; see :func:`ego_motion`.
    """
    return np.concatenate((np.zeros(7), *ego_motion(before, here, after), np.zeros(2)))


def ego_motion(
    before: TimedPose | None, here: TimedPose, after: TimedPose | None
) -> tuple[_Array, _Array, _Array]:
    """Compute acceleration, rotation rate and velocity at a pose, by finite differences to its neighbours.

    Args:
        before, after: neighbours in time, None where there is none.
        here: the pose.

    Returns:
        (3,) m/s2 with gravity, (3,) rad/s, (3,) m/s, all in the ego frame; zero (and gravity alone)
        where the neighbours do not tell.
    """
    ego_to_global = Quaternion(here.quaternion_wxyz).rotation_matrix
    velocity, acceleration, rate = np.zeros(3), np.zeros(3), np.zeros(3)
    slopes = [_slope(a, b) for a, b in ((before, here), (here, after)) if a is not None and b is not None]
    if len(slopes) == 2:
        (before_v, before_s), (after_v, after_s) = slopes
        velocity = (after_s * before_v + before_s * after_v) / (before_s + after_s)
        acceleration = 2 * (after_v - before_v) / (before_s + after_s)
    elif slopes:
        velocity = slopes[0][0]
    first, last = before or here, after or here
    span_s = _seconds(last) - _seconds(first)
    if span_s > 0:
        relative = Quaternion(first.quaternion_wxyz).inverse * Quaternion(last.quaternion_wxyz)
        rate = relative.axis * relative.radians / span_s
    up = np.array([0.0, 0.0, GRAVITY_M_S2])
    return ego_to_global.T @ (acceleration + up), rate, ego_to_global.T @ velocity


def _slope(a: TimedPose, b: TimedPose) -> tuple[_Array, float]:
    span_s = _seconds(b) - _seconds(a)
    return (np.array(b.translation_m) - np.array(a.translation_m)) / span_s, span_s


def _seconds(pose: TimedPose) -> float:
    return pose.stamp_ns // 1000 * 1e-6  # exact to the microsecond, as nuScenes counts


def with_ego_pose(
    measured: Tensor, translation_m: Tensor, quaternion_wxyz: Tensor, published_orientation: bool = False
) -> Tensor:
    """Put the sample's ego pose into the slots of position, orientation and yaw of a CAN-bus vector.

    Source: BEVFormer, datasets/nuscenes_dataset.py, get_data_info.

    Args:
        measured: (18,) float64.
        translation_m: (3,) ego in the global frame.
        quaternion_wxyz: (4,) ego to global.
        published_orientation: put w into all four orientation slots, as the published code does by mistake.

    Returns:
        (18,): yaw in [0, 2 pi) and [0, 360).
    """
    vector = measured.clone()
    vector[:3] = translation_m
    vector[3:7] = quaternion_wxyz[0] if published_orientation else quaternion_wxyz
    yaw_deg = math.degrees(float(yaw_of(rotation_from_quaternion(quaternion_wxyz)))) % 360.0
    vector[-2], vector[-1] = math.radians(yaw_deg), yaw_deg
    return vector
