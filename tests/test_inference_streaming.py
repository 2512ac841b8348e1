"""StreamingPredictor.step: images, calibration, pose and stamp in; against frames made by the data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
import torch
from nuscenes.utils.geometry_utils import view_points
from pyquaternion import Quaternion

from bevperception.calibration import CameraCalibration, EgoMotion, RigCalibration
from bevperception.can_bus import CanBusTrail
from bevperception.config import DataConfig
from bevperception.data.images import read_image
from bevperception.data.nuscenes import NuScenesReader, SampleRecord
from bevperception.errors import ConfigError
from bevperception.geometry import invert_rigid, project_points
from bevperception.inference import StreamingPredictor
from bevperception.structures import CameraFrames
from bevperception.taxonomy import CAMERA_NAMES
from tests.streaming.helpers import micro_config, micro_model
from tests.training.standin import SIDE, TinyModel

EYE = torch.eye(4, dtype=torch.float64)
K = torch.tensor([[80.0, 0, 80], [0, 80, 45], [0, 0, 1]], dtype=torch.float64)
DATA = DataConfig(image_size=(48, 80))


def rig(width: int = 160, height: int = 90, channels: tuple[str, ...] = CAMERA_NAMES) -> RigCalibration:
    return RigCalibration(dict.fromkeys(channels, CameraCalibration(width, height, K, EYE)))


def grey(value: int, width: int = 160, height: int = 90) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


class Spy(TinyModel):
    """Keeps the frames it was given."""

    def forward(self, frames, memory=None):  # type: ignore[no-untyped-def]
        self.seen: CameraFrames = replace(frames, images=frames.images.clone())
        images = torch.nn.functional.adaptive_avg_pool2d(frames.images.flatten(0, 1), SIDE)
        return super().forward(replace(frames, images=images.unflatten(0, frames.images.shape[:2])), memory)

    def decode(self, outputs):  # type: ignore[no-untyped-def]
        from bevperception.structures import Boxes3D

        return [Boxes3D(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64), torch.zeros(0))]


def spying(data: DataConfig = DATA) -> tuple[Spy, StreamingPredictor]:
    torch.manual_seed(0)
    model = Spy()
    return model, StreamingPredictor(model, data=data)


def test_missing_cameras_are_masked_in_the_models_order() -> None:
    model, predictor = spying()
    images = {"CAM_BACK": grey(200), "CAM_FRONT": grey(100)}
    found = predictor.step(images, rig(), EgoMotion(EYE), 5.0)
    assert found.cameras == ("CAM_FRONT", "CAM_BACK")
    assert model.seen.camera_mask is not None
    assert model.seen.camera_mask.tolist() == [[c in images for c in CAMERA_NAMES]]
    assert float(model.seen.timestamps_s[0]) == 5.0
    predictor.step(dict.fromkeys(CAMERA_NAMES, grey(1)), rig(), EgoMotion(EYE), 5.1)
    assert model.seen.camera_mask is None


def test_motion_between_exposures_is_in_the_projection() -> None:
    model, predictor = spying()
    later = EYE.clone()
    later[0, 3] = 0.5
    motion = EgoMotion(EYE, {"CAM_FRONT": later})
    predictor.step({"CAM_FRONT": grey(1), "CAM_BACK": grey(1)}, rig(), motion, 0.0)
    point = torch.tensor([[0.5, 0.0, 10.0]])
    pixels = [
        project_points(point, model.seen.bev_to_image[0, CAMERA_NAMES.index(c)])[0][0]
        for c in ("CAM_FRONT", "CAM_BACK")
    ]
    # Half the size: 160 x 90 becomes 80 x 45, padded below.
    torch.testing.assert_close(pixels[0], torch.tensor([40.0, 22.5]), atol=1e-4, rtol=0)
    torch.testing.assert_close(pixels[1], torch.tensor([42.0, 22.5]), atol=1e-4, rtol=0)


def test_a_used_canvas_is_as_good_as_a_new_one() -> None:
    model, predictor = spying()
    tall = {"CAM_FRONT": grey(255, 160, 200)}
    predictor.step(tall, rig(160, 200), EgoMotion(EYE), 0.0)
    predictor.step({"CAM_FRONT": grey(7)}, rig(), EgoMotion(EYE), 0.1)
    fresh_model, fresh = spying()
    fresh.step({"CAM_FRONT": grey(7)}, rig(), EgoMotion(EYE), 0.1)
    assert torch.equal(model.seen.images[0, 0], fresh_model.seen.images[0, 0])


def test_reduced_images_give_the_same_input() -> None:
    model, predictor = spying()
    smooth = cv2.GaussianBlur(
        np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8), (0, 0), 8
    )
    assert predictor.reduction(160, 90) == 2
    predictor.step({"CAM_FRONT": smooth}, rig(), EgoMotion(EYE), 0.0)
    full = model.seen.images
    half = cv2.resize(smooth, (80, 45), interpolation=cv2.INTER_AREA)
    predictor.step({"CAM_FRONT": half}, rig(), EgoMotion(EYE), 0.1)
    torch.testing.assert_close(model.seen.images, full, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("images", "calibration", "message"),
    [
        ({}, rig(), "are needed, got none"),
        ({"CAM_TOP": grey(1)}, rig(), "are needed, got CAM_TOP"),
        ({"CAM_BACK": grey(1)}, rig(channels=("CAM_FRONT",)), "CAM_BACK has an image but no calibration"),
        ({"CAM_BACK": grey(1, 100, 90)}, rig(), "100x90 pixels, its calibration 160x90 or 80x45"),
    ],
)
def test_wrong_input_is_refused(
    images: dict[str, np.ndarray], calibration: RigCalibration, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spying()[1].step(images, calibration, EgoMotion(EYE), 0.0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (grey(90).astype(np.float32) / 255, r"got float32 of shape \(90, 160, 3\); values are 0 to 255"),
        (grey(90).astype(np.uint16) * 257, r"got uint16 of shape \(90, 160, 3\); values are 0 to 255"),
        (grey(90).astype(np.int8), "got int8"),
        (grey(90) > 3, "got bool"),
        (grey(90)[..., 0], r"got uint8 of shape \(90, 160\); cv2.cvtColor"),
        (grey(90)[..., :1], r"got uint8 of shape \(90, 160, 1\)"),
        (np.full((90, 160, 4), 90, dtype=np.uint8), r"got uint8 of shape \(90, 160, 4\)"),
        (grey(90).transpose(2, 0, 1), r"got uint8 of shape \(3, 90, 160\); .*channels come last"),
        (grey(90)[None], r"got uint8 of shape \(1, 90, 160, 3\)"),
        (torch.from_numpy(grey(90)), "got Tensor"),
        (None, "got NoneType"),
    ],
)
def test_images_of_another_kind_are_refused_and_the_memory_stays(image: object, message: str) -> None:
    _, predictor = spying()
    predictor.step({"CAM_FRONT": grey(90)}, rig(), EgoMotion(EYE), 0.0)
    wanted = r"CAM_BACK must have a \(height, width, 3\) uint8 BGR array as its image, "
    with pytest.raises(ValueError, match=wanted + message):
        predictor.step({"CAM_FRONT": grey(90), "CAM_BACK": image}, rig(), EgoMotion(EYE), 0.1)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="must be a mapping of channels to images, got a list"):
        predictor.step([grey(90)], rig(), EgoMotion(EYE), 0.1)  # type: ignore[arg-type]
    assert predictor.step({"CAM_FRONT": grey(90)}, rig(), EgoMotion(EYE), 0.2).reset is None


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("size", [(160, 90), (80, 45)])
def test_images_may_lie_in_memory_as_they_like(size: tuple[int, int], order: Literal["rgb", "bgr"]) -> None:
    """Mirrored views, every second pixel of a larger image, read-only buffers, Fortran's order."""
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    wide = np.zeros((height, 2 * width, 3), dtype=np.uint8)
    wide[:, ::2] = pixels
    locked = np.frombuffer(pixels.tobytes(), dtype=np.uint8).reshape(pixels.shape)
    backwards = np.ascontiguousarray(pixels[::-1, ::-1, ::-1])[::-1, ::-1, ::-1]
    model, predictor = spying(replace(DATA, channel_order=order))
    predictor.step({"CAM_FRONT": pixels}, rig(*size), EgoMotion(EYE), 0.0)
    wanted = model.seen.images[0, 0]
    for image in (wide[:, ::2], locked, backwards, np.asfortranarray(pixels)):
        predictor.step({"CAM_FRONT": image}, rig(*size), EgoMotion(EYE), 0.0)
        assert torch.equal(model.seen.images[0, 0], wanted)


