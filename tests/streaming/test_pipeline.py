"""From messages to results on a scene: equal to offline prediction, and going on through faults."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from bevperception.calibration import TimedPose
from bevperception.data.dataset import build_dataset
from bevperception.errors import ConfigError
from bevperception.evaluation.runner import perceive
from bevperception.inference import StreamingPredictor
from bevperception.streaming.cameras import CameraState
from bevperception.streaming.diagnostics import Level, statuses
from bevperception.streaming.pipeline import Pipeline
from bevperception.streaming.settings import NodeSettings
from bevperception.taxonomy import CAMERA_NAMES
from tests.fixtures.tiny_nuscenes import VAL_SPLIT
from tests.streaming.helpers import Frame, Vehicle, micro_model


@pytest.fixture
def vehicle(tiny_nuscenes: Path) -> Vehicle:
    made = Vehicle(tiny_nuscenes)
    made.calibrate()
    return made


def words(vehicle: Vehicle) -> dict[str, tuple[Level, str]]:
    lines = statuses(vehicle.pipeline.health(), vehicle.pipeline.settings, True, 0.0)
    return {line.name: (line.level, line.message) for line in lines}


@pytest.mark.parametrize("bev_frame", ["ego", "lidar"])
def test_results_equal_offline_prediction(
    tiny_nuscenes: Path, tmp_path: Path, bev_frame: Literal["ego", "lidar"]
) -> None:
    """In the LiDAR's frame, with mountings from the calibration file: TF is wrong and must not win."""
    vehicle = Vehicle(tiny_nuscenes, bev_frame=bev_frame)
    if bev_frame == "lidar":
        vehicle.write_calibration(tmp_path / "rig.yaml")
        settings = {"calibration_file": str(tmp_path / "rig.yaml")}
        vehicle = Vehicle(tiny_nuscenes, bev_frame=bev_frame, **settings)
        vehicle.calibrate(off_m=0.2)
    else:
        vehicle.calibrate()
    config = vehicle.config
    dataset = build_dataset(vehicle.reader, config, VAL_SPLIT, training=False)
    predictor = StreamingPredictor(micro_model(config))
    offline = list(perceive(predictor, dataset, dataset.tokens, 0))
    assert len(offline) == len(vehicle.frames) == 4
    for frame, seen in zip(vehicle.frames, offline, strict=True):
        result = vehicle.send(frame)
        assert result is not None
        assert result.perception is not None
        assert not result.masked
        assert seen.batch is not None
        assert seen.outputs is not None
        boxes = predictor.decode(seen.outputs)[0]
        torch.testing.assert_close(result.perception.boxes.values, boxes.values, atol=1e-5, rtol=0)
        assert torch.equal(result.perception.boxes.labels, boxes.labels)
        assert seen.outputs.segmentation_logits is not None
        assert result.perception.segmentation is not None
        wanted = seen.outputs.segmentation_logits[0].sigmoid()
        torch.testing.assert_close(result.perception.segmentation, wanted, atol=1e-5, rtol=0)
        pose = seen.batch.frames.bev_to_global[0]
        assert result.perception.bev_to_global is not None
        torch.testing.assert_close(result.perception.bev_to_global, pose, atol=1e-9, rtol=0)
    assert vehicle.pipeline.health().resets == {"first frame": 1}


def test_a_lost_camera_is_masked_and_used_again(vehicle: Vehicle) -> None:
    first, second, third, _ = vehicle.frames
    vehicle.send(first)
    without = vehicle.send(second, without=("CAM_BACK",))
    assert without is not None
    assert without.perception is not None
    assert without.masked == {"CAM_BACK": "no image in this set"}
    assert without.perception.cameras == tuple(c for c in CAMERA_NAMES if c != "CAM_BACK")
    back = vehicle.send(third)
    assert back is not None
    assert not back.masked


