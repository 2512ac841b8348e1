"""CAN-bus vectors from messages and from ego poses."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nuscenes.can_bus.can_bus_api import NuScenesCanBus
from pyquaternion import Quaternion

from bevperception.calibration import TimedPose
from bevperception.can_bus import GRAVITY_M_S2, CanBusTrail, ego_motion, with_ego_pose
from bevperception.config import DataConfig
from bevperception.data.can_bus import MOST_MESSAGE_BYTES, CanBusReader
from bevperception.data.nuscenes import NuScenesReader
from bevperception.errors import DataError
from tests.fixtures.tiny_nuscenes import (
    SCENES,
    SPEED_M_S,
    TRAIN_SPLIT,
    VERSION,
    YAW_RATE_RAD_S,
    ego_pose,
    write_tiny_nuscenes,
)

WITH_CAN, WITHOUT_CAN = SCENES[0], SCENES[1]


def open_reader(root: Path) -> NuScenesReader:
    return NuScenesReader(DataConfig(root=str(root), version=VERSION))


@pytest.fixture(scope="module")
def reader(tiny_nuscenes: Path) -> NuScenesReader:
    return open_reader(tiny_nuscenes)


def tokens_of(reader: NuScenesReader, scene: int) -> tuple[str, ...]:
    return reader.scenes(TRAIN_SPLIT)[scene].sample_tokens


def test_rates_are_the_last_messages_before_the_sample(reader: NuScenesReader, tiny_nuscenes: Path) -> None:
    can_bus = CanBusReader(reader)
    messages = NuScenesCanBus(str(tiny_nuscenes)).get_messages(WITH_CAN.name, "pose")
    for token in tokens_of(reader, 0):
        stamp = reader.nusc.get("sample", token)["timestamp"]
        last = max((m for m in messages if m["utime"] <= stamp), key=lambda m: m["utime"])
        assert 0 < stamp - last["utime"] < 20_000
        expected = [*last["accel"], *last["rotation_rate"], *last["vel"]]
        np.testing.assert_allclose(can_bus.vector(token)[7:16], expected)


@pytest.mark.parametrize("style", ["exact", "published"])
def test_pose_is_the_samples_own(reader: NuScenesReader, style: Any) -> None:
    can_bus = CanBusReader(reader, style)
    for scene, record in ((WITH_CAN, 0), (WITHOUT_CAN, 1)):
        for index, token in enumerate(tokens_of(reader, record)):
            place, turn = ego_pose(scene, 0.5 * index)
            vector = can_bus.vector(token)
            assert vector.dtype == torch.float64
            np.testing.assert_allclose(vector[:3], place)
            orientation = turn.elements if style == "exact" else [turn.w] * 4
            np.testing.assert_allclose(vector[3:7], orientation)
            yaw = turn.rotate(np.array([1.0, 0, 0]))
            expected = math.atan2(yaw[1], yaw[0]) % (2 * math.pi)
            assert float(vector[-2]) == pytest.approx(expected)
            assert float(vector[-1]) == pytest.approx(math.degrees(expected))


def test_the_equivalent_from_poses_is_what_messages_would_say(reader: NuScenesReader) -> None:
    can_bus = CanBusReader(reader)
    assert can_bus.has_messages(WITH_CAN.name)
    assert not can_bus.has_messages(WITHOUT_CAN.name)
    for index, token in enumerate(tokens_of(reader, 1)):
        vector = can_bus.vector(token).numpy()
        _, turn = ego_pose(WITHOUT_CAN, 0.5 * index)
        one_sided = index in (0, 3)
        np.testing.assert_allclose(vector[13:16], [SPEED_M_S, 0, 0], atol=0.2 if one_sided else 0.05)
        np.testing.assert_allclose(
            vector[10:13], turn.inverse.rotate(np.array([0, 0, YAW_RATE_RAD_S])), atol=1e-3
        )
        gravity = turn.inverse.rotate(np.array([0, 0, GRAVITY_M_S2]))
        centripetal = np.array([0, 0 if one_sided else SPEED_M_S * YAW_RATE_RAD_S, 0])
        np.testing.assert_allclose(vector[7:10], gravity + centripetal, atol=0.05)


def test_published_style_has_zeros_without_messages(reader: NuScenesReader) -> None:
    vector = CanBusReader(reader, "published").vector(tokens_of(reader, 1)[1])
    assert vector[7:16].tolist() == [0.0] * 9
    assert float(vector[0]) != 0.0


def test_no_can_bus_folder_and_devkit_blacklist(tmp_path: Path) -> None:
    root = write_tiny_nuscenes(tmp_path)
    assert not CanBusReader(open_reader(root)).has_messages("scene-0161"), "blacklisted by the devkit"
    assert not CanBusReader(open_reader(root)).has_messages("a scene of another name")
    for path in (root / "can_bus").iterdir():
        path.unlink()
    (root / "can_bus").rmdir()
    reader = open_reader(root)
    assert CanBusReader(reader).vector(tokens_of(reader, 0)[1]).isfinite().all()


@pytest.mark.parametrize("content", ["[{", '[{"utime": 3}]', '[{"utime": "now"}]'])
def test_damaged_messages(tmp_path: Path, content: str) -> None:
    root = write_tiny_nuscenes(tmp_path)
    (root / "can_bus" / f"{WITH_CAN.name}_pose.json").write_text(content)
    reader = open_reader(root)
    with pytest.raises(DataError, match=r"scene-9001_pose\.json is damaged"):
        CanBusReader(reader).vector(tokens_of(reader, 0)[0])


def test_messages_are_a_regular_file_of_bounded_size(tmp_path: Path) -> None:
    root = write_tiny_nuscenes(tmp_path)
    path = root / "can_bus" / f"{WITH_CAN.name}_pose.json"
    os.truncate(path, MOST_MESSAGE_BYTES + 1)
    with pytest.raises(DataError, match=r"cannot read CAN-bus file .*9001_pose\.json: it has 67108865 bytes"):
        CanBusReader(open_reader(root)).has_messages(WITH_CAN.name)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="it is a pipe or a device"):
        CanBusReader(open_reader(root)).has_messages(WITH_CAN.name)


def test_messages_need_not_be_sorted_nor_start_in_time(tmp_path: Path) -> None:
    root = write_tiny_nuscenes(tmp_path)
    path = root / "can_bus" / f"{WITH_CAN.name}_pose.json"
    reader = open_reader(root)
    token = tokens_of(reader, 0)[1]
    expected = CanBusReader(reader).vector(token)
    messages = json.loads(path.read_text())
    path.write_text(json.dumps(messages[::-1]))
    assert torch.equal(CanBusReader(reader).vector(token), expected)
    path.write_text(json.dumps([m | {"vel": [7.0, 0, 0]} for m in messages[-1:]]))
    assert float(CanBusReader(reader).vector(token)[13]) == 7.0, "the first message, as none is earlier"


def test_ego_motion_of_a_uniformly_accelerated_car() -> None:
    # x = 3 t + t^2, no turn; uneven spacing.
    straight = (1.0, 0.0, 0.0, 0.0)
    poses = [TimedPose(round(1e9 * t), (3 * t + t * t, 0.0, 0.0), straight) for t in (-0.3, 0.0, 0.5)]
    acceleration, rate, velocity = ego_motion(*poses)
    np.testing.assert_allclose(velocity, [3, 0, 0], atol=1e-12)
    np.testing.assert_allclose(acceleration, [2, 0, GRAVITY_M_S2], atol=1e-12)
    np.testing.assert_allclose(rate, 0, atol=1e-12)
    turn = Quaternion(axis=[0, 0, 1], radians=-0.2)
    turned = TimedPose(500_000_000, poses[2].translation_m, tuple(turn.elements))  # type: ignore[arg-type]
    _, rate, _ = ego_motion(None, poses[1], turned)
    np.testing.assert_allclose(rate, [0, 0, -0.4], atol=1e-12)
    alone = ego_motion(None, poses[1], None)
    np.testing.assert_allclose(np.stack(alone), [[0, 0, GRAVITY_M_S2], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("degrees", [0.0, 90.0, 179.9, 180.0, 270.0, 359.5])
def test_yaw_is_never_negative(degrees: float) -> None:
    turn = torch.tensor(Quaternion(axis=[0, 0, 1], degrees=degrees).elements)
    vector = with_ego_pose(torch.zeros(18, dtype=torch.float64), torch.zeros(3), turn)
    assert float(vector[-1]) == pytest.approx(degrees, abs=1e-9)
    assert float(vector[-2]) == pytest.approx(math.radians(degrees), abs=1e-9)


def lidar_poses(reader: NuScenesReader, token: str) -> list[TimedPose]:
    """Poses of the reference sensor's chain up to a sample, in order of time."""
    record = reader.sensor_data(reader.nusc.get("sample", token), "LIDAR_TOP")
    poses = []
    while True:
        pose = reader.nusc.get("ego_pose", record["ego_pose_token"])
        poses.append(
            TimedPose(record["timestamp"] * 1000, tuple(pose["translation"]), tuple(pose["rotation"]))
        )
        if not record["prev"]:
            return poses[::-1]
        record = reader.nusc.get("sample_data", record["prev"])