@pytest.mark.parametrize("stamp", [math.nan, math.inf, -math.inf])
def test_a_stamp_that_is_no_time_is_refused_and_the_memory_stays(stamp: float) -> None:
    _, predictor = spying()
    predictor.step({"CAM_FRONT": grey(1)}, rig(), EgoMotion(EYE), 0.0)
    with pytest.raises(ValueError, match="the stamp must be a finite number of seconds"):
        predictor.step({"CAM_FRONT": grey(1)}, rig(), EgoMotion(EYE), stamp)
    assert predictor.step({"CAM_FRONT": grey(1)}, rig(), EgoMotion(EYE), 0.1).reset is None


def test_an_exposure_of_a_camera_that_nobody_knows_is_refused() -> None:
    motion = EgoMotion(EYE, {"CAM_FRNT": EYE})
    with pytest.raises(ValueError, match="at_exposure names CAM_FRNT"):
        spying()[1].step({"CAM_FRONT": grey(1)}, rig(), motion, 0.0)
    known_to_the_rig = rig(channels=("CAM_FRONT", "CAM_REAR"))
    found = spying()[1].step({"CAM_FRONT": grey(1)}, known_to_the_rig, EgoMotion(EYE, {"CAM_REAR": EYE}), 0.0)
    assert found.cameras == ("CAM_FRONT",)


