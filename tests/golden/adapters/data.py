"""Golden cases of the published data pipeline's conventions."""

from __future__ import annotations

import torch

from bevperception.can_bus import relative_can_bus
from bevperception.data.can_bus import with_ego_pose
from bevperception.data.conventions import (
    boxes_from_published,
    devkit_corners,
    devkit_size,
    published_bev_boxes,
    published_bottom_boxes,
    published_corners,
    yaw_quaternion,
)
from bevperception.data.image_input import published_image
from bevperception.data.nuscenes import CameraRecord, projection_matrix
from bevperception.geometry import invert_rigid, pose_matrix
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
        camera_to_global = lidar_to_global @ invert_rigid(lidar_to_camera)
        camera = CameraRecord("", None, 0, 0, 0.0, intrinsics, camera_to_global)  # type: ignore[arg-type]
        rebuilt.append(projection_matrix(camera, lidar_to_global))
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
    case.check("out.nusc_quat_wxyz", yaw_quaternion(boxes[:, 6]))
    case.check("out.nusc_velocity", torch.nn.functional.pad(boxes[:, 7:9], (0, 1)))
    case.check("out.nusc_corners", devkit_corners(boxes))