@pytest.mark.parametrize("style", ["exact", "published"])
def test_a_vehicles_vector_equals_the_readers(reader: NuScenesReader, style: Any) -> None:
    """At a scene's end the data set knows no more than a vehicle: the poses up to now."""
    token = tokens_of(reader, 1)[-1]
    trail = CanBusTrail(style)
    for pose in lidar_poses(reader, token):
        vector = trail.vector(pose.stamp_ns * 1e-9, pose.matrix())
    expected = CanBusReader(reader, "exact").vector(token)
    if style == "published":
        expected[3:7] = expected[3]
    sign = torch.sign(expected[3])
    expected[3:7] *= sign
    np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert float(vector[13]) == pytest.approx(SPEED_M_S, abs=0.2)


def test_a_vehicles_vector_without_neighbours(reader: NuScenesReader) -> None:
    trail = CanBusTrail("exact")
    poses = [
        TimedPose(round(1e9 * t), (3.0 * t, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0))
        for t in (0.0, 0.1, 0.3, 2.0, 2.4)
    ]
    speeds = []
    for pose in poses:
        speeds.append(float(trail.vector(pose.stamp_ns * 1e-9, pose.matrix())[13]))
    # Too near to say anything, then far enough, then too old, then far enough again.
    np.testing.assert_allclose(speeds, [0, 0, 3, 0, 3], atol=1e-6)
    trail.forget()
    assert float(trail.vector(2.8, poses[-1].matrix())[13]) == 0.0
