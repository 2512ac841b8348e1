"""StreamingPredictor.step: images, calibration, pose and stamp in; against frames made by the data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from nuscenes.utils.geometry_utils import view_points
from pyquaternion import Quaternion

from bevperception.config import DataConfig
from bevperception.data.images import read_image
from bevperception.data.nuscenes import NuScenesReader, SampleRecord
from bevperception.errors import ConfigError
from bevperception.geometry import invert_rigid, project_points
from bevperception.inference import CameraCalibration, EgoMotion, RigCalibration, StreamingPredictor
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


def spying() -> tuple[Spy, StreamingPredictor]:
    torch.manual_seed(0)
    model = Spy()
    return model, StreamingPredictor(model, data=DATA)


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


def test_step_needs_data_settings() -> None:
    with pytest.raises(ConfigError, match=r"data=config\.data"):
        StreamingPredictor(Spy()).step({"CAM_FRONT": grey(1)}, rig(), EgoMotion(EYE), 0.0)


def test_warming_up_leaves_no_memory() -> None:
    _, predictor = spying()
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
        cameras[camera.channel] = CameraCalibration(
            camera.width, camera.height, camera.intrinsics, camera_to_ego
        )
        poses[camera.channel] = camera.camera_to_global @ invert_rigid(camera_to_ego)
        images[camera.channel] = read_image(camera.path, (camera.width, camera.height))
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
