"""The reader on the tiny data set, against the devkit's own arithmetic, and on damaged tables."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import BoxVisibility, view_points
from pyquaternion import Quaternion

from bevperception.config import DataConfig
from bevperception.data.nuscenes import NuScenesReader
from bevperception.errors import DataError, SampleError
from bevperception.geometry import project_points, yaw_of
from bevperception.taxonomy import DETECTION_CLASSES
from tests.fixtures.tiny_nuscenes import (
    KEY_FRAMES,
    LIDAR_MOUNT,
    SCENES,
    TRAIN_SPLIT,
    VAL_SPLIT,
    VERSION,
    ego_pose,
    write_tiny_nuscenes,
)


def open_reader(root: Path, **settings: Any) -> NuScenesReader:
    return NuScenesReader(DataConfig(root=str(root), version=VERSION, **settings))


def edit(root: Path, table: str, change: Callable[[list[dict[str, Any]]], None]) -> None:
    path = root / VERSION / f"{table}.json"
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))


def devkit_box_in_bev(reader: NuScenesReader, token: str, bev_frame: str) -> Box:
    """The annotation brought into the BEV frame by the devkit's Box, quaternion by quaternion."""
    nusc = reader.nusc
    box = nusc.get_box(token)
    box.velocity = nusc.box_velocity(token)
    sample = nusc.get("sample", nusc.get("sample_annotation", token)["sample_token"])
    data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    pose = nusc.get("ego_pose", data["ego_pose_token"])
    box.translate(-np.array(pose["translation"]))
    box.rotate(Quaternion(pose["rotation"]).inverse)
    if bev_frame == "lidar":
        mount = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
        box.translate(-np.array(mount["translation"]))
        box.rotate(Quaternion(mount["rotation"]).inverse)
    return box


@pytest.mark.parametrize("bev_frame", ["ego", "lidar"])
def test_boxes_are_the_devkits(tiny_nuscenes: Path, bev_frame: str) -> None:
    reader = open_reader(tiny_nuscenes, bev_frame=bev_frame)
    sample = reader.sample(reader.scenes(TRAIN_SPLIT)[0].sample_tokens[2])
    annotations = reader.annotations(sample)
    assert len(annotations.boxes) == 11
    for row, token in zip(annotations.boxes.values.double(), annotations.tokens, strict=True):
        box = devkit_box_in_bev(reader, token, bev_frame)
        np.testing.assert_allclose(row[:3], box.center, atol=1e-5)
        np.testing.assert_allclose(row[[4, 3, 5]], box.wlh, rtol=1e-6)
        heading = box.rotation_matrix[:, 0]
        assert float(row[6]) == pytest.approx(np.arctan2(heading[1], heading[0]), abs=1e-5)
        np.testing.assert_allclose(row[7:9], box.velocity[:2], atol=1e-5)
    expected = ["car", "car", "truck", "construction_vehicle", "bus", "trailer", "barrier"]
    expected += ["motorcycle", "bicycle", "pedestrian", "traffic_cone"]
    assert [DETECTION_CLASSES[label] for label in annotations.boxes.labels] == expected
    assert annotations.attributes[0] == "vehicle.moving"
    assert annotations.attributes[6] == ""
    assert annotations.visibility == [4] * 11
    assert annotations.points == [20] * 11


@pytest.mark.parametrize("bev_frame", ["ego", "lidar"])
def test_projection_uses_each_cameras_own_pose(tiny_nuscenes: Path, bev_frame: str) -> None:
    reader = open_reader(tiny_nuscenes, bev_frame=bev_frame)
    sample = reader.sample(reader.scenes(TRAIN_SPLIT)[0].sample_tokens[1])
    annotations = reader.annotations(sample)
    record = reader.nusc.get("sample", sample.token)
    seen = 0
    for camera in sample.cameras:
        _, boxes, intrinsics = reader.nusc.get_sample_data(
            record["data"][camera.channel], box_vis_level=BoxVisibility.ANY
        )
        centres = {box.token: box.center for box in boxes}
        points = annotations.boxes.values[:, :3].double()
        pixels, depth = project_points(points, camera.projection(sample.bev_to_global))
        for index, token in enumerate(annotations.tokens):
            if token in centres:
                expected = view_points(centres[token][:, None], intrinsics, normalize=True)[:2, 0]
                np.testing.assert_allclose(pixels[index], expected, atol=1e-3)
                assert float(depth[index]) == pytest.approx(centres[token][2], abs=1e-5)
                seen += 1
        assert camera.path.is_file()
        assert camera.timestamp_s < sample.timestamp_s
    assert seen >= 11


