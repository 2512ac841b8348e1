"""Copy ROS messages to plain values and plain values to ROS messages; no logic."""

from __future__ import annotations

import array
import copy
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import Point, Pose, Quaternion, Vector3
from nav_msgs.msg import OccupancyGrid, Odometry
from numpy.typing import NDArray
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2, PointField
from std_msgs.msg import ColorRGBA, Header
from torch import Tensor
from visualization_msgs.msg import Marker, MarkerArray

from bevperception.calibration import TimedPose
from bevperception.streaming import camera_model, conversions, diagnostics
from bevperception.streaming.images import CameraImage
from bevperception.streaming.rig import pose_from_xyzw

try:
    from vision_msgs.msg import Detection3D, Detection3DArray, ObjectHypothesisWithPose
except ImportError:  # not in every ROS installation; the node says so when it is configured
    Detection3DArray = None

# ---------------------------------------------------------------- in


def stamp_ns(stamp: Time) -> int:
    """Nanoseconds of a stamp."""
    return stamp.sec * 10**9 + stamp.nanosec


def to_stamp(nanoseconds: int) -> Time:
    """Stamp of nanoseconds."""
    return Time(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)


def from_compressed(channel: str, message: CompressedImage) -> CameraImage:
    """A compressed image, arrived now."""
    return CameraImage(
        channel=channel,
        stamp_ns=stamp_ns(message.header.stamp),
        arrived_s=time.monotonic(),
        data=message.data,
        frame_id=message.header.frame_id,
    )


def from_image(channel: str, message: Image) -> CameraImage:
    """A raw image, arrived now."""
    return CameraImage(
        channel=channel,
        stamp_ns=stamp_ns(message.header.stamp),
        arrived_s=time.monotonic(),
        data=message.data,
        encoding=message.encoding,
        width=message.width,
        height=message.height,
        step=message.step,
        frame_id=message.header.frame_id,
    )


def from_camera_info(message: CameraInfo) -> camera_model.CameraInfo:
    """Copy the numbers of a camera info."""
    roi = message.roi
    return camera_model.CameraInfo(
        width=message.width,
        height=message.height,
        distortion_model=message.distortion_model,
        d=tuple(message.d),
        k=tuple(float(value) for value in message.k),
        p=tuple(float(value) for value in message.p),
        frame_id=message.header.frame_id,
        binning=(message.binning_x, message.binning_y),
        roi=(roi.x_offset, roi.y_offset, roi.width, roi.height),
    )


def from_odometry(message: Odometry) -> TimedPose:
    """The pose of an odometry message."""
    return _timed_pose(message.header, message.pose.pose.position, message.pose.pose.orientation)


def from_transform(message: Any) -> TimedPose:
    """The pose of a geometry_msgs/TransformStamped: the child in the parent."""
    return _timed_pose(message.header, message.transform.translation, message.transform.rotation)


def _timed_pose(header: Header, place: Any, turn: Any) -> TimedPose:
    return TimedPose(stamp_ns(header.stamp), (place.x, place.y, place.z), (turn.w, turn.x, turn.y, turn.z))


def transform_matrix(message: Any) -> Tensor:
    """(4, 4) child to parent of a geometry_msgs/TransformStamped.

    Raises:
        ValueError: if it is not a rigid transform.
    """
    place, turn = message.transform.translation, message.transform.rotation
    return pose_from_xyzw([place.x, place.y, place.z], [turn.x, turn.y, turn.z, turn.w])


# ---------------------------------------------------------------- out


def detection_array(header: Header, boxes: Iterable[conversions.Detection]) -> Any:
    """vision_msgs/Detection3DArray; only where vision_msgs is installed."""
    message = Detection3DArray(header=header)
    for index, box in enumerate(boxes):
        pose = _pose(box.position, box.orientation)
        hypothesis = ObjectHypothesisWithPose()
        hypothesis.hypothesis.class_id = box.class_name
        hypothesis.hypothesis.score = box.score
        hypothesis.pose.pose = pose
        entry = Detection3D(header=header, results=[hypothesis], id=str(index))
        entry.bbox.center = pose
        entry.bbox.size = Vector3(x=box.size[0], y=box.size[1], z=box.size[2])
        message.detections.append(entry)
    return message


