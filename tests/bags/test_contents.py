"""What goes into bags and comes out of them, as far as that can be tested without rosbags."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pyquaternion import Quaternion

from bevperception.bags import files, messages, recording
from bevperception.bags.evaluation import evaluate_recording, reference_stamp_ns
from bevperception.bags.messages import Messages, object_rows_of, stamp_ns_of
from bevperception.bags.recording import Recording, read_recording
from bevperception.bags.scene import ODOMETRY_TOPIC, TRUTH_TOPIC, BagOptions, _SceneMessages, _twist
from bevperception.config import ExperimentConfig
from bevperception.data.map_labels import SegmentationLabels
from bevperception.data.nuscenes import NuScenesReader
from bevperception.errors import ConfigError
from bevperception.streaming.conversions import boxes_of_rows, object_rows
from bevperception.structures import Boxes3D
from tests.bags.differences import largest_box_difference
from tests.fixtures.tiny_nuscenes import SCENES, SPEED_M_S, VAL_SPLIT, YAW_RATE_RAD_S, ego_pose
from tests.streaming.helpers import micro_config

# Fields in the order of the message definitions of ROS 2.
FIELDS = {
    "builtin_interfaces/msg/Time": "sec nanosec",
    "std_msgs/msg/Header": "stamp frame_id",
    "sensor_msgs/msg/Image": "header height width encoding is_bigendian step data",
    "sensor_msgs/msg/CompressedImage": "header format data",
    "sensor_msgs/msg/CameraInfo": "header height width distortion_model d k r p binning_x binning_y roi",
    "sensor_msgs/msg/RegionOfInterest": "x_offset y_offset height width do_rectify",
    "sensor_msgs/msg/PointField": "name offset datatype count",
    "sensor_msgs/msg/PointCloud2": (
        "header height width fields is_bigendian point_step row_step data is_dense"
    ),
    "geometry_msgs/msg/Point": "x y z",
    "geometry_msgs/msg/Vector3": "x y z",
    "geometry_msgs/msg/Quaternion": "x y z w",
    "geometry_msgs/msg/Pose": "position orientation",
    "geometry_msgs/msg/PoseWithCovariance": "pose covariance",
    "geometry_msgs/msg/Twist": "linear angular",
    "geometry_msgs/msg/TwistWithCovariance": "twist covariance",
    "geometry_msgs/msg/Transform": "translation rotation",
    "geometry_msgs/msg/TransformStamped": "header child_frame_id transform",
    "nav_msgs/msg/Odometry": "header child_frame_id pose twist",
    "tf2_msgs/msg/TFMessage": "transforms",
}


def message_type(fields: str) -> Any:
    names = fields.split()

    def make(*values: Any, **named: Any) -> SimpleNamespace:
        made = dict(zip(names, values, strict=False)) | named
        assert list(made) == names or set(made) == set(names), (names, list(made))
        return SimpleNamespace(**made)

    return make


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages with the fields of ROS, without rosbags."""
    types = {name: message_type(fields) for name, fields in FIELDS.items()}
    monkeypatch.setattr(messages, "typestore", lambda: SimpleNamespace(types=types))


def reading(
    root: Path, bev_frame: Literal["ego", "lidar"] = "ego"
) -> tuple[ExperimentConfig, NuScenesReader]:
    config = micro_config(root)
    config.data.bev_frame = bev_frame
    return config, NuScenesReader(config.data)


def events(reader: NuScenesReader, topic: str) -> list[Any]:
    scene = _SceneMessages(reader, reader.scene("scene-9003"), BagOptions())
    return [event for event in scene.events() if event.topic == topic]