def test_bev_frames(tiny_nuscenes: Path) -> None:
    token = open_reader(tiny_nuscenes).scenes(TRAIN_SPLIT)[0].sample_tokens[0]
    ego = open_reader(tiny_nuscenes).sample(token)
    lidar = open_reader(tiny_nuscenes, bev_frame="lidar").sample(token)
    place, turn = ego_pose(SCENES[0], 0.0)
    np.testing.assert_allclose(ego.bev_to_global[:3, 3], place)
    np.testing.assert_allclose(ego.bev_to_global[:3, :3], turn.rotation_matrix, atol=1e-12)
    assert torch.equal(ego.bev_to_global, ego.ego_to_global)
    assert torch.equal(lidar.ego_to_global, ego.ego_to_global)
    mount = torch.linalg.inv(ego.ego_to_global) @ lidar.bev_to_global
    np.testing.assert_allclose(mount[:3, 3], LIDAR_MOUNT[0], atol=1e-9)
    assert float(yaw_of(mount)) == pytest.approx(-np.pi / 2), "x to the right"
    assert ego.bev_to_global.dtype == torch.float64


def test_ground_truth_needs_points_unless_told_otherwise(tiny_nuscenes: Path) -> None:
    for min_points, count in ((0, 12), (1, 11), (20, 11), (21, 0)):
        reader = open_reader(tiny_nuscenes, min_points=min_points)
        sample = reader.sample(reader.scenes(TRAIN_SPLIT)[0].sample_tokens[0])
        annotations = reader.annotations(sample)
        assert len(annotations.boxes) == count
        assert annotations.boxes.values.shape == (count, 9)
        assert annotations.boxes.labels.dtype == torch.int64


def test_a_single_annotation_has_no_velocity(tmp_path: Path) -> None:
    def cut(records: list[dict[str, Any]]) -> None:
        for record in records:
            record.update(prev="", next="")

    edit(write_tiny_nuscenes(tmp_path), "sample_annotation", cut)
    reader = open_reader(tmp_path)
    values = reader.annotations(reader.sample(reader.scenes(VAL_SPLIT)[0].sample_tokens[0])).boxes.values
    assert bool(values[:, 7:].isnan().all())
    assert bool(values[:, :7].isfinite().all())


def test_scenes_and_order(tiny_nuscenes: Path) -> None:
    reader = open_reader(tiny_nuscenes)
    scenes = reader.scenes(TRAIN_SPLIT)
    assert [s.name for s in scenes] == ["scene-9001", "scene-9002"]
    assert [s.location for s in scenes] == ["singapore-onenorth", "boston-seaport"]
    tokens = scenes[1].sample_tokens
    assert len(tokens) == KEY_FRAMES
    times = [reader.sample(t).timestamp_s for t in tokens]
    np.testing.assert_allclose(np.diff(times), 0.5, atol=1e-6)
    assert reader.previous(tokens[2], 5) == [tokens[1], tokens[0]]
    assert reader.previous(tokens[3], 2) == [tokens[2], tokens[1]]
    assert reader.previous(tokens[0], 2) == []
    assert reader.sample(tokens[0]).scene_token == scenes[1].token


def test_cameras_are_the_configured_ones_in_order(tiny_nuscenes: Path) -> None:
    reader = open_reader(tiny_nuscenes, cameras=("CAM_BACK", "CAM_FRONT"))
    sample = reader.sample(reader.scenes(VAL_SPLIT)[0].sample_tokens[0])
    assert [c.channel for c in sample.cameras] == ["CAM_BACK", "CAM_FRONT"]
    reader = open_reader(tiny_nuscenes, cameras=("CAM_ROOF",))
    with pytest.raises(SampleError, match=r"no key frame of CAM_ROOF; it has .*CAM_FRONT"):
        reader.sample(sample.token)


