"""Publishers: each result becomes the messages that somebody listens to."""

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
        identity, empty = torch.eye(4, dtype=torch.float64), torch.zeros(0)
        boxes = Boxes3D(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64), empty)
        maps = None
        if self._head is not None:
            maps = torch.zeros(len(self._head.classes), self._head.grid.rows, self._head.grid.columns)
        blank = Perception(0.0, boxes, maps, identity, identity, (), None, {})
        conversions.bev_picture(blank, boxes, self._head, settings.bev_image_size)

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

    def publish(self, stamp_ns: int, seen: Perception, settings: NodeSettings) -> dict[str, float]:
        """Publish a result.

        Args:
            stamp_ns: of the images.
            seen: the result.
            settings: threshold, classes and picture size.

        Returns:
            milliseconds spent converting and publishing.
        """
        header = Header(stamp=messages.to_stamp(stamp_ns), frame_id=self._base_frame)
        begin_s = time.perf_counter()
        ready = self._convert(header, seen, settings)
        middle_s = time.perf_counter()
        for publisher, message in ready:
            publisher.publish(message)
        end_s = time.perf_counter()
        return {"convert": 1e3 * (middle_s - begin_s), "publish": 1e3 * (end_s - middle_s)}

    def _convert(self, header: Header, seen: Perception, settings: NodeSettings) -> list[tuple[Any, Any]]:
        """Publishers that have subscribers, with their messages."""
        boxes = conversions.select(
            conversions.boxes_in_base(seen), settings.score_threshold, settings.classes
        )
        ready: list[tuple[Any, Any]] = []
        if _heard(self._objects):
            ready.append((self._objects, messages.object_cloud(header, conversions.object_rows(boxes))))
        if _heard(self._detections):
            found = conversions.detections(boxes)
            ready.append((self._detections, messages.detection_array(header, found)))
        shown = conversions.select(boxes, settings.marker_threshold)
        if _heard(self._markers):
            ready.append((self._markers, messages.markers(header, conversions.detections(shown))))
        if seen.segmentation is not None and self._head is not None:
            for index, (name, publisher) in enumerate(self._grids.items()):
                assert name == self._head.classes[index]
                if _heard(publisher):
                    grid = conversions.occupancy(seen.segmentation[index], self._head.grid, seen.bev_to_ego)
                    ready.append((publisher, messages.occupancy_grid(header, grid)))
        if _heard(self._picture):
            pixels = conversions.bev_picture(seen, shown, self._head, settings.bev_image_size)
            ready.append((self._picture, messages.rgb_image(header, pixels)))
        return ready


def _heard(publisher: Any) -> bool:
    return publisher is not None and publisher.get_subscription_count() > 0