def test_images_are_rows_of_columns() -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    made = Messages().image(1_500_000_002, "cam", pixels[:, ::-1])
    assert (made.height, made.width, made.step, made.encoding, made.is_bigendian) == (5, 7, 21, "bgr8", 0)
    assert np.array_equal(made.data.reshape(made.height, made.step // 3, 3), pixels[:, ::-1])
    assert (stamp_ns_of(made.header), made.header.stamp.nanosec) == (1_500_000_002, 500_000_002)


def test_camera_info_is_width_by_height() -> None:
    info = Messages().camera_info(0, "cam", (70, 50), np.array([[3.0, 0, 35], [0, 4, 25], [0, 0, 1]]))
    assert (info.width, info.height) == (70, 50)
    assert info.k.tolist() == [3, 0, 35, 0, 4, 25, 0, 0, 1]
    assert info.p.tolist() == [3, 0, 35, 0, 0, 4, 25, 0, 0, 0, 1, 0]


def test_odometry_has_the_twist_of_a_turned_car(tiny_nuscenes: Path) -> None:
    """In base_link, where a car drives forward whatever its heading on the map."""
    _, reader = reading(tiny_nuscenes)
    found = events(reader, ODOMETRY_TOPIC)
    assert len(found) == 28
    for event in found[1:-1]:
        since_s = (stamp_ns_of(event.message.header) - 1_600_000_120 * 10**9) * 1e-9
        place, turn = ego_pose(SCENES[2], since_s)
        pose, twist = event.message.pose.pose, event.message.twist.twist
        np.testing.assert_allclose([pose.position.x, pose.position.y, pose.position.z], place, atol=1e-6)
        orientation = [pose.orientation.w, pose.orientation.x, pose.orientation.y, pose.orientation.z]
        np.testing.assert_allclose(orientation, turn.elements, atol=1e-9)
        speed = math.hypot(twist.linear.x, twist.linear.y)
        # Neighbours lie up to half a second apart: the chord is hardly shorter than the arc.
        assert speed == pytest.approx(SPEED_M_S, rel=2e-3)
        assert twist.linear.x == pytest.approx(SPEED_M_S, rel=2e-3)
        assert twist.angular.z == pytest.approx(YAW_RATE_RAD_S, rel=2e-2)


def test_a_twist_is_in_the_cars_axes() -> None:
    """A car that heads left (+y of the map), tilted, and slides to its right as it climbs."""
    turn = Quaternion(axis=[0, 0, 1], degrees=90) * Quaternion(axis=[1, 0, 0], degrees=30)
    own = np.array([4.0, -1.0, 0.5])
    places = [turn.rotate(own) * (0.1 * k) for k in range(3)]
    linear, angular = _twist([0, 10**8, 2 * 10**8], places, [turn] * 3, 1)
    np.testing.assert_allclose(linear, own, atol=1e-9)
    np.testing.assert_allclose(angular, np.zeros(3), atol=1e-9)
    turns = [Quaternion(axis=[0, 0, 1], radians=0.05 * k) for k in range(3)]
    _, angular = _twist([0, 10**8, 2 * 10**8], places, turns, 1)
    np.testing.assert_allclose(angular, [0, 0, 0.5], atol=1e-9)
    far = _twist([0, 10**9, 2 * 10**9], places, turns, 1)
    assert [part.tolist() for part in far] == [[0.0] * 3] * 2


def truth(reader: NuScenesReader) -> dict[int, Boxes3D]:
    return {
        stamp_ns_of(event.message.header): boxes_of_rows(object_rows_of(event.message))
        for event in events(reader, TRUTH_TOPIC)
    }


@pytest.mark.parametrize("bev_frame", ["ego", "lidar"])
def test_the_truth_of_the_bag_is_perfect(
    tiny_nuscenes: Path, tmp_path: Path, bev_frame: Literal["ego", "lidar"]
) -> None:
    """In base_link, whatever frame the model reasons in; the devkit finds no error but rounding."""
    config, reader = reading(tiny_nuscenes, bev_frame)
    objects = truth(reader)
    labels = SegmentationLabels(reader.root, config.model.segmentation, config.data.divider_width_m)
    cells: dict[int, dict[str, Any]] = {}
    for token in reader.scene("scene-9003").sample_tokens:
        sample = reader.sample(token)
        vehicles = reader.annotations(sample).vehicles
        drawn, _ = labels.draw(reader.location(sample.scene_token), sample.bev_to_global, vehicles)
        layers = (drawn * 100).to(torch.int8).numpy()
        classes = config.model.segmentation.classes
        cells[reference_stamp_ns(reader, token)] = dict(zip(classes, layers, strict=True))
    result = evaluate_recording(Recording(objects, cells, {}), config, reader, VAL_SPLIT, tmp_path)
    assert not result.skipped
    assert result.detection is not None
    found = result.detection.as_dict()
    assert found["present"]["mAP"] == pytest.approx(1.0, abs=1e-6)
    assert found["present"]["mATE"] < 1e-4
    assert found["present"]["mAOE"] < 1e-4
    assert found["present"]["mAVE"] < 1e-3
    assert result.segmentation is not None
    assert result.segmentation.as_dict()["mean_iou"] == 1.0
    # Two bags of one drive, of models in different frames, hold the same truth.
    ego = truth(reading(tiny_nuscenes)[1])
    assert set(ego) == set(objects)
    for stamp_ns, boxes in objects.items():
        assert largest_box_difference(boxes, ego[stamp_ns]) < 1e-4


class FakeReader:
    """Messages as an opened bag yields them."""

    def __init__(self, sent: list[tuple[str, Any]]) -> None:
        self._sent = sent
        self.connections = [SimpleNamespace(topic=topic, msgtype="") for topic, _ in sent]

    def messages(self) -> Iterator[tuple[Any, int, Any]]:
        yield from ((c, 0, m) for c, (_, m) in zip(self.connections, self._sent, strict=True))

    def deserialize(self, data: Any, kind: str) -> Any:
        return data


def test_a_recordings_grid_is_rows_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = np.arange(15, dtype=np.int8)
    header = Messages().header(12, "base_link")
    grid = SimpleNamespace(header=header, info=SimpleNamespace(height=3, width=5), data=cells)
    boxes = boxes_of_rows(np.arange(22, dtype=np.float32).reshape(2, 11))
    sent = [
        ("/bev_perception/output/objects", Messages().objects(12, "base_link", object_rows(boxes))),
        ("/bev_perception/output/segmentation/vehicle", grid),
    ]

    @contextmanager
    def opened(path: Path) -> Iterator[FakeReader]:
        yield FakeReader(sent)

    monkeypatch.setattr(recording, "open_reader", opened)
    found = read_recording(Path("bag"))
    probabilities = found.probabilities(12, ("vehicle",))
    assert probabilities is not None
    assert probabilities.shape == (1, 3, 5)
    torch.testing.assert_close(probabilities[0], torch.arange(15.0).reshape(3, 5) / 100)
    torch.testing.assert_close(found.objects[12].values, boxes.values)
    assert found.probabilities(12, ("vehicle", "walkway")) is None


def test_the_difference_of_boxes_is_looked_for_both_ways() -> None:
    values = torch.tensor([[5.0, 1, 0, 4, 2, 1.5, 0.3, 1, 0], [9.0, 1, 0, 4, 2, 1.5, 0.3, 1, 0]])
    boxes = Boxes3D(values, torch.tensor([0, 0]), torch.tensor([0.5, 0.5]))
    twice = boxes[
        torch.tensor([0, 0])
    ]  # each of its boxes has a twin in the other list; one of those has none
    for one, other in ((boxes, twice), (twice, boxes)):
        assert largest_box_difference(one, other) == pytest.approx(4.0)
    assert largest_box_difference(boxes, boxes[torch.tensor([1, 0])]) == 0.0
    assert largest_box_difference(boxes[:0], boxes[:0]) == 0.0
    assert largest_box_difference(boxes, boxes[:1]) == math.inf
    assert largest_box_difference(boxes, replace(boxes, labels=torch.tensor([0, 1]))) == math.inf


def test_bags_need_rosbags_only_when_they_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rosbags", None)
    for use in (
        files.typestore,
        lambda: files.offered_qos(True, 1),
        lambda: files.open_reader(tmp_path).__enter__(),
        lambda: files.open_writer(tmp_path / "bag", "mcap").__enter__(),
    ):
        with pytest.raises(ConfigError, match="bags need the rosbags package"):
            use()
    assert list(tmp_path.iterdir()) == []
