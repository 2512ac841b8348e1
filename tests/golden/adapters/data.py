"""Golden cases of the published data pipeline's conventions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from bevperception.calibration import PinholeCamera
from bevperception.can_bus import relative_can_bus, with_ego_pose
from bevperception.data.image_input import published_image
from bevperception.data.published_v2 import cut_and_resize, plan_v2
from bevperception.data.transforms import BEVDraw, ImageDraw
from bevperception.evaluation.submission import devkit_size
from bevperception.geometry import invert_rigid, pose_matrix, quaternion_of_yaw, transform_boxes
from bevperception.models.bev.alignment import seen_from
from bevperception.structures import CameraFrames
from tests.golden.adapters.published_boxes import (
    boxes_from_published,
    devkit_corners,
    published_bev_boxes,
    published_bottom_boxes,
    published_corners,
)
from tests.golden.case import Case, adapter


@adapter("data_v1", dtypes=(torch.float64,))
def run_data_v1(case: Case) -> None:
    measured, scenes = case.array("in.can_bus"), case.array("in.scenes")
    translations, quaternions = case.array("in.trans"), case.array("in.quats")
    absolute = torch.stack(
        [
            with_ego_pose(*row, published_orientation=True)
            for row in zip(measured, translations, quaternions, strict=True)
        ]
    )
    case.check("out.abs_can_bus", absolute)
    valid = torch.cat((torch.tensor([False]), scenes[1:] == scenes[:-1]))
    relative = relative_can_bus(absolute, absolute.roll(1, dims=0), valid)
    for phase, flag in (("train", "prev_bev_exists"), ("test", "prev_bev_used")):
        case.check(f"out.{phase}_can_bus", relative)
        case.check(f"out.{phase}_{flag}", valid)
    _check_projection(case, pose_matrix(translations[0], quaternions[0]))


def _check_projection(case: Case, lidar_to_global: torch.Tensor) -> None:
    """The case gives no calibration: take it apart from the expected matrix, place it in the world, project.

    The published matrix must factor into a pinhole camera (positive focal lengths, no reflection), and the
    project's way through the global frame must give it back.
    """
    expected = case.array("out.lidar2img")
    rebuilt = []
    for matrix in expected:
        flipped = torch.flip(matrix[:3, :3], (0,)).T
        q, r = torch.linalg.qr(flipped)
        signs = torch.diag(r).sign()
        rotation = torch.flip((q * signs).T, (0,))
        intrinsics = torch.flip((signs[:, None] * r).T, (0, 1))
        assert torch.linalg.det(rotation) > 0
        assert float((intrinsics[2, 2] - 1).abs()) < 1e-6
        lidar_to_camera = torch.eye(4, dtype=matrix.dtype)
        lidar_to_camera[:3, :3] = rotation
        lidar_to_camera[:3, 3] = torch.linalg.solve(intrinsics, matrix[:3, 3])
        # The lidar's frame stands for the vehicle's.
        camera = PinholeCamera(1600, 900, intrinsics, invert_rigid(lidar_to_camera))
        rebuilt.append(camera.projection(lidar_to_global, lidar_to_global))
    case.check("out.lidar2img", torch.stack(rebuilt))


@adapter("data_img", dtypes=(torch.float64,))
def run_data_img(case: Case) -> None:
    images = case.arrays["in.imgs"]
    mean, std = case.arrays["in.mean"], case.arrays["in.std"]
    to_rgb, scale = bool(case.arrays["in.to_rgb"]), float(case.arrays["in.scale"])
    divisor = int(case.meta.get("size_divisor", 32))
    results = [published_image(image, mean, std, to_rgb, scale, divisor) for image in images]
    pixels = torch.stack([torch.from_numpy(image) for image, _ in results])
    case.check("out.img", pixels)
    case.check("out.img_shape", torch.tensor([image.shape for image, _ in results]))
    matrices = torch.stack([matrix for _, matrix in results])
    case.check("out.lidar2img", matrices @ case.array("in.lidar2img"))


@adapter("data_nusc")
def run_data_nusc(case: Case) -> None:
    boxes = boxes_from_published(case.array("in.boxes"))
    case.check("out.corners", published_corners(boxes))
    case.check("out.gravity_center", boxes[:, :3])
    case.check("out.bottom", published_bottom_boxes(boxes))
    case.check("out.bev", published_bev_boxes(boxes))
    case.check("out.nusc_center", boxes[:, :3])
    case.check("out.nusc_wlh", devkit_size(boxes))
    case.check("out.nusc_quat_wxyz", quaternion_of_yaw(boxes[:, 6]))
    case.check("out.nusc_velocity", torch.nn.functional.pad(boxes[:, 7:9], (0, 1)))
    case.check("out.nusc_corners", devkit_corners(boxes))


# nuScenes' LIDAR_TOP on the vehicle that the cases' projections come from.
LIDAR_TO_EGO = pose_matrix(
    torch.tensor([0.943713, 0.0, 1.84023], dtype=torch.float64),
    torch.tensor(
        [0.7077955119163518, -0.006492242056004365, 0.010646214713995808, -0.7063073142877817],
        dtype=torch.float64,
    ),
)


# The published matrices are float32: compared as such.
@adapter("data_v2", dtypes=(torch.float32,))
def run_data_v2(case: Case) -> None:
    translations, quaternions = (torch.from_numpy(case.arrays[f"in.{k}"].copy()) for k in ("trans", "quats"))
    current = int(case.arrays["in.cur"])
    lidar_to_global = pose_matrix(translations, quaternions) @ LIDAR_TO_EGO
    adjacent_to_current = torch.linalg.solve(lidar_to_global[current], lidar_to_global)
    case.check("out.lidaradj2lidarcurr", adjacent_to_current)
    # All frames have the current one's calibration.
    calibration = torch.from_numpy(case.arrays["out.lidar2img"].copy())[current]
    count = len(translations)
    frames = CameraFrames(
        torch.empty(count, len(calibration), 3, 1, 1),
        calibration.expand(count, -1, -1, -1),
        lidar_to_global,
        torch.zeros(count).double(),
    )
    seen = seen_from(frames, lidar_to_global[current].expand(count, -1, -1))
    case.check("out.lidar2img", seen.bev_to_image)


@adapter("data_ida", dtypes=(torch.float64,))
def run_data_ida(case: Case) -> None:
    images = case.arrays["in.imgs"]
    left, top, right, bottom = case.arrays["in.crop"].tolist()
    assert (left, right, bottom) == (0, images.shape[2], images.shape[1])
    source = (images.shape[2], images.shape[1])
    scale = int(case.arrays["in.resize_h"]) / (bottom - top)
    # The published size is nominal: a target of the crop's own size and the scale as augmentation.
    draw = ImageDraw(resize=scale, crop_left=0.0, crop_top=0.0, flip=bool(case.arrays["in.flip"]))
    fit = plan_v2(source, (right - left, bottom - top), draw)
    pixels = np.stack([cut_and_resize(image, fit.cut_top, fit.resized) for image in images])
    if draw.flip:
        pixels = pixels[:, :, ::-1]
    case.check("out.img", torch.from_numpy(pixels.astype(np.float64)))
    # The published matrix holds the nominal scale and knows nothing of the flip.
    own = replace(fit, flip=False).matrix()
    for axis, (after, before) in enumerate(zip(fit.resized, (right, bottom - top), strict=True)):
        assert abs(float(own[axis, axis]) - scale) <= 1.0 / before, (after, before)
    nominal = torch.diag(torch.tensor([scale, scale, 1.0, 1.0], dtype=torch.float64))
    nominal[1, 2] = -scale * fit.cut_top
    camera_to_image = nominal @ case.array("in.cam2img")
    case.check("out.cam2img", camera_to_image)
    case.check("out.lidar2img", camera_to_image @ case.array("in.lidar2cam"))


# mmdet3d's boxes and the published matrix are float32.
@adapter("data_bda", dtypes=(torch.float32,))
def run_data_bda(case: Case) -> None:
    rng = np.random.RandomState(int(case.arrays["in.np_seed"]))
    rotation, scale = np.deg2rad(rng.uniform(-22.5, 22.5)), rng.uniform(0.95, 1.05)
    flips = [bool(rng.uniform() < float(case.arrays[f"in.flip_d{axis}_ratio"])) for axis in "xy"]
    case.check("out.rot_angle", torch.tensor(rotation))
    case.check("out.scale", torch.tensor(scale))
    case.check("out.flip", torch.tensor(flips))
    bev_to_augmented = BEVDraw(float(rotation), float(scale), *flips).matrix()
    case.check("out.bda_mat", torch.linalg.inv(bev_to_augmented[:3, :3]))
    boxes = boxes_from_published(torch.from_numpy(case.arrays["in.boxes"].copy()))
    case.check("out.boxes_bottom_before", published_bottom_boxes(boxes))
    augmented = published_bottom_boxes(transform_boxes(boxes, bev_to_augmented))
    # Yaws are compared as directions: whole turns mean nothing.
    turns = torch.from_numpy(case.arrays["out.boxes_after"].copy())[:, 6] - augmented[:, 6]
    augmented[:, 6] += 2 * math.pi * (turns / (2 * math.pi)).round()
    case.check("out.boxes_after", augmented)