def pose_with(value: float, row: int = 0, column: int = 3) -> torch.Tensor:
    pose = EYE.clone()
    pose[row, column] = value
    return pose


IMPOSSIBLE = {
    "NaN": (EgoMotion(pose_with(math.nan)), "ego_to_global is not finite"),
    "infinite": (EgoMotion(pose_with(math.inf, 2)), "ego_to_global is not finite"),
    "off the Earth": (EgoMotion(pose_with(-1e300, 1)), "ego_to_global lies 1e+300 m away"),
    "scaled": (EgoMotion(EYE * 1.1), "ego_to_global has the last row"),
    "not a rotation": (EgoMotion(pose_with(0.5, 0, 1)), "ego_to_global is not a rotation"),
    "zeros": (EgoMotion(torch.zeros(4, 4)), "ego_to_global has the last row"),
    "mirrored": (EgoMotion(pose_with(-1.0, 1, 1)), "ego_to_global mirrors"),
    "NaN at an exposure": (
        EgoMotion(EYE, {"CAM_FRONT": pose_with(math.nan)}),
        "ego_to_global at the exposure of CAM_FRONT is not finite",
    ),
    "far at an exposure": (
        EgoMotion(EYE, {"CAM_FRONT": pose_with(81.0)}),
        "the exposure of CAM_FRONT lies 81 m away from the frame",
    ),
    "unknown": (None, ""),
}


