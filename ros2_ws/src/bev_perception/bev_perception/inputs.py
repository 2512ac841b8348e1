"""Subscribe to cameras, odometry, TF and sweeps, and hand their messages to the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from nav_msgs.msg import Odometry
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

from bev_perception import messages
from bevperception.streaming.pipeline import Pipeline
from bevperception.streaming.settings import NodeSettings

try:
    from tf2_msgs.msg import TFMessage
except ImportError:  # the calibration file and odometry then have to do
    TFMessage = None

_BEST_EFFORT = ReliabilityPolicy.BEST_EFFORT


class Inputs:
    """All subscriptions of the node.

    Args:
        node: that subscribes.
        pipeline: that gets everything.
        settings: topics' types and quality of service.
        awake: whether images are wanted now.
    """

    def __init__(
        self, node: LifecycleNode, pipeline: Pipeline, settings: NodeSettings, awake: Callable[[], bool]
    ) -> None:
        self._node, self._pipeline, self._settings, self._awake = node, pipeline, settings, awake
        self._subscriptions: list[Any] = []
        for channel in pipeline.channels:
            self._subscribe_camera(channel)
        self._subscribe_motion()
        if settings.sweep_trigger:
            self._add(Header, "~/input/sweep", self._on_sweep, QoSProfile(depth=1, reliability=_BEST_EFFORT))

    def destroy(self) -> None:
        """End all subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _add(self, kind: type, topic: str, callback: Callable[..., None], qos: QoSProfile) -> None:
        self._subscriptions.append(self._node.create_subscription(kind, topic, callback, qos))

    def _subscribe_camera(self, channel: str) -> None:
        reliable = self._settings.image_reliability == "reliable"
        reliability = ReliabilityPolicy.RELIABLE if reliable else _BEST_EFFORT
        latest = QoSProfile(depth=1, reliability=reliability)
        topic = f"~/input/{channel.lower()}/image"
        if self._settings.image_transport == "compressed":
            self._add(CompressedImage, f"{topic}/compressed", partial(self._on_compressed, channel), latest)
        else:
            self._add(Image, topic, partial(self._on_image, channel), latest)
        info_qos = QoSProfile(depth=1, reliability=_BEST_EFFORT)
        self._add(
            CameraInfo, f"~/input/{channel.lower()}/camera_info", partial(self._on_info, channel), info_qos
        )

    def _subscribe_motion(self) -> None:
        settings = self._settings
        many = QoSProfile(depth=50, reliability=_BEST_EFFORT)
        if settings.motion_source == "odometry":
            self._add(Odometry, "~/input/odometry", self._on_odometry, many)
        if TFMessage is None or not settings.use_tf:
            return
        latched = QoSProfile(
            depth=100, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
        )
        self._add(TFMessage, "/tf_static", self._on_static, latched)
        if settings.motion_source == "tf":
            self._add(TFMessage, "/tf", self._on_moving, QoSProfile(depth=100))

    def _on_compressed(self, channel: str, message: CompressedImage) -> None:
        if self._awake():
            self._pipeline.add_image(messages.from_compressed(channel, message))

    def _on_image(self, channel: str, message: Image) -> None:
        if self._awake():
            self._pipeline.add_image(messages.from_image(channel, message))

    def _on_info(self, channel: str, message: CameraInfo) -> None:
        self._pipeline.add_camera_info(channel, messages.from_camera_info(message))

    def _on_sweep(self, message: Header) -> None:
        if self._awake():
            self._pipeline.add_sweep(messages.stamp_ns(message.stamp))

    def _on_odometry(self, message: Odometry) -> None:
        base = self._settings.base_frame
        if message.child_frame_id.lstrip("/") != base:
            self._pipeline.refuse_motion(f"odometry is of {message.child_frame_id!r}, not of {base}")
            return
        self._pipeline.add_pose(messages.from_odometry(message))

    def _on_static(self, message: TFMessage) -> None:
        for transform in message.transforms:
            try:
                matrix = messages.transform_matrix(transform)
            except ValueError as error:
                self._node.get_logger().warning(
                    f"static transform to {transform.child_frame_id} refused: {error}"
                )
                continue
            self._pipeline.add_transform(transform.header.frame_id, transform.child_frame_id, matrix)

    def _on_moving(self, message: TFMessage) -> None:
        wanted = (self._settings.odom_frame, self._settings.base_frame)
        for transform in message.transforms:
            if (transform.header.frame_id.lstrip("/"), transform.child_frame_id.lstrip("/")) == wanted:
                self._pipeline.add_pose(messages.from_transform(transform))