def test_too_few_cameras_publish_nothing_and_say_so(vehicle: Vehicle) -> None:
    vehicle.send(vehicle.frames[0])
    lost = tuple(c for c in CAMERA_NAMES if c not in ("CAM_FRONT", "CAM_BACK"))
    result = vehicle.send(vehicle.frames[1], without=lost)
    assert result is not None
    assert result.perception is None
    assert result.note == "only 2 of 6 cameras usable, 3 needed"
    assert words(vehicle)["perception"][0] == Level.WARN
    vehicle.pipeline.change(replace(vehicle.pipeline.settings, min_cameras=2))
    result = vehicle.send(vehicle.frames[2], without=lost)
    assert result is not None
    assert result.perception is not None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"junk" * 100, "cannot be decoded"),
        (b"", "cannot be decoded"),
        ("half", "truncated"),
    ],
)
def test_corrupt_images_are_masked_with_the_reason(vehicle: Vehicle, data: bytes | str, reason: str) -> None:
    frame = vehicle.frames[0]
    spoiled = []
    for image in frame.images:
        bad = image.data[: len(image.data) // 2] if data == "half" else data
        spoiled.append(replace(image, data=bad) if image.channel == "CAM_BACK_LEFT" else image)
    result = vehicle.send(replace(frame, images=spoiled))
    assert result is not None
    assert result.perception is not None
    assert reason in result.masked["CAM_BACK_LEFT"]
    level, message = words(vehicle)["camera CAM_BACK_LEFT"]
    assert level == Level.WARN
    assert message.startswith("masked: ")
    assert reason in message


def test_a_frozen_camera_is_masked_until_it_moves(vehicle: Vehicle) -> None:
    frozen = next(i for i in vehicle.frames[0].images if i.channel == "CAM_FRONT")
    masked = []
    for step in range(6):
        frame = vehicle.frames[step % 4]
        images = [
            replace(i, data=frozen.data if step < 5 else i.data) if i.channel == "CAM_FRONT" else i
            for i in frame.images
        ]
        result = vehicle.send(replace(frame, images=images), shift_ns=step // 4 * 2_000_000_000)
        assert result is not None
        masked.append(result.masked.get("CAM_FRONT", "")[:6])
    assert masked == ["", "", "frozen", "frozen", "frozen", ""]


def test_without_odometry_each_frame_stands_alone_or_nothing_is_published(vehicle: Vehicle) -> None:
    vehicle.send(vehicle.frames[0])
    result = vehicle.send(vehicle.frames[2], motion=False)
    assert result is not None
    assert result.perception is not None
    assert result.perception.reset == "no ego motion"
    assert result.perception.bev_to_global is None
    assert "ego motion is lost: the newest is" in result.note
    level, message = words(vehicle)["ego motion"]
    assert level == Level.WARN
    assert message.endswith("each frame stands alone, without memory")
    vehicle.pipeline.change(replace(vehicle.pipeline.settings, without_motion="stop"))
    result = vehicle.send(vehicle.frames[3], motion=False)
    assert result is not None
    assert result.perception is None
    assert "nothing is published without ego motion" in result.note


def test_the_frame_after_one_without_motion_begins_anew(vehicle: Vehicle) -> None:
    """Near the origin of the odometry's frame nothing else would tell that there was no pose before."""
    frames = []
    for frame in vehicle.frames:
        poses = [replace(p, translation_m=(0.1, 0.2, 0.0)) for p in frame.poses]
        frames.append(replace(frame, poses=poses))
    vehicle.send(frames[0])
    vehicle.send(frames[1], motion=False)
    after = vehicle.send(frames[2])
    assert after is not None
    assert after.perception is not None
    assert after.perception.reset == "the frame before stood alone (no ego motion)"
    again = vehicle.send(frames[3])
    assert again is not None
    assert again.perception is not None
    assert again.perception.reset is None


def spoil(pose: TimedPose, translation_m: tuple[float, float, float]) -> TimedPose:
    return replace(pose, translation_m=translation_m)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_odometry_with_an_impossible_pose_resets_the_memory(vehicle: Vehicle, value: float) -> None:
    first, second, third, fourth = vehicle.frames
    vehicle.send(first)
    for pose in second.poses[:3]:
        vehicle.pipeline.add_pose(spoil(pose, (0.0, value, 0.0)))
    assert vehicle.pipeline.health().motion == "odometry with an impossible pose"
    result = vehicle.send(second)
    assert result is not None
    assert result.perception is not None
    assert result.perception.reset == "new scene"
    assert result.perception.bev_to_global is not None
    assert bool(result.perception.boxes.values.isfinite().all())
    health = vehicle.pipeline.health()
    assert health.counts["odometry with an impossible pose"] == 3
    assert health.resets["odometry with an impossible pose"] == 1
    assert health.motion == ""
    lost = replace(third, poses=[spoil(pose, (value, 0.0, 0.0)) for pose in third.poses])
    result = vehicle.send(lost)
    assert result is not None
    assert result.perception is not None
    assert result.perception.bev_to_global is None
    assert result.note == "ego motion refused: odometry with an impossible pose"
    level, message = words(vehicle)["ego motion"]
    assert level == Level.WARN
    assert message.startswith("odometry with an impossible pose; each frame stands alone")
    assert words(vehicle)["perception"][0] == Level.WARN
    result = vehicle.send(fourth)
    assert result is not None
    assert result.perception is not None
    assert result.perception.reset == "the frame before stood alone (no ego motion)"


def test_exposures_that_lie_apart_are_no_motion(vehicle: Vehicle) -> None:
    vehicle.send(vehicle.frames[0])
    frame = vehicle.frames[1]
    stamp_ns = next(i.stamp_ns for i in frame.images if i.channel == "CAM_BACK")
    x, y, z = frame.poses[-1].translation_m
    poses = [spoil(p, (x + 500.0, y, z)) if p.stamp_ns == stamp_ns else p for p in frame.poses]
    result = vehicle.send(replace(frame, poses=poses))
    assert result is not None
    assert result.perception is not None
    assert result.perception.bev_to_global is None
    assert result.perception.reset == "no ego motion"
    assert result.note.startswith("ego motion is impossible: the exposure of CAM_BACK lies 500 m away")
    assert words(vehicle)["ego motion"][1].startswith("ego motion is impossible: ")
    vehicle.pipeline.change(replace(vehicle.pipeline.settings, without_motion="stop"))
    result = vehicle.send(replace(frame, poses=poses), shift_ns=500_000_000)
    assert result is not None
    assert result.perception is None


def test_camera_info_may_come_late(tiny_nuscenes: Path) -> None:
    vehicle = Vehicle(tiny_nuscenes)
    vehicle.calibrate(*(c for c in CAMERA_NAMES if c != "CAM_FRONT_LEFT"))
    result = vehicle.send(vehicle.frames[0])
    assert result is not None
    assert result.masked == {"CAM_FRONT_LEFT": "waiting for camera info"}
    report = vehicle.pipeline.health().cameras["CAM_FRONT_LEFT"]
    assert (report.state, report.reason) == (CameraState.WAITING, "waiting for camera info")
    vehicle.calibrate("CAM_FRONT_LEFT")
    result = vehicle.send(vehicle.frames[1])
    assert result is not None
    assert not result.masked


def test_a_camera_with_an_impossible_calibration_is_masked(vehicle: Vehicle) -> None:
    """One that the predictor would refuse with the whole frame."""
    model = vehicle.pipeline._cameras["CAM_FRONT"].model
    assert model is not None
    k = model.info.k
    vehicle.pipeline.add_camera_info("CAM_FRONT", replace(model.info, k=(-k[0], *k[1:])))
    result = vehicle.send(vehicle.frames[0])
    assert result is not None
    assert result.perception is not None
    assert set(result.masked) == {"CAM_FRONT"}
    assert "no pinhole camera's" in result.masked["CAM_FRONT"]
    assert vehicle.pipeline.health().cameras["CAM_FRONT"].state is CameraState.MASKED


@pytest.mark.parametrize("back_s", [0.0, 60.0])
def test_a_bag_that_starts_again_loses_nothing_and_resets_the_memory(vehicle: Vehicle, back_s: float) -> None:
    """Also one that jumps back farther than poses are kept."""
    for frame in vehicle.frames:
        vehicle.send(frame, shift_ns=round(back_s * 1e9))
    again = vehicle.send(vehicle.frames[0])
    assert again is not None
    assert again.perception is not None
    assert (again.masked, again.note) == ({}, "")
    assert again.perception.reset == "new scene"
    assert again.perception.bev_to_global is not None
    wanted = vehicle.reader.sample(vehicle.frames[0].token).bev_to_global
    torch.testing.assert_close(again.perception.bev_to_global, wanted, atol=1e-6, rtol=0)
    health = vehicle.pipeline.health()
    assert health.resets["the clock jumped back"] == 1
    assert health.counts["stamp far back"] == 8  # seven poses and an image
    assert health.motion == ""


def test_a_camera_is_not_frozen_for_showing_the_same_after_a_jump(vehicle: Vehicle) -> None:
    still = next(i for i in vehicle.frames[0].images if i.channel == "CAM_FRONT")

    def same(frame: Frame) -> Frame:
        images = [replace(i, data=still.data) if i.channel == "CAM_FRONT" else i for i in frame.images]
        return replace(frame, images=images)

    masked = []
    for frame, shift_s in [(frame, shift_s) for shift_s in (60, 0) for frame in vehicle.frames[:2]]:
        result = vehicle.send(same(frame), shift_ns=shift_s * 10**9)
        assert result is not None
        masked.append(dict(result.masked))
    assert vehicle.pipeline.settings.frozen_after == 3
    assert masked == [{}, {}, {}, {}]
    result = vehicle.send(same(vehicle.frames[2]))
    assert result is not None
    assert set(result.masked) == {"CAM_FRONT"}


def test_a_camera_with_a_clock_far_ahead_is_outvoted(vehicle: Vehicle) -> None:
    for frame in vehicle.frames:
        images = [
            replace(i, stamp_ns=i.stamp_ns + 60 * 10**9) if i.channel == "CAM_BACK" else i
            for i in frame.images
        ]
        result = vehicle.send(replace(frame, images=images))
        assert result is not None
        assert result.perception is not None
        assert set(result.masked) == {"CAM_BACK"}
    assert vehicle.pipeline.health().counts["stamp far ahead"] == 4


def test_file_and_tf_are_checked_against_each_other(vehicle: Vehicle, tmp_path: Path) -> None:
    moved = vehicle.pipeline._cameras["CAM_FRONT"].camera_to_base
    assert moved is not None
    moved = moved.clone()
    vehicle.pipeline._extrinsics = replace(
        vehicle.pipeline._extrinsics, camera_to_base={"CAM_FRONT": moved + 0.0}
    )
    vehicle.pipeline._place_cameras()
    assert vehicle.pipeline._cameras["CAM_FRONT"].pose_problem == ""
    moved[0, 3] += 0.2
    vehicle.pipeline._extrinsics = replace(vehicle.pipeline._extrinsics, camera_to_base={"CAM_FRONT": moved})
    vehicle.pipeline._place_cameras()
    used = vehicle.pipeline._cameras["CAM_FRONT"].camera_to_base
    assert used is not None
    assert torch.equal(used, moved)
    vehicle.send(vehicle.frames[0])
    level, message = words(vehicle)["camera CAM_FRONT"]
    assert level == Level.WARN
    assert message == ("active: TF and calibration file differ by 0.200 m and 0.00 degrees; the file is used")


def test_settings_that_contradict_the_model_are_refused(vehicle: Vehicle) -> None:
    for change, message in (
        ({"anchor": "CAM_TOP"}, "anchor 'CAM_TOP' is none of"),
        ({"min_cameras": 7}, "min_cameras is 7, the model has 6 cameras"),
        ({"calibration_file": "/nowhere"}, "cannot read calibration file"),
    ):
        with pytest.raises(ConfigError, match=message):
            Pipeline(vehicle.predictor, CAMERA_NAMES, replace(NodeSettings(), **change))


def test_health_counts_and_times(vehicle: Vehicle) -> None:
    for frame in vehicle.frames:
        result = vehicle.send(frame)
        assert result is not None
        vehicle.pipeline.finished(result, {"convert": 1.0, "publish": 2.0})
    health = vehicle.pipeline.health()
    assert (health.published, health.refused, health.usable) == (4, 0, 6)
    assert health.stages_ms["publish"] == (2.0, 2.0)
    assert {"latency", "model", "prepare", "decode", "decode images", "wait"} <= set(health.stages_ms)
    assert health.since_result_s is not None
    assert health.rate_hz > 0
    silent = statuses(health, vehicle.pipeline.settings, True, 10.0)[0]
    assert silent.level == Level.OK
    late = statuses(replace(health, since_result_s=1.5), vehicle.pipeline.settings, True, 10.0)[0]
    assert (late.level, late.message[:20]) == (Level.WARN, "no result for 1.5 s")
    dead = statuses(replace(health, since_result_s=9.0), vehicle.pipeline.settings, True, 10.0)[0]
    assert dead.level == Level.ERROR
    off = statuses(replace(health, since_result_s=9.0), vehicle.pipeline.settings, False, 10.0)[0]
    assert (off.level, off.message) == (Level.OK, "inference is switched off")


def test_black_images_are_masked(vehicle: Vehicle) -> None:
    import cv2

    black = cv2.imencode(".jpg", np.zeros((90, 160, 3), dtype=np.uint8))[1].tobytes()
    result = vehicle.send(vehicle.frames[0], data=black)
    assert result is not None
    assert result.perception is None
    assert all(reason.startswith("black:") for reason in result.masked.values())