def test_a_copy_for_another_process(tiny_nuscenes: Path) -> None:
    reader = open_reader(tiny_nuscenes)
    data = pickle.dumps(reader)
    assert len(data) < 2000, "the tables do not travel"
    copy = pickle.loads(data)
    assert copy.scenes(VAL_SPLIT) == reader.scenes(VAL_SPLIT)


def test_missing_root_version_and_table(tmp_path: Path, tiny_nuscenes: Path) -> None:
    with pytest.raises(DataError, match=r"data root .*absent does not exist; set data\.root"):
        open_reader(tmp_path / "absent")
    with pytest.raises(
        DataError, match=r"no version 'v1\.0-mini'; set data\.version\nversions there: v1\.0-tiny"
    ):
        NuScenesReader(DataConfig(root=str(tiny_nuscenes), version="v1.0-mini"))
    write_tiny_nuscenes(tmp_path)
    (tmp_path / VERSION / "ego_pose.json").unlink()
    with pytest.raises(DataError, match=r"damaged:\nego_pose\.json is missing"):
        open_reader(tmp_path)


def test_damaged_tables(tmp_path: Path) -> None:
    write_tiny_nuscenes(tmp_path)
    path = tmp_path / VERSION / "sample_data.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not valid JSON"):
        open_reader(tmp_path)
    path.write_text(whole)
    (tmp_path / "maps" / "tiny.png").unlink()
    with pytest.raises(DataError, match=r"refuses .*tiny\.png does not exist"):
        open_reader(tmp_path)


def test_radar_points_count_as_points(tmp_path: Path) -> None:
    def measure(records: list[dict[str, Any]]) -> None:
        first = [r for r in records if r["sample_token"] == "sample-0000"]
        for lidar, radar, record in zip((0, 1, 0, 2), (1, 0, 0, 3), first, strict=False):
            record.update(num_lidar_pts=lidar, num_radar_pts=radar)

    edit(write_tiny_nuscenes(tmp_path), "sample_annotation", measure)
    reader = open_reader(tmp_path)
    annotations = reader.annotations(reader.sample("sample-0000"))
    assert annotations.points[:3] == [1, 1, 5], "the box without any point is no ground truth"


def test_every_scene_has_the_mountings_of_its_own_car(tmp_path: Path) -> None:
    """A second car carries the camera elsewhere, with another lens; every scene names its own records."""
    root = write_tiny_nuscenes(tmp_path)
    moved = {"translation": [3.5, -1.25, 2.0], "camera_intrinsic": [[70.0, 0, 81], [0, 60.0, 44], [0, 0, 1]]}
    scenes = json.loads((root / VERSION / "scene.json").read_text())
    samples = json.loads((root / VERSION / "sample.json").read_text())
    of_last = {s["token"] for s in samples if s["scene_token"] == scenes[-1]["token"]}

    def add(records: list[dict[str, Any]]) -> None:
        records.append({**records[1], "token": "other-car", **moved})

    def use(records: list[dict[str, Any]]) -> None:
        for record in records:
            if record["sample_token"] in of_last and "/CAM_FRONT/" in record["filename"]:
                record["calibrated_sensor_token"] = "other-car"

    edit(root, "calibrated_sensor", add)
    edit(root, "sample_data", use)
    reader = open_reader(root)
    first, last = (
        reader.sample(reader.scene(name).sample_tokens[0]) for name in ("scene-9001", "scene-9003")
    )
    for sample, place, focal in ((first, [1.6, 0.0, 1.55], None), (last, moved["translation"], 70.0)):
        camera = next(c for c in sample.cameras if c.channel == "CAM_FRONT")
        record = reader.nusc.get("sample_data", reader.nusc.get("sample", sample.token)["data"]["CAM_FRONT"])
        pose = reader.nusc.get("ego_pose", record["ego_pose_token"])
        turn = Quaternion(pose["rotation"]).rotation_matrix
        np.testing.assert_allclose(camera.ego_to_global[:3, :3], turn, atol=1e-12)
        np.testing.assert_allclose(camera.ego_to_global[:3, 3], pose["translation"])
        np.testing.assert_allclose(camera.pinhole.camera_to_ego[:3, 3], place, atol=1e-9)
        assert (float(camera.pinhole.intrinsics[0, 0]) == 70.0) == (focal is not None)