def drive_through(make: Callable[[], StreamingPredictor], motion: EgoMotion | None, reason: str) -> None:
    """A frame with that motion stands alone, and the next one begins anew, as fresh predictors would."""
    shades = [{c: grey(30 * k + 5 * i) for i, c in enumerate(CAMERA_NAMES)} for k in range(1, 5)]
    predictor = make()
    first = predictor.step(shades[0], rig(), EgoMotion(EYE), 0.0)
    remembering = predictor.step(shades[1], rig(), EgoMotion(EYE), 0.1)
    alone = predictor.step(shades[2], rig(), motion, 0.2)
    after = predictor.step(shades[3], rig(), EgoMotion(pose_with(0.3)), 0.3)
    again = predictor.step(shades[1], rig(), EgoMotion(pose_with(0.4)), 0.4)

    assert alone.reset is not None
    assert alone.reset.startswith(reason)
    assert after.reset == f"the frame before stood alone ({alone.reset})"
    assert [first.reset, remembering.reset, again.reset] == ["first frame", None, None]
    assert alone.bev_to_global is None
    assert after.bev_to_global is not None
    starting = make()
    for found, wanted in (
        (alone, make().step(shades[2], rig(), EgoMotion(EYE), 0.2)),
        (after, starting.step(shades[3], rig(), EgoMotion(pose_with(0.3)), 0.3)),
        (again, starting.step(shades[1], rig(), EgoMotion(pose_with(0.4)), 0.4)),
    ):
        torch.testing.assert_close(found.boxes.values, wanted.boxes.values, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.segmentation, wanted.segmentation, atol=1e-6, rtol=0)
        assert torch.equal(found.boxes.labels, wanted.boxes.labels)
        assert bool(found.boxes.values.isfinite().all())


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_frame_with_an_impossible_pose_stands_alone(name: str) -> None:
    """Its results are those without memory, nothing is placed in the global frame, nothing is remembered."""
    motion, problem = IMPOSSIBLE[name]
    reason = f"the pose is impossible: {problem}" if problem else "no ego motion"
    drive_through(lambda: spying()[1], motion, reason)


def test_a_real_model_survives_an_impossible_pose(tiny_nuscenes: Path) -> None:
    config = micro_config(tiny_nuscenes)
    config.model.temporal.interval_s = 0.0
    model = micro_model(config)
    motion, problem = IMPOSSIBLE["NaN"]
    drive_through(
        lambda: StreamingPredictor(model, data=config.data), motion, f"the pose is impossible: {problem}"
    )


def test_an_impossible_exposure_of_a_missing_camera_does_not_matter() -> None:
    _, predictor = spying()
    motion = EgoMotion(EYE, {"CAM_BACK": pose_with(math.nan)})
    predictor.step({"CAM_FRONT": grey(1)}, rig(), motion, 0.0)
    found = predictor.step({"CAM_FRONT": grey(1)}, rig(), motion, 0.1)
    assert found.reset is None
    assert found.bev_to_global is not None


def test_everything_that_leaves_step_is_float32_and_poses_float64(tiny_nuscenes: Path) -> None:
    config = micro_config(tiny_nuscenes)
    images = dict.fromkeys(CAMERA_NAMES, grey(90))
    for precision in ("32-true", "bf16-mixed"):
        predictor = StreamingPredictor(micro_model(config), data=config.data, precision=precision)
        found = predictor.step(images, rig(), EgoMotion(EYE), 0.0)
        assert found.segmentation is not None
        assert found.boxes.scores is not None
        assert found.bev_to_global is not None
        values = (found.boxes.values, found.boxes.scores, found.segmentation)
        assert {value.dtype for value in values} == {torch.float32}
        assert {pose.dtype for pose in (found.bev_to_ego, found.bev_to_global)} == {torch.float64}


def test_arrays_and_lists_give_what_tensors_give() -> None:
    model, predictor = spying()
    mount = pose_with(1.5)
    pose = pose_with(0.25, 1)
    predictor.step(
        {"CAM_FRONT": grey(7)},
        RigCalibration({"CAM_FRONT": CameraCalibration(160, 90, K, mount)}, mount),
        EgoMotion(EYE, {"CAM_FRONT": pose}),
        0.0,
    )
    wanted = model.seen.bev_to_image.clone()
    camera = CameraCalibration(160, 90, K.float().numpy(), mount[:3].numpy())
    found = predictor.step(
        {"CAM_FRONT": grey(7)},
        RigCalibration({"CAM_FRONT": camera}, mount.tolist()),
        EgoMotion(np.eye(4, dtype=np.int32), {"CAM_FRONT": pose.numpy()[:3]}),
        0.0,
    )
    assert torch.equal(model.seen.bev_to_image, wanted)
    assert found.bev_to_global is not None
    assert torch.equal(found.bev_to_global, mount)