def object_cloud(header: Header, rows: NDArray[np.float32]) -> PointCloud2:
    """sensor_msgs/PointCloud2 with a point for each row (n, 11) of ``conversions.OBJECT_FIELDS``."""
    names = conversions.OBJECT_FIELDS
    fields = [
        PointField(name=name, offset=4 * index, datatype=PointField.FLOAT32, count=1)
        for index, name in enumerate(names)
    ]
    step = 4 * len(names)
    message = PointCloud2(
        header=header,
        height=1,
        width=len(rows),
        fields=fields,
        is_bigendian=False,
        point_step=step,
        row_step=step * len(rows),
        is_dense=True,
    )
    message.data = array.array("B", np.ascontiguousarray(rows, dtype=np.float32).tobytes())
    return message


def markers(header: Header, boxes: Iterable[conversions.Detection]) -> MarkerArray:
    """Boxes, headings, velocities and labels; what was shown before is removed first.

    Few markers, for a marker costs more than its points; boxes and labels are copies of one of their kind,
    which is several times as fast as making each anew.
    """
    headings, velocities = _lines(header, "headings", 0.12), _lines(header, "velocities", 0.15)
    box_template = Marker(header=header, ns="boxes", type=Marker.CUBE)
    label_template = Marker(header=header, ns="labels", type=Marker.TEXT_VIEW_FACING)
    label_template.scale.z = 0.8
    label_template.color = ColorRGBA(r=1.0, g=1.0, b=1.0, a=0.9)
    message = MarkerArray(markers=[Marker(header=header, action=Marker.DELETEALL)])
    for index, one in enumerate(boxes):
        box, label = copy.copy(box_template), copy.copy(label_template)
        box.id = label.id = index
        box.pose, box.color = _pose(one.position, one.orientation), _colour(one.colour, 0.55)
        box.scale = Vector3(x=one.size[0], y=one.size[1], z=one.size[2])
        label.pose = Pose(position=_point(one.label_position), orientation=box.pose.orientation)
        label.text = one.label
        message.markers += [box, label]
        headings.points += [_point(end) for end in one.heading]
        headings.colors += [_colour(one.colour, 0.95)] * 2
        velocities.points += [_point(end) for end in one.arrow]
    message.markers += [lines for lines in (headings, velocities) if lines.points]  # RViz refuses empty ones
    return message


def occupancy_grid(header: Header, grid: conversions.Grid) -> OccupancyGrid:
    """nav_msgs/OccupancyGrid of one class."""
    message = OccupancyGrid(header=header)
    message.info.map_load_time = header.stamp
    message.info.resolution = grid.resolution_m
    message.info.width, message.info.height = grid.width, grid.height
    message.info.origin = _pose(grid.position, grid.orientation)
    message.data = array.array("b", np.ascontiguousarray(grid.cells).tobytes())
    return message


def rgb_image(header: Header, pixels: NDArray[np.uint8]) -> Image:
    """sensor_msgs/Image of (height, width, 3) RGB."""
    height, width = pixels.shape[:2]
    message = Image(header=header, height=height, width=width, encoding="rgb8", step=3 * width)
    message.data = array.array("B", np.ascontiguousarray(pixels).tobytes())
    return message


def diagnostic_array(stamp: Time, node: str, statuses: Iterable[diagnostics.Status]) -> DiagnosticArray:
    """diagnostic_msgs/DiagnosticArray of status lines."""
    message = DiagnosticArray()
    message.header.stamp = stamp
    for status in statuses:
        values = [KeyValue(key=key, value=value) for key, value in status.values.items()]
        message.status.append(
            DiagnosticStatus(
                level=bytes([status.level]),
                name=f"{node}: {status.name}",
                message=status.message,
                hardware_id=node,
                values=values,
            )
        )
    return message


def _point(position: conversions.Point) -> Point:
    x, y, z = position
    return Point(x=x, y=y, z=z)


def _pose(position: conversions.Point, orientation: tuple[float, float, float, float]) -> Pose:
    x, y, z, w = orientation
    return Pose(position=_point(position), orientation=Quaternion(x=x, y=y, z=z, w=w))


def _lines(header: Header, name: str, width_m: float) -> Marker:
    marker = Marker(header=header, ns=name, type=Marker.LINE_LIST)
    marker.scale.x, marker.pose.orientation.w = width_m, 1.0
    marker.color = _colour(conversions.ARROW_COLOUR, 0.95)
    return marker


@lru_cache(maxsize=64)
def _colour(rgb: tuple[float, float, float], opacity: float) -> ColorRGBA:
    """Make the message of a colour; it is shared, since nothing changes it."""
    r, g, b = rgb
    return ColorRGBA(r=r, g=g, b=b, a=opacity)
