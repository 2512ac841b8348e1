"""Coordinates from ROS messages to ROS messages: camera info, TF and odometry in; one box out where it is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from bev_perception import messages
from geometry_msgs.msg import TransformStamped
from nav_msgs.msg import Odometry
from nuscenes.utils.geometry_utils import view_points
from pyquaternion import Quaternion
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header
from torch import nn
from visualization_msgs.msg import Marker

from bevperception.config import DataConfig
from bevperception.config_model import SegmentationConfig
from bevperception.data.nuscenes import NuScenesReader
from bevperception.geometry import invert_rigid, project_points, transform_boxes
from bevperception.inference import StreamingPredictor
from bevperception.streaming import conversions
from bevperception.streaming.pipeline import ImageSetResult, Pipeline
from bevperception.streaming.settings import NodeSettings
from bevperception.structures import BEVMemory, Boxes3D, CameraFrames, ModelOutputs
from bevperception.taxonomy import CAMERA_NAMES, DETECTION_CLASSES

HEAD = SegmentationConfig(classes=("vehicle",), range_m=50.0, cell_m=0.5)
GLOBAL_BOX = torch.tensor([[610.0, 1205.0, 1.0, 4.6, 1.9, 1.7, 2.0, -3.0, 6.0]], dtype=torch.float64)
"""A car in the frame of the odometry."""


class Oracle(nn.Module):
    """Knows where one car is in the global frame, and so where it is in the BEV frame that it is given."""

    def forward(
        self, frames: CameraFrames, memory: BEVMemory | None = None
    ) -> tuple[ModelOutputs, BEVMemory]:
        self.frames = replace(frames, images=frames.images.clone())
        in_bev = transform_boxes(GLOBAL_BOX, invert_rigid(frames.bev_to_global[0]))
        self.box = in_bev
        logits = torch.full((1, 1, HEAD.grid.rows, HEAD.grid.columns), -9.0)
        column, row = HEAD.grid.to_cells(in_bev[0, :2]).round().long().tolist()
        if bool(HEAD.grid.contains(in_bev[0, :2])):
            logits[0, 0, row, column] = 9.0
        bev = torch.zeros(1, 1, 1, 1)
        valid = torch.ones(1, dtype=torch.bool)
        remembered = BEVMemory(bev, frames.bev_to_global, frames.timestamps_s, valid)
        return ModelOutputs(bev, None, logits), remembered

    def decode(self, outputs: ModelOutputs) -> list[Boxes3D]:
        return [Boxes3D(self.box.float(), torch.tensor([0]), torch.tensor([0.9]))]


def over_the_wire(message: Any) -> Any:
    return deserialize_message(serialize_message(message), type(message))


def header(stamp_ns: int, frame: str) -> Header:
    return Header(stamp=messages.to_stamp(stamp_ns), frame_id=frame)


def odometry(stamp_ns: int, x: float, y: float, yaw: float) -> Odometry:
    message = Odometry(header=header(stamp_ns, "odom"), child_frame_id="base_link")
    message.pose.pose.position.x, message.pose.pose.position.y = x, y
    message.pose.pose.orientation.z, message.pose.pose.orientation.w = math.sin(yaw / 2), math.cos(yaw / 2)
    return over_the_wire(message)


def camera_info(channel: str, width: int, height: int, k: np.ndarray) -> CameraInfo:
    message = CameraInfo(header=header(0, channel.lower()), width=width, height=height)
    message.k = k.reshape(-1)
    message.d = [0.0] * 5
    message.distortion_model = "plumb_bob"
    return over_the_wire(message)


def transform(channel: str, place: list[float], turn: Quaternion) -> TransformStamped:
    message = TransformStamped(header=header(0, "base_link"), child_frame_id=channel.lower())
    target = message.transform
    target.translation.x, target.translation.y, target.translation.z = (float(v) for v in place)
    target.rotation.w, target.rotation.x, target.rotation.y, target.rotation.z = (float(v) for v in turn)
    return over_the_wire(message)


def make_pipeline(size: tuple[int, int]) -> tuple[Oracle, Pipeline]:
    oracle = Oracle()
    data = DataConfig(image_size=(size[1], size[0]))
    predictor = StreamingPredictor(oracle, data=data)
    settings = replace(NodeSettings(), min_cameras=1, black_level=0, frozen_after=0, max_wait_s=0.01)
    return oracle, Pipeline(predictor, CAMERA_NAMES, settings)


def add_camera(pipeline: Pipeline, info: CameraInfo, mount: TransformStamped, channel: str) -> None:
    pipeline.add_camera_info(channel, messages.from_camera_info(info))
    pipeline.add_transform(mount.header.frame_id, mount.child_frame_id, messages.transform_matrix(mount))


STAMP_NS = 1_700_000_000_030_000_000
"""Of the image, between two messages of the odometry."""
# There the vehicle is at (600, 1200.3) and looks along +y: base_link x is global y.
X_M, Y_M, YAW_RAD = 1205.0 - 1200.3, -(610.0 - 600.0), 2.0 - math.pi / 2


def front_image(compressed: bool) -> CompressedImage | Image:
    pixels = np.full((90, 160, 3), 100, dtype=np.uint8)
    if compressed:
        message = CompressedImage(header=header(STAMP_NS, "cam_front"), format="jpeg")
        message.data = cv2.imencode(".jpg", pixels)[1].tobytes()
        return over_the_wire(message)
    message = Image(header=header(STAMP_NS, "cam_front"), height=90, width=160, encoding="rgb8", step=480)
    message.data = pixels.tobytes()
    return over_the_wire(message)


def see_the_car(compressed: bool = False) -> ImageSetResult:
    """What a vehicle that drives along y at 10 m/s makes of one image."""
    _, pipeline = make_pipeline((160, 90))
    optical = Quaternion(matrix=np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]))
    info = camera_info("CAM_FRONT", 160, 90, np.array([[80.0, 0, 80], [0, 80, 45], [0, 0, 1]]))
    add_camera(pipeline, info, transform("CAM_FRONT", [1, 0, 1.5], optical), "CAM_FRONT")
    for since_ns, y_m in ((-30_000_000, 1200.0), (20_000_000, 1200.5)):
        pose = odometry(STAMP_NS + since_ns, 600.0, y_m, math.pi / 2)
        pipeline.add_pose(messages.from_odometry(pose))
    message = front_image(compressed)
    read = messages.from_compressed if compressed else messages.from_image
    pipeline.add_image(read("CAM_FRONT", message))
    images = pipeline.wait(1.0)
    assert images is not None
    result = pipeline.process(images)
    assert result.perception is not None, result
    return result


@pytest.mark.parametrize("compressed", [True, False])
def test_a_car_arrives_where_it_is_in_base_link(compressed: bool) -> None:
    result = see_the_car(compressed)
    found = conversions.detections(conversions.boxes_in_base(result.perception))
    array = over_the_wire(messages.markers(header(result.stamp_ns, "base_link"), found))
    box = next(marker for marker in array.markers if marker.ns == "boxes")
    assert (box.header.frame_id, messages.stamp_ns(box.header.stamp)) == ("base_link", STAMP_NS)
    place, turn = box.pose.position, box.pose.orientation
    np.testing.assert_allclose([place.x, place.y, place.z], [X_M, Y_M, 1.0], atol=1e-4)
    assert 2 * math.atan2(turn.z, turn.w) == pytest.approx(YAW_RAD, abs=1e-5)
    np.testing.assert_allclose([box.scale.x, box.scale.y, box.scale.z], [4.6, 1.9, 1.7], atol=1e-5)
    arrow = next(marker for marker in array.markers if marker.ns == "velocities")
    assert len(arrow.points) == 6  # the shaft and two strokes of the head, which end where it does
    assert arrow.points[1] == arrow.points[3] == arrow.points[5]
    moved = [arrow.points[1].x - arrow.points[0].x, arrow.points[1].y - arrow.points[0].y]
    np.testing.assert_allclose(moved, [6.0, 3.0], atol=1e-4)


def test_a_car_is_one_cell_of_the_grid() -> None:
    result = see_the_car()
    perception = result.perception
    assert perception is not None
    assert perception.segmentation is not None
    cells = conversions.occupancy(perception.segmentation[0], HEAD.grid, perception.bev_to_ego)
    grid = over_the_wire(messages.occupancy_grid(header(result.stamp_ns, "base_link"), cells))
    column = int((X_M - grid.info.origin.position.x) / grid.info.resolution)
    row = int((Y_M - grid.info.origin.position.y) / grid.info.resolution)
    assert grid.data[row * grid.info.width + column] == 100
    assert sum(value > 50 for value in grid.data) == 1


@pytest.mark.skipif(messages.Detection3DArray is None, reason="needs vision_msgs")
def test_a_car_is_one_detection() -> None:
    result = see_the_car()
    found = conversions.detections(conversions.boxes_in_base(result.perception))
    out = header(result.stamp_ns, "base_link")
    (one,) = over_the_wire(messages.detection_array(out, found)).detections
    centre, size = one.bbox.center.position, one.bbox.size
    np.testing.assert_allclose([centre.x, centre.y, centre.z], [X_M, Y_M, 1.0], atol=1e-4)
    np.testing.assert_allclose([size.x, size.y, size.z], [4.6, 1.9, 1.7], atol=1e-5)
    hypothesis = one.results[0].hypothesis
    assert (hypothesis.class_id, hypothesis.score) == (DETECTION_CLASSES[0], pytest.approx(0.9))
    assert one.results[0].pose.pose.position == centre


def test_objects_survive_the_wire_exactly() -> None:
    rows = np.random.default_rng(0).normal(size=(7, 11)).astype(np.float32)
    for some in (rows, rows[:0]):
        cloud = over_the_wire(messages.object_cloud(header(5, "base_link"), some))
        assert cloud.width == len(some)
        found = np.frombuffer(memoryview(cloud.data), dtype=np.float32).reshape(-1, 11)
        assert np.array_equal(found, some)
        assert [field.name for field in cloud.fields] == list(conversions.OBJECT_FIELDS)


def test_the_real_key_frames_projection_through_messages_equals_the_devkits(real_keyframe: Path) -> None:
    reader = NuScenesReader(DataConfig(root=str(real_keyframe), version="v1.0-mini"))
    nusc = reader.nusc
    record = nusc.sample[0]
    oracle, pipeline = make_pipeline((800, 450))
    reference = reader.sensor_data(record, "LIDAR_TOP")
    pipeline.settings = replace(pipeline.settings, sweep_trigger=True)
    pipeline._sync.settings = replace(pipeline._sync.settings, sweep=True, tolerance_s=0.1)
    pipeline._sync._triggers = ("sweep", *CAMERA_NAMES)
    stamps = {}
    for channel in (*CAMERA_NAMES, "LIDAR_TOP"):
        data = reader.sensor_data(record, channel)
        stamps[channel] = data["timestamp"] * 1000
        ego = nusc.get("ego_pose", data["ego_pose_token"])
        message = Odometry(header=header(stamps[channel], "odom"), child_frame_id="base_link")
        place, turn = message.pose.pose.position, message.pose.pose.orientation
        place.x, place.y, place.z = ego["translation"]
        turn.w, turn.x, turn.y, turn.z = ego["rotation"]
        pipeline.add_pose(messages.from_odometry(over_the_wire(message)))
        if channel == "LIDAR_TOP":
            continue
        mount = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
        info = camera_info(channel, data["width"], data["height"], np.array(mount["camera_intrinsic"]))
        add_camera(
            pipeline, info, transform(channel, mount["translation"], Quaternion(mount["rotation"])), channel
        )
    for channel in CAMERA_NAMES:
        data = reader.sensor_data(record, channel)
        message = CompressedImage(header=header(stamps[channel], channel.lower()), format="jpeg")
        message.data = (reader.root / data["filename"]).read_bytes()
        pipeline.add_image(messages.from_compressed(channel, over_the_wire(message)))
    pipeline.add_sweep(stamps["LIDAR_TOP"])
    images = pipeline.wait(1.0)
    assert images is not None
    assert images.stamp_ns == reference["timestamp"] * 1000
    result = pipeline.process(images)
    assert not result.masked
    compared = 0
    bev_to_global = reader.sample(record["token"]).bev_to_global
    for slot, channel in enumerate(CAMERA_NAMES):
        _, boxes, intrinsic = nusc.get_sample_data(record["data"][channel])
        for box in boxes:
            if box.center[2] < 1.0:
                continue
            wanted = view_points(box.center[:, None], intrinsic, normalize=True)[:2, 0] / 2
            annotated = nusc.get("sample_annotation", box.token)["translation"]
            point = torch.tensor([*annotated, 1.0], dtype=torch.float64)
            in_bev = invert_rigid(bev_to_global) @ point
            pixels, _ = project_points(in_bev[None, :3], oracle.frames.bev_to_image[0, slot].double())
            np.testing.assert_allclose(pixels[0], wanted, rtol=1e-4, atol=0.02)
            compared += 1
    assert compared > 20


def test_lines_without_points_are_not_sent() -> None:
    out = header(10**9, "base_link")
    assert [marker.action for marker in messages.markers(out, []).markers] == [Marker.DELETEALL]
    values = torch.tensor([[1.0, 2.0, 0.5, 4.0, 2.0, 1.5, 0.0, 0.0, 0.0]])
    standing = conversions.detections(Boxes3D(values, torch.tensor([0]), torch.tensor([0.5])))
    names = [marker.ns for marker in over_the_wire(messages.markers(out, standing)).markers]
    assert names == ["", "boxes", "labels", "headings"]