@pytest.mark.parametrize(
    "stamp", [0.5, np.float32(0.5), np.array([0.5]), torch.tensor(0.5), torch.tensor([0.5])]
)
def test_a_stamp_may_be_any_one_number(stamp: Any) -> None:
    model, predictor = spying()
    for offset, before in ((0.0, "first frame"), (0.25, None)):
        found = predictor.step({"CAM_FRONT": grey(1)}, rig(), EgoMotion(EYE), stamp + offset)
        assert (found.stamp_s, found.reset) == (0.5 + offset, before)
        assert model.seen.timestamps_s.tolist() == [0.5 + offset]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stamp": None}, "stamp must be a number of seconds, got None"),
        ({"stamp": "0.5"}, "stamp must be a number of seconds, got '0.5'"),
        ({"stamp": np.array([0.5, 1.0])}, "stamp must be a number of seconds, got array"),
        ({"stamp": torch.tensor([])}, "stamp must be a number of seconds, got tensor"),
        ({"stamp": 10**400}, "stamp must be a number of seconds, got 1000"),
        (
            {"ego_pose": EYE},
            r"ego_pose must be an EgoMotion or None, got a Tensor; EgoMotion\(ego_to_global\)",
        ),
        ({"ego_pose": np.eye(4)}, "ego_pose must be an EgoMotion or None, got a ndarray"),
        ({"calibration": None}, "calibration must be a RigCalibration, got a NoneType"),
        ({"images": {1: grey(1)}}, "images of some of CAM_FRONT, .* are needed, got 1"),
    ],
)
def test_arguments_of_other_types_are_refused_and_the_memory_stays(
    change: dict[str, Any], message: str
) -> None:
    _, predictor = spying()
    sound = {"images": {"CAM_FRONT": grey(1)}, "calibration": rig(), "ego_pose": EgoMotion(EYE)}
    predictor.step(**sound, stamp=0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        predictor.step(**{"stamp": 0.5, **sound, **change})
    assert predictor.step(**sound, stamp=1.0).reset is None  # type: ignore[arg-type]


def test_step_needs_data_settings() -> None:
    with pytest.raises(ConfigError, match=r"data=config\.data"):
        StreamingPredictor(Spy()).step({"CAM_FRONT": grey(1)}, rig(), EgoMotion(EYE), 0.0)


def test_warming_up_leaves_no_memory() -> None:
    _, predictor = spying()
    for frames in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1 frame, got {frames}"):
            predictor.warm_up(frames)
    assert predictor.warm_up() > 0
    found = predictor.step({"CAM_FRONT": grey(1)}, rig(), EgoMotion(EYE), 0.0)
    assert found.reset == "first frame"
    assert set(found.stages_ms) == {"prepare", "model", "decode"}
    assert all(spent >= 0 for spent in found.stages_ms.values())
    assert predictor.step({"CAM_FRONT": grey(1)}, rig(), EgoMotion(EYE), 0.1).reset is None
    assert predictor.step({"CAM_FRONT": grey(1)}, rig(), EgoMotion(EYE), 0.2, "b").reset == "new scene"


def test_results_are_in_the_frame_of_the_rig() -> None:
    _, predictor = spying()
    lidar = EYE.clone()
    lidar[0, 3] = 0.9
    pose = EYE.clone()
    pose[1, 3] = 100.0
    calibration = replace(rig(), bev_to_ego=lidar)
    found = predictor.step({"CAM_FRONT": grey(1)}, calibration, EgoMotion(pose), 0.0)
    assert found.bev_to_global is not None
    torch.testing.assert_close(found.bev_to_global, pose @ lidar)


@pytest.mark.slow
def test_compiled_backbones_give_the_same_boxes(tiny_nuscenes: Path) -> None:
    config = micro_config(tiny_nuscenes)
    images = dict.fromkeys(CAMERA_NAMES, grey(90))
    found = [
        StreamingPredictor(micro_model(config), data=config.data, compiled=compiled).step(
            images, rig(), EgoMotion(EYE), 0.0
        )
        for compiled in (False, True)
    ]
    torch.testing.assert_close(found[0].boxes.values, found[1].boxes.values, atol=1e-3, rtol=0)


def _step_as_a_vehicle(model: Spy, reader: NuScenesReader, sample: SampleRecord) -> CameraFrames:
    """Step with what a vehicle would know of a sample: poses, mounts, intrinsics."""
    cameras, poses, images = {}, {}, {}
    record = reader.nusc.get("sample", sample.token)
    for camera in sample.cameras:
        data = reader.sensor_data(record, camera.channel)
        mount = reader.nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
        camera_to_ego = EYE.clone()
        camera_to_ego[:3, :3] = torch.from_numpy(Quaternion(mount["rotation"]).rotation_matrix)
        camera_to_ego[:3, 3] = torch.tensor(mount["translation"], dtype=torch.float64)
        cameras[camera.channel] = CameraCalibration(*camera.size, camera.pinhole.intrinsics, camera_to_ego)
        poses[camera.channel] = camera.ego_to_global
        images[camera.channel] = read_image(camera.path, camera.size)
    predictor = StreamingPredictor(model, data=reader.config)
    predictor.step(
        images, RigCalibration(cameras), EgoMotion(sample.ego_to_global, poses), sample.timestamp_s
    )
    return model.seen


def test_the_real_key_frames_projection_equals_the_devkits(real_keyframe: Path) -> None:
    data = DataConfig(root=str(real_keyframe), version="v1.0-mini", image_size=(450, 800))
    reader = NuScenesReader(data)
    sample = reader.sample(reader.nusc.sample[0]["token"])
    seen = _step_as_a_vehicle(Spy(), reader, sample)
    nusc, compared = reader.nusc, 0
    for slot, channel in enumerate(data.cameras):
        token = nusc.get("sample", sample.token)["data"][channel]
        _, boxes, intrinsic = nusc.get_sample_data(token)
        for box in boxes:
            if box.center[2] < 1.0:
                continue
            wanted = view_points(box.center[:, None], intrinsic, normalize=True)[:2, 0] / 2
            annotated = nusc.get("sample_annotation", box.token)["translation"]
            in_bev = invert_rigid(sample.bev_to_global) @ torch.tensor([*annotated, 1.0], dtype=torch.float64)
            pixels, _ = project_points(in_bev[None, :3], seen.bev_to_image[0, slot].double())
            np.testing.assert_allclose(pixels[0], wanted, rtol=1e-4, atol=0.02)
            compared += 1
    assert compared > 20


@torch.no_grad()
def test_a_published_v1_model_streams_from_poses_alone(tiny_nuscenes: Path) -> None:
    """Each frame gets the CAN-bus vector of its pose and those before; an unknown pose has none."""
    config = micro_config(tiny_nuscenes)
    config.model.bev.alignment = "published"
    config.model.__post_init__()
    model = micro_model(config)
    predictor = StreamingPredictor(model, data=config.data)
    trail, memory = CanBusTrail("exact"), None
    for index in range(4):
        pose = EYE.clone()
        pose[:2, :2] = torch.tensor(
            [[math.cos(0.1 * index), -math.sin(0.1 * index)], [math.sin(0.1 * index), math.cos(0.1 * index)]]
        )
        pose[0, 3] = 2.0 * index
        images = {"CAM_FRONT": grey(20 * index), "CAM_BACK": grey(200)}
        found = predictor.step(images, rig(), EgoMotion(pose), 0.5 * index)
        frames = predictor._canvas.frames(images, rig(), EgoMotion(pose), pose, 0.5 * index)  # type: ignore[union-attr]
        frames = replace(frames, can_bus=trail.vector(0.5 * index, pose)[None])
        outputs, memory = model(frames, memory)
        assert torch.equal(found.boxes.values, model.decode(outputs)[0].values), index
        assert memory.can_bus is not None
    alone = predictor.step(images, rig(), None, 2.0)
    assert alone.reset == "no ego motion"
    assert predictor.step(images, rig(), EgoMotion(EYE), 2.5).reset is not None
