"""CAN-bus messages of a scene, as the CAN-bus expansion of nuScenes has them.

Written are pose (50 Hz), ms_imu (100 Hz in nuScenes, 50 Hz here), steeranglefeedback (50 Hz here),
vehicle_monitor (2 Hz), route and meta; zoesensors and zoe_veh_info are not.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bevperception.world.ego import EgoPath

Array = NDArray[np.float64]
Message = dict[str, Any]

PERIOD_US: Final = 20_000
LEAD_US: Final = 400_000
GRAVITY_M_S2: Final = 9.81
WHEELBASE_M: Final = 2.588
STEERING_RATIO: Final = 16.0
ROUTE_STEP_M: Final = 0.5


def can_bus_messages(ego: EgoPath, start_us: int, duration_us: int) -> dict[str, Any]:
    """Make the messages of a scene by file name.

    Args:
        ego: the ego car's way.
        start_us: time stamp of the first key frame.
        duration_us: from the first to the last key frame.
    """
    offsets = np.arange(-LEAD_US, duration_us + LEAD_US + 1, PERIOD_US)
    times = offsets * 1e-6
    poses = ego.poses(times)
    speed, acceleration, turn = ego.dynamics(times)
    stamps = (start_us + offsets).tolist()
    messages: dict[str, Any] = {
        "pose": _pose_messages(stamps, poses, speed, acceleration, turn),
        "ms_imu": _imu_messages(stamps, poses, speed, acceleration, turn),
        "steeranglefeedback": [
            {"utime": stamp, "value": round(float(value), 6)}
            for stamp, value in zip(
                stamps, STEERING_RATIO * np.arctan(WHEELBASE_M * turn / np.maximum(speed, 0.5)), strict=True
            )
        ],
        "vehicle_monitor": _monitor_messages(stamps, speed, acceleration, turn),
        "route": ego.route.path.at(
            np.arange(
                float(ego.along(times[:1])[0][0]), float(ego.along(times[-1:])[0][0]) + 20.0, ROUTE_STEP_M
            )
        )
        .round(3)
        .tolist(),
    }
    messages["meta"] = {
        name: {"message_count": len(content), "message_freq": 2 if name == "vehicle_monitor" else 50}
        for name, content in messages.items()
        if name != "route"
    }
    return messages


def _pose_messages(
    stamps: list[int], poses: Array, speed: Array, acceleration: Array, turn: Array
) -> list[Message]:
    return [
        {
            "accel": [round(float(a), 6), round(float(v * w), 6), GRAVITY_M_S2],
            "orientation": quaternion(float(yaw)),
            "pos": [float(x), float(y), 0.0],
            "rotation_rate": [0.0, 0.0, round(float(w), 6)],
            "utime": stamp,
            "vel": [round(float(v), 6), 0.0, 0.0],
        }
        for stamp, (x, y, yaw), v, a, w in zip(stamps, poses, speed, acceleration, turn, strict=True)
    ]


def _imu_messages(
    stamps: list[int], poses: Array, speed: Array, acceleration: Array, turn: Array
) -> list[Message]:
    return [
        {
            "linear_accel": [round(float(a), 6), round(float(v * w), 6), GRAVITY_M_S2],
            "q": quaternion(float(yaw)),
            "rotation_rate": [0.0, 0.0, round(float(w), 6)],
            "utime": stamp,
        }
        for stamp, (_, _, yaw), v, a, w in zip(stamps, poses, speed, acceleration, turn, strict=True)
    ]


def _monitor_messages(stamps: list[int], speed: Array, acceleration: Array, turn: Array) -> list[Message]:
    every = slice(None, None, 500_000 // PERIOD_US)
    return [
        {
            "available_distance": 200,
            "battery_level": 80,
            "brake": round(max(0.0, -float(a)) * 10),
            "brake_switch": 2 if a < -0.3 else 1,
            "gear_position": 7,
            "left_signal": int(w > 0.1),
            "rear_left_rpm": round(float(v) * 31.0, 3),
            "rear_right_rpm": round(float(v) * 31.0, 3),
            "right_signal": int(w < -0.1),
            "steering": round(
                float(np.degrees(STEERING_RATIO * np.arctan(WHEELBASE_M * w / max(v, 0.5)))), 3
            ),
            "steering_speed": 0.0,
            "throttle": round(max(0.0, float(a)) * 100),
            "utime": stamp,
            "vehicle_speed": round(float(v) * 3.6, 4),
            "yaw_rate": round(float(np.degrees(w)), 4),
        }
        for stamp, v, a, w in zip(stamps[every], speed[every], acceleration[every], turn[every], strict=True)
    ]


def quaternion(yaw: float) -> list[float]:
    """w, x, y, z of a turn to the left by an angle in radians."""
    return [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))]
