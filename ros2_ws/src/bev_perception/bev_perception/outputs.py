"""Publish each perception on the topics that somebody listens to."""

from __future__ import annotations

import time
from typing import Any

import torch
from nav_msgs.msg import OccupancyGrid
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image, PointCloud2
from std_msgs.msg import Header
from visualization_msgs.msg import MarkerArray

from bev_perception import messages
from bevperception.config_model import SegmentationConfig
from bevperception.inference import Perception
from bevperception.streaming import conversions
from bevperception.streaming.settings import NodeSettings
from bevperception.structures import Boxes3D

_QOS = QoSProfile(depth=2)


class Outputs:
    """All publishers of results.

    Args:
        node: that publishes.
        head: the model's segmentation settings; None without a segmentation head.
        base_frame: of all results.
    """

    def __init__(self, node: LifecycleNode, head: SegmentationConfig | None, base_frame: str) -> None:
        self._node, self._head, self._base_frame = node, head, base_frame
        make = node.create_lifecycle_publisher
        self._objects = make(PointCloud2, "~/output/objects", _QOS)
        self._markers = make(MarkerArray, "~/output/markers", _QOS)
        self._picture = make(Image, "~/output/bev_image", _QOS)
        self._detections = None
        if messages.Detection3DArray is not None:
            self._detections = make(messages.Detection3DArray, "~/output/detections", _QOS)
        classes = () if head is None else head.classes
        self._grids = {name: make(OccupancyGrid, f"~/output/segmentation/{name}", _QOS) for name in classes}

    def warm_up(self, settings: NodeSettings) -> None:
        """Draw an empty picture, which is slow the first time."""
        identity, no_scores = torch.eye(4, dtype=torch.float64), torch.zeros(0)
        boxes = Boxes3D(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64), no_scores)
        maps = None
        if self._head is not None:
            maps = torch.zeros(len(self._head.classes), self._head.grid.rows, self._head.grid.columns)
        blank = Perception(0.0, boxes, maps, identity, identity, (), None, {})
        conversions.convert(blank, self._head, settings)

    def destroy(self) -> None:
        """End all publishers."""
        for publisher in (
            self._objects,
            self._markers,
            self._picture,
            self._detections,
            *self._grids.values(),
        ):
            if publisher is not None:
                self._node.destroy_publisher(publisher)
        self._grids.clear()

    def publish(self, stamp_ns: int, perception: Perception, settings: NodeSettings) -> dict[str, float]:
        """Convert a perception and publish it where somebody listens.

        Args:
            stamp_ns: of the images.
            perception: of the pipeline.
            settings: threshold, classes and picture size.

        Returns:
            milliseconds spent converting and publishing.
        """
        header = Header(stamp=messages.to_stamp(stamp_ns), frame_id=self._base_frame)
        begin_s = time.perf_counter()
        output = conversions.convert(perception, self._head, settings, self._wanted())
        ready = self._messages(header, output)
        middle_s = time.perf_counter()
        for publisher, message in ready:
            publisher.publish(message)
        end_s = time.perf_counter()
        return {"convert": 1e3 * (middle_s - begin_s), "publish": 1e3 * (end_s - middle_s)}

    def _wanted(self) -> conversions.Wanted:
        return conversions.Wanted(
            objects=_has_subscribers(self._objects),
            detections=_has_subscribers(self._detections),
            markers=_has_subscribers(self._markers),
            picture=_has_subscribers(self._picture),
            grids=[name for name, publisher in self._grids.items() if _has_subscribers(publisher)],
        )

    def _messages(self, header: Header, output: conversions.Output) -> list[tuple[Any, Any]]:
        """Publishers with their messages."""
        ready: list[tuple[Any, Any]] = []
        if output.objects is not None:
            ready.append((self._objects, messages.object_cloud(header, output.objects)))
        if output.detections is not None:
            ready.append((self._detections, messages.detection_array(header, output.detections)))
        if output.markers is not None:
            ready.append((self._markers, messages.markers(header, output.markers)))
        for name, grid in output.grids.items():
            ready.append((self._grids[name], messages.occupancy_grid(header, grid)))
        if output.picture is not None:
            ready.append((self._picture, messages.rgb_image(header, output.picture)))
        return ready


def _has_subscribers(publisher: Any) -> bool:
    return publisher is not None and publisher.get_subscription_count() > 0
