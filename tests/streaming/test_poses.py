"""Poses between, beyond and without odometry; against pyquaternion."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pyquaternion import Quaternion

from bevperception.calibration import TimedPose
from bevperception.streaming.poses import PoseBuffer, PoseLimits

S = 10**9


def pose(time_s: float, rate_rad_s: float = 0.5) -> TimedPose:
    turn = Quaternion(axis=[0.1, -0.2, 1.0], radians=rate_rad_s * time_s)
    return TimedPose(round(time_s * S), (3.0 * time_s, -time_s, 0.5), tuple(turn.elements))  # type: ignore[arg-type]


def filled(*times_s: float, **limits: float) -> PoseBuffer:
    buffer = PoseBuffer(PoseLimits(**limits))
    for time_s in times_s:
        buffer.add(pose(time_s))
    return buffer


def expect(buffer: PoseBuffer, time_s: float) -> None:
    found = buffer.at(round(time_s * S))
    assert found is not None
    wanted = pose(time_s)
    np.testing.assert_allclose(found[:3, 3], wanted.translation_m, atol=1e-9)
    np.testing.assert_allclose(found[:3, :3], Quaternion(wanted.quaternion_wxyz).rotation_matrix, atol=1e-9)


@pytest.mark.parametrize("time_s", [1.0, 1.03, 1.05, 1.2, 1.25, 0.9])
def test_motion_is_interpolated_and_goes_on_beyond_the_ends(time_s: float) -> None:
    expect(filled(1.0, 1.1, 1.2), time_s)


def test_order_of_arrival_does_not_matter_and_equal_stamps_replace() -> None:
    buffer = filled(1.2, 1.0, 1.1, 1.1)
    assert len(buffer) == 3
    expect(buffer, 1.15)


def test_opposite_quaternions_are_the_same_rotation() -> None:
    buffer = filled(1.0)
    other = pose(1.1)
    w, x, y, z = other.quaternion_wxyz
    buffer.add(TimedPose(other.stamp_ns, other.translation_m, (-w, -x, -y, -z)))
    expect(buffer, 1.05)


def test_poses_that_do_not_tell_give_none() -> None:
    assert PoseBuffer().at(S) is None
    buffer = filled(1.0, 1.1, 4.0, max_gap_s=1.0, max_extrapolation_s=0.25)
    assert buffer.at(round(1.5 * S)) is None
    assert buffer.at(round(4.3 * S)) is None
    assert buffer.at(round(0.7 * S)) is None
    expect(buffer, 1.3)  # in the gap, but near the motion before it
    held = buffer.at(round(4.2 * S))  # no motion is known here: the pose is held
    assert held is not None
    assert float(held[0, 3]) == 12.0


def test_covers_tells_whether_waiting_helps() -> None:
    buffer = filled(1.0, 1.1)
    assert buffer.covers(round(1.1 * S))
    assert not buffer.covers(round(1.1 * S) + 1)
    assert not PoseBuffer().covers(0)


def test_old_poses_are_forgotten() -> None:
    buffer = filled(*np.arange(0.0, 100.0, 0.1).tolist(), keep_s=5.0)
    assert len(buffer) <= 51
    buffer.clear()
    assert (len(buffer), buffer.newest_ns) == (0, None)


@pytest.mark.parametrize(
    ("place", "turn"),
    [
        ((math.nan, 0, 0), (1, 0, 0, 0)),
        ((0, math.inf, 0), (1, 0, 0, 0)),
        ((0, 0, -1e300), (1, 0, 0, 0)),
        ((1.1e8, 0, 0), (1, 0, 0, 0)),
        ((0, 0, 0), (0, 0, 0, 0)),
        ((0, 0, 0), (1e300, 0, 0, 0)),
        ((0, 0, 0), (0, 0, 0, 1.02)),
        ((0, 0, 0), (math.nan, 0, 0, 1)),
    ],
)
def test_impossible_poses_are_refused(
    place: tuple[float, float, float], turn: tuple[float, float, float, float]
) -> None:
    assert not TimedPose(0, place, turn).is_possible
    with pytest.raises(ValueError, match="not a pose"):
        PoseBuffer().add(TimedPose(0, place, turn))


def test_poses_in_any_map_are_possible() -> None:
    assert TimedPose(0, (6.4e6, -5e6, 120.0), (0.0, 0.0, -1.005, 0.0)).is_possible
