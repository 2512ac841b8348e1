"""The unmodified devkit, and this project's own reader, take a world for nuScenes."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
from nuscenes.can_bus.can_bus_api import NuScenesCanBus
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.map_expansion.map_api import NuScenesMap
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import points_in_box
from pyquaternion import Quaternion
from shapely.geometry import Point

from bevperception.doctor.data_root import check_data_root
from bevperception.taxonomy import CAMERA_NAMES
from bevperception.world import WorldConfig
from bevperception.world.lidar import ACTOR_POINTS
from bevperception.world.roads import build_town
from bevperception.world.settings import VAL_SPLIT
from tests.world.conftest import SMALL

LAYERS = (
    *("drivable_area", "road_segment", "road_block", "lane", "ped_crossing", "walkway", "stop_line"),
    *("carpark_area", "road_divider", "lane_divider"),
)


def test_doctor_finds_nothing_missing_but_locations_without_scenes(world: Path) -> None:
    findings = list(check_data_root(world, SMALL.version, CAMERA_NAMES))
    assert [f for f in findings if f.level != "ok"] == []


def test_tables_have_the_scenes_and_frames_asked_for(nusc: NuScenes) -> None:
    assert [scene["name"] for scene in nusc.scene] == ["scene-9001", "scene-9002"]
    assert len(nusc.sample) == SMALL.scenes * SMALL.frames
    for sample in nusc.sample:
        assert set(sample["data"]) == {*CAMERA_NAMES, "LIDAR_TOP"}
    stamps = [sample["timestamp"] for sample in nusc.sample[: SMALL.frames]]
    assert np.diff(stamps).tolist() == [500_000] * (SMALL.frames - 1)
    for scene in nusc.scene:
        log = nusc.get("log", scene["log_token"])
        assert log["map_token"] in {record["token"] for record in nusc.map}


def test_chains_are_whole_in_both_directions(nusc: NuScenes) -> None:
    for table in ("sample", "sample_data", "sample_annotation"):
        for record in getattr(nusc, table):
            if record["next"]:
                assert nusc.get(table, record["next"])["prev"] == record["token"]
            if record["prev"]:
                assert nusc.get(table, record["prev"])["next"] == record["token"]
    for instance in nusc.instance:
        token, count = instance["first_annotation_token"], 0
        while token:
            last, token = token, nusc.get("sample_annotation", token)["next"]
            count += 1
        assert (last, count) == (instance["last_annotation_token"], instance["nbr_annotations"])


def test_devkit_draws_every_map_layer(world: Path, nusc: NuScenes) -> None:
    for scene in nusc.scene:
        location = nusc.get("log", scene["log_token"])["location"]
        nusc_map = NuScenesMap(dataroot=str(world), map_name=location)
        width, height = nusc_map.canvas_edge
        patch = (width / 2, height / 2, height, width)
        size = (round(2 * height), round(2 * width))
        masks = nusc_map.get_map_mask(patch, 0, list(LAYERS), size)
        assert masks.shape == (len(LAYERS), *size)
        assert masks.reshape(len(LAYERS), -1).any(axis=1).all()
        town = build_town(SMALL.seed, location)
        drawn = masks[LAYERS.index("drivable_area")].mean() * width * height
        assert drawn == pytest.approx(town.drivable.area, rel=0.06)  # cv2 draws edges outwards
        lane = nusc_map.lane[0]["token"]
        assert nusc_map.get_outgoing_lane_ids(lane)
        line = nusc_map.discretize_lanes([lane], 1.0)[lane]
        assert np.linalg.norm(np.array(line[-1][:2]) - town.lanes[0].path.points[-1]) < 0.5


def test_ego_car_is_on_drivable_area_and_can_bus_agrees(world: Path, nusc: NuScenes) -> None:
    can_bus = NuScenesCanBus(dataroot=str(world))
    for scene in nusc.scene:
        town = build_town(SMALL.seed, nusc.get("log", scene["log_token"])["location"])
        area = town.drivable
        for name in ("pose", "ms_imu", "steeranglefeedback", "vehicle_monitor", "route", "meta"):
            assert can_bus.get_messages(scene["name"], name)
        messages = can_bus.get_messages(scene["name"], "pose")
        stamps = np.array([m["utime"] for m in messages])
        assert np.diff(stamps).tolist() == [20_000] * (len(stamps) - 1)
        for record in nusc.sample_data:
            if nusc.get("sample", record["sample_token"])["scene_token"] != scene["token"]:
                continue
            pose = nusc.get("ego_pose", record["ego_pose_token"])
            assert area.contains(Point(pose["translation"][:2]))
            for axis in (0, 1):
                there = np.interp(pose["timestamp"], stamps, [m["pos"][axis] for m in messages])
                assert there == pytest.approx(pose["translation"][axis], abs=0.01)
        speeds = np.array([m["vel"][0] for m in messages])
        places = np.array([m["pos"] for m in messages])
        moved = np.linalg.norm(np.diff(places, axis=0), axis=1) / 0.02
        np.testing.assert_allclose(moved, (speeds[1:] + speeds[:-1]) / 2, atol=0.05)


def test_velocities_are_differences_of_positions(nusc: NuScenes) -> None:
    moving = 0
    for record in nusc.sample_annotation:
        first = nusc.get("sample_annotation", record["prev"] or record["token"])
        last = nusc.get("sample_annotation", record["next"] or record["token"])
        if first["token"] == last["token"]:
            continue
        times = [nusc.get("sample", r["sample_token"])["timestamp"] * 1e-6 for r in (first, last)]
        apart = np.subtract(last["translation"], first["translation"])
        np.testing.assert_allclose(
            nusc.box_velocity(record["token"]), apart / (times[1] - times[0]), atol=1e-6
        )
        attributes = [nusc.get("attribute", token)["name"] for token in record["attribute_tokens"]]
        speed = float(np.linalg.norm(apart)) / (times[1] - times[0])
        if "vehicle.moving" in attributes and record["prev"] and record["next"]:
            moving += 1
            assert 0.0 < speed < 16.0
        if {"vehicle.parked", "cycle.without_rider", "pedestrian.sitting_lying_down"} & set(attributes):
            assert speed == 0.0
    assert moving > 0


def test_lidar_files_hold_points_of_the_boxes(world: Path, nusc: NuScenes) -> None:
    """All of them where there are few, a share of them on near and large things."""
    few = many = 0
    for sample in nusc.sample[:: SMALL.frames]:
        path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
        points = LidarPointCloud.from_file(str(path)).points[:3]
        for box in boxes:
            told = nusc.get("sample_annotation", box.token)["num_lidar_pts"]
            box.wlh = box.wlh + 0.002
            there = int(points_in_box(box, points).sum())
            assert there >= 1
            if told <= ACTOR_POINTS:
                few += 1
                assert abs(there - told) <= max(1, told // 4)  # grazing rays leave again at once
            else:
                many += 1
                assert ACTOR_POINTS / 2 - 1 <= there <= ACTOR_POINTS + 1
    assert few > 5
    assert many > 5


@pytest.mark.parametrize("version_split", [(SMALL.version, VAL_SPLIT)])
def test_perfect_boxes_evaluate_perfectly(
    world: Path, nusc: NuScenes, version_split: tuple[str, str], tmp_path: Path
) -> None:
    version, split = version_split
    names = json.loads((world / version / "splits.json").read_text())[split]
    results: dict[str, list[dict[str, object]]] = {}
    for sample in nusc.sample:
        if nusc.get("scene", sample["scene_token"])["name"] in names:
            results[sample["token"]] = [perfect_box(nusc, token) for token in sample["anns"]]
    path = tmp_path / "results.json"
    meta = dict.fromkeys(("use_camera", "use_lidar", "use_radar", "use_map", "use_external"), False)
    path.write_text(json.dumps({"meta": meta, "results": results}))
    config = config_factory("detection_cvpr_2019")
    evaluation = DetectionEval(nusc, config, str(path), split, str(tmp_path / "out"), verbose=False)
    metrics = evaluation.main(plot_examples=0, render_curves=False)
    assert metrics["mean_ap"] >= 0.99
    assert metrics["nd_score"] >= 0.99


def perfect_box(nusc: NuScenes, token: str) -> dict[str, object]:
    record = nusc.get("sample_annotation", token)
    attributes = [nusc.get("attribute", name)["name"] for name in record["attribute_tokens"]]
    return {
        "sample_token": record["sample_token"],
        "translation": record["translation"],
        "size": record["size"],
        "rotation": record["rotation"],
        "velocity": nusc.box_velocity(token)[:2].tolist(),
        "detection_name": category_to_detection_name(record["category_name"]),
        "detection_score": 1.0,
        "attribute_name": attributes[0] if attributes else "",
    }


def test_devkit_renders_a_sample(nusc: NuScenes, tmp_path: Path) -> None:
    path = tmp_path / "sample.png"
    nusc.render_sample(nusc.sample[1]["token"], out_path=str(path), verbose=False)
    assert path.stat().st_size > 10_000


def test_rotations_are_unit_quaternions(nusc: NuScenes) -> None:
    for record in [*nusc.ego_pose, *nusc.calibrated_sensor, *nusc.sample_annotation]:
        assert Quaternion(record["rotation"]).norm == pytest.approx(1.0, abs=1e-6)


def test_config_is_the_one_asked_for(world: Path) -> None:
    record = json.loads((world / "world.json").read_text())
    assert (
        WorldConfig(**{**{k: v for k, v in record.items() if k != "format"}, "image_size": (225, 400)})
        == SMALL
    )
