"""What a caller hands over of a vehicle: any kind of matrix, checked for shape and sense."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bevperception.calibration import CameraCalibration, EgoMotion, RigCalibration
from bevperception.geometry import pose_matrix, rigid_problem

K = [[300.0, 0.5, 160.0], [0.0, 310.0, 90.0], [0.0, 0.0, 1.0]]
MOUNT = pose_matrix(torch.tensor([1.5, -0.2, 1.6]).double(), torch.tensor([0.5, -0.5, 0.5, -0.5]).double())
FORMS = {
    "tensor": lambda m: m,
    "float32 tensor": lambda m: m.float(),
    "with gradient": lambda m: m.clone().requires_grad_(),
    "array": lambda m: m.numpy(),
    "float32 array": lambda m: m.numpy().astype(np.float32),
    "turned view": lambda m: np.ascontiguousarray(m.numpy().T).T,
    "lists": lambda m: m.tolist(),
    "without the last row": lambda m: m[:3],
    "array without the last row": lambda m: m.numpy()[:3],
    "lists without the last row": lambda m: m.tolist()[:3],
}


@pytest.mark.parametrize("form", FORMS)
def test_matrices_of_any_kind_become_float64_copies(form: str) -> None:
    source = MOUNT.clone()
    given: Any = FORMS[form](source)
    motion = EgoMotion(given, {"CAM_FRONT": given})
    made = [
        motion.ego_to_global,
        motion.at_exposure["CAM_FRONT"],
        CameraCalibration(320, 180, K, given).camera_to_ego,
        RigCalibration({}, given).bev_to_ego,
    ]
    source.zero_()
    for matrix in made:
        assert (matrix.dtype, tuple(matrix.shape), matrix.requires_grad) == (torch.float64, (4, 4), False)
        torch.testing.assert_close(matrix, MOUNT, atol=1e-7, rtol=0)
    assert motion.problem(["CAM_FRONT", "CAM_BACK"]) == ""


def test_intrinsics_of_any_kind() -> None:
    wanted = torch.tensor(K, dtype=torch.float64)
    for given in (K, wanted, np.array(K), np.array(K, dtype=np.float32)):
        assert torch.equal(CameraCalibration(320, 180, given, MOUNT).intrinsics, wanted)
    whole = CameraCalibration(320, 180, np.diag([3, 2, 1]), MOUNT).intrinsics
    assert torch.equal(whole, torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()))


def test_replacing_a_part_keeps_the_others_and_the_checks() -> None:
    camera = CameraCalibration(320, 180, K, MOUNT)
    assert torch.equal(replace(camera, width=640).camera_to_ego, MOUNT)
    assert torch.equal(RigCalibration({"CAM_FRONT": camera}).bev_to_ego, torch.eye(4).double())
    with pytest.raises(ValueError, match="at least 1, got 0 x 180"):
        replace(camera, width=0)


@pytest.mark.parametrize(
    ("pose", "message"),
    [
        (torch.eye(3), r"must be a matrix \(4, 4\), or \(3, 4\) without the last row, got shape \(3, 3\)"),
        (np.eye(4)[None], r"got shape \(1, 4, 4\)"),
        (np.arange(16.0), r"got shape \(16,\)"),
        (np.eye(4)[:, :3], r"got shape \(4, 3\)"),
        ([[1.0, 2.0], [3.0]], r"must be a matrix \(4, 4\)"),
        (np.eye(4, dtype=complex), "real numbers, got ndarray of complex128"),
        (torch.eye(4, dtype=torch.complex64), "real numbers, got Tensor of torch.complex64"),
        (np.eye(4).astype(str), "real numbers, got ndarray of <U32"),
        (np.eye(4) > 0, "real numbers, got ndarray of bool"),
        (None, "real numbers, got NoneType of object"),
    ],
)
def test_other_shapes_and_kinds_are_refused(pose: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"ego_to_global .*{message}"):
        EgoMotion(pose)
    with pytest.raises(ValueError, match=rf"at_exposure\['CAM_BACK'\] .*{message}"):
        EgoMotion(MOUNT, {"CAM_BACK": pose})
    with pytest.raises(ValueError, match=f"camera_to_ego .*{message}"):
        CameraCalibration(320, 180, K, pose)
    if pose is not None:
        with pytest.raises(ValueError, match=f"bev_to_ego .*{message}"):
            RigCalibration({}, pose)


def changed(value: float, row: int, column: int) -> torch.Tensor:
    matrix = MOUNT.clone()
    matrix[row, column] = value
    return matrix


NOT_RIGID = [
    (changed(math.nan, 0, 3), "is not finite"),
    (changed(-math.inf, 1, 1), "is not finite"),
    (changed(1e300, 2, 3), r"lies 1e\+300 m away"),
    (changed(-1.1e8, 0, 3), r"lies 1.1e\+08 m away"),
    (changed(0.01, 3, 0), "has the last row"),
    (changed(2.0, 3, 3), "has the last row"),
    (changed(1e300, 0, 0), "is not a rotation"),
    (changed(0.1, 0, 0), "is not a rotation"),
    (MOUNT * torch.tensor([1.0, 1.0, 1.002, 1.0]).double(), "product of columns 2 and 2 is 1.004, not 1"),
    (MOUNT @ torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0]).double()), "mirrors"),
    (torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0]).double()), "is not a rotation"),
]


@pytest.mark.parametrize(("matrix", "message"), NOT_RIGID)
def test_mountings_that_are_not_rigid_are_refused(matrix: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"camera_to_ego must be a rotation and a translation .*{message}"):
        CameraCalibration(320, 180, K, matrix)
    with pytest.raises(ValueError, match=f"bev_to_ego must be a rotation and a translation .*{message}"):
        RigCalibration({}, matrix.numpy())
    with pytest.raises(AssertionError, match=message):
        assert not rigid_problem(matrix), rigid_problem(matrix)
    assert EgoMotion(matrix).problem([]).startswith("ego_to_global ")
    exposed = EgoMotion(MOUNT, {"CAM_BACK": matrix})
    assert exposed.problem(["CAM_BACK"]).startswith("ego_to_global at the exposure of CAM_BACK ")
    assert exposed.problem(["CAM_FRONT"]) == ""


def test_matrices_rounded_in_files_are_rigid() -> None:
    turned = pose_matrix(
        torch.tensor([4e6, -3e6, 120.0]).double(), torch.tensor([0.3, 0.7, -0.4, 0.9]).double()
    )
    for matrix in (turned, turned.float(), (turned * 1e4).round() / 1e4):
        assert rigid_problem(matrix) == ""


@pytest.mark.parametrize(
    "intrinsics",
    [
        [[300.0, 0, 160], [0, 310, 90], [0, 0, 0]],
        [[300.0, 0, 160], [0, 310, 90], [0, 0.1, 1]],
        [[300.0, 0, 160], [0, 0, 90], [0, 0, 1]],
        [[300.0, 0, 160], [0, -310, 90], [0, 0, 1]],
        [[300.0, 300, 160], [310, 310, 90], [0, 0, 1]],
        [[300.0, 0, math.nan], [0, 310, 90], [0, 0, 1]],
        [[math.inf, 0, 160], [0, 310, 90], [0, 0, 1]],
        np.zeros((3, 3)),
    ],
)
def test_intrinsics_of_no_pinhole_camera_are_refused(intrinsics: Any) -> None:
    with pytest.raises(ValueError, match=r"intrinsics must be finite, \[\[fx, 0, cx\]"):
        CameraCalibration(320, 180, intrinsics, MOUNT)
    with pytest.raises(ValueError, match=r"intrinsics must be a matrix \(3, 3\), got shape \(3, 4\)"):
        CameraCalibration(320, 180, np.hstack((K, np.zeros((3, 1)))), MOUNT)


@pytest.mark.parametrize("width", [0, -1, 1.5, math.nan, "320", None])
def test_sizes_of_images_are_whole_numbers(width: Any) -> None:
    with pytest.raises(ValueError, match=f"whole numbers of at least 1, got {width!r} x 180"):
        CameraCalibration(width, 180, K, MOUNT)
    assert CameraCalibration(np.int64(320), 180, K, MOUNT).width == 320


def test_cameras_and_exposures_are_given_by_channel() -> None:
    camera = CameraCalibration(320, 180, K, MOUNT)
    wrong: Any
    for wrong in ([camera], None, {0: camera}):
        with pytest.raises(ValueError, match=f"cameras must map channels .*, got a {type(wrong).__name__}"):
            RigCalibration(wrong)
    wrong = {"CAM_FRONT": MOUNT}
    with pytest.raises(ValueError, match=r"cameras\['CAM_FRONT'\] must be a CameraCalibration, got a Tensor"):
        RigCalibration(wrong)
    wrong = [MOUNT]
    with pytest.raises(ValueError, match=r"at_exposure must map channels .*, got a list"):
        EgoMotion(MOUNT, wrong)
