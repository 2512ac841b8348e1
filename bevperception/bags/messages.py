"""Build messages for bags from plain numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyquaternion import Quaternion

from bevperception.bags.files import typestore
from bevperception.streaming.conversions import OBJECT_FIELDS

_FLOAT32 = 7
"""sensor_msgs/PointField.FLOAT32."""


class Messages:
    """Builds messages of a rosbags type store."""

    def __init__(self) -> None:
        self.store = typestore()

    def make(self, kind: str, *values: Any, **named: Any) -> Any:
        """A message by its type's short name, for example ``std_msgs/Header``."""
        package, name = kind.split("/")
        return self.store.types[f"{package}/msg/{name}"](*values, **named)

    def header(self, stamp_ns: int, frame_id: str) -> Any:
        """std_msgs/Header."""
        stamp = self.make("builtin_interfaces/Time", stamp_ns // 10**9, stamp_ns % 10**9)
        return self.make("std_msgs/Header", stamp, frame_id)

    def compressed(self, stamp_ns: int, frame_id: str, data: bytes, kind: str) -> Any:
        """sensor_msgs/CompressedImage of a file's bytes; ``kind`` is jpeg or png."""
        bytes_ = np.frombuffer(data, dtype=np.uint8)
        name = f"bgr8; {kind} compressed bgr8"
        return self.make("sensor_msgs/CompressedImage", self.header(stamp_ns, frame_id), name, bytes_)

    def image(self, stamp_ns: int, frame_id: str, pixels: NDArray[np.uint8], encoding: str = "bgr8") -> Any:
        """sensor_msgs/Image of (height, width, 3) pixels."""
        height, width = pixels.shape[:2]
        step = pixels[0].nbytes
        header, data = self.header(stamp_ns, frame_id), np.ascontiguousarray(pixels).reshape(-1)
        return self.make("sensor_msgs/Image", header, height, width, encoding, 0, step, data)

    def camera_info(
        self, stamp_ns: int, frame_id: str, size: tuple[int, int], intrinsics: NDArray[np.float64]
    ) -> Any:
        """sensor_msgs/CameraInfo of a pinhole camera without distortion."""
        p = np.zeros((3, 4))
        p[:, :3] = intrinsics
        return self.make(
            "sensor_msgs/CameraInfo",
            header=self.header(stamp_ns, frame_id),
            height=size[1],
            width=size[0],
            distortion_model="plumb_bob",
            d=np.zeros(5),
            k=np.array(intrinsics, dtype=np.float64).reshape(-1),
            r=np.eye(3).reshape(-1),
            p=p.reshape(-1),
            binning_x=0,
            binning_y=0,
            roi=self.make("sensor_msgs/RegionOfInterest", 0, 0, 0, 0, False),
        )

    def pose(self, translation: NDArray[np.float64], turn: Quaternion) -> Any:
        """geometry_msgs/Pose."""
        return self.make("geometry_msgs/Pose", self._point("Point", translation), self._turn(turn))

    def transform(
        self, stamp_ns: int, parent: str, child: str, translation: NDArray[np.float64], turn: Quaternion
    ) -> Any:
        """geometry_msgs/TransformStamped: the child's pose in the parent."""
        inner = self.make("geometry_msgs/Transform", self._point("Vector3", translation), self._turn(turn))
        return self.make("geometry_msgs/TransformStamped", self.header(stamp_ns, parent), child, inner)

    def odometry(
        self,
        stamp_ns: int,
        frames: tuple[str, str],
        translation: NDArray[np.float64],
        turn: Quaternion,
        twist: tuple[NDArray[np.float64], NDArray[np.float64]],
    ) -> Any:
        """nav_msgs/Odometry; frames are (odom, base_link), the twist (linear, angular) in base_link."""
        zero = np.zeros(36)
        vectors = [self._point("Vector3", part) for part in twist]
        pose = self.make("geometry_msgs/PoseWithCovariance", self.pose(translation, turn), zero)
        moving = self.make("geometry_msgs/Twist", *vectors)
        speed = self.make("geometry_msgs/TwistWithCovariance", moving, zero)
        return self.make("nav_msgs/Odometry", self.header(stamp_ns, frames[0]), frames[1], pose, speed)

    def objects(self, stamp_ns: int, frame_id: str, rows: NDArray[np.float32]) -> Any:
        """sensor_msgs/PointCloud2 with a point for each row (n, 11) of ``OBJECT_FIELDS``."""
        fields = [
            self.make("sensor_msgs/PointField", name, 4 * index, _FLOAT32, 1)
            for index, name in enumerate(OBJECT_FIELDS)
        ]
        data = np.ascontiguousarray(rows, dtype=np.float32).view(np.uint8).reshape(-1)
        step = 4 * len(OBJECT_FIELDS)
        return self.make(
            "sensor_msgs/PointCloud2",
            header=self.header(stamp_ns, frame_id),
            height=1,
            width=len(rows),
            fields=fields,
            is_bigendian=False,
            point_step=step,
            row_step=step * len(rows),
            data=data,
            is_dense=True,
        )

    def _point(self, kind: str, values: NDArray[np.float64]) -> Any:
        return self.make(f"geometry_msgs/{kind}", *(float(v) for v in values))

    def _turn(self, turn: Quaternion) -> Any:
        return self.make("geometry_msgs/Quaternion", turn.x, turn.y, turn.z, turn.w)


def object_rows_of(message: Any) -> NDArray[np.float32]:
    """Rows (n, 11) of ``OBJECT_FIELDS`` of a PointCloud2 that :meth:`Messages.objects` or the node made.

    Raises:
        ValueError: if it has other fields.
    """
    names = tuple(field.name for field in message.fields)
    if names != OBJECT_FIELDS:
        raise ValueError(f"a point cloud with the fields {', '.join(OBJECT_FIELDS)} is needed, got {names}")
    flat = np.frombuffer(memoryview(message.data), dtype=np.float32)
    return flat.reshape(-1, len(OBJECT_FIELDS)).copy()


def stamp_ns_of(header: Any) -> int:
    """Nanoseconds of a header's stamp."""
    return int(header.stamp.sec) * 10**9 + int(header.stamp.nanosec)
