"""The contract's geometry against pyquaternion, the devkit's Box and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nuscenes.eval.common.utils import quaternion_yaw
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import transform_matrix, view_points
from pyquaternion import Quaternion

from bevperception.geometry import (
    BOX_COLUMNS,
    MIN_DEPTH_M,
    BEVGrid,
    box_corners,
    invert_rigid,
    planar_pose,
    pose_matrix,
    project_points,
    rotation_from_quaternion,
    transform_boxes,
    transform_points,
    yaw_of,
)
from tests.angles import wrap_angle

metres = st.floats(-1e3, 1e3)
angle = st.floats(-10.0, 10.0)
component = st.floats(-1.0, 1.0)
quaternion = st.tuples(component, component, component, component).filter(lambda q: math.hypot(*q) > 1e-2)
translation = st.tuples(metres, metres, metres)


def double(values: object) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64))


@given(quaternion)
def test_rotation_is_pyquaternions(q: tuple[float, ...]) -> None:
    ours = rotation_from_quaternion(double(q)).numpy()
    np.testing.assert_allclose(ours, Quaternion(*q).rotation_matrix, atol=1e-12)


def test_rotation_is_batched_and_keeps_the_dtype() -> None:
    q = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    batched = rotation_from_quaternion(q)
    assert batched.dtype == torch.float32
    assert batched.shape == (3, 2, 3, 3)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(batched[i, j], rotation_from_quaternion(q[i, j]))
    assert rotation_from_quaternion(torch.zeros(0, 4)).shape == (0, 3, 3)


@given(translation, quaternion)
def test_pose_is_the_devkits_and_its_inverse_is_the_inverse(
    t: tuple[float, ...], q: tuple[float, ...]
) -> None:
    pose = pose_matrix(double(t), double(q))
    np.testing.assert_allclose(pose.numpy(), transform_matrix(list(t), Quaternion(*q)), atol=1e-9)
    np.testing.assert_allclose((invert_rigid(pose) @ pose).numpy(), np.eye(4), atol=1e-9)
    inverse = transform_matrix(list(t), Quaternion(*q), inverse=True)
    np.testing.assert_allclose(invert_rigid(pose).numpy(), inverse, atol=1e-9)


def test_poses_are_batched() -> None:
    generator = torch.Generator().manual_seed(1)
    t = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    q = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    poses = pose_matrix(t, q)
    assert poses.shape == (2, 5, 4, 4)
    torch.testing.assert_close(poses[1, 3], pose_matrix(t[1, 3], q[1, 3]))
    torch.testing.assert_close(invert_rigid(poses), torch.linalg.inv(poses))


@given(metres, metres, angle)
def test_planar_pose_is_the_pose_of_a_turn_about_z(x: float, y: float, yaw: float) -> None:
    q = Quaternion(axis=[0, 0, 1], radians=yaw)
    np.testing.assert_allclose(planar_pose(x, y, yaw).numpy(), transform_matrix([x, y, 0], q), atol=1e-9)
    assert math.remainder(yaw_of(planar_pose(x, y, yaw)).item() - yaw, 2 * math.pi) == pytest.approx(
        0, abs=1e-9
    )


@given(quaternion)
def test_yaw_is_the_devkits(q: tuple[float, ...]) -> None:
    rotation = rotation_from_quaternion(double(q))
    heading = rotation[:2, 0]
    if float(heading.norm()) < 1e-6:  # looks straight up: no yaw to speak of
        return
    difference = yaw_of(rotation).item() - quaternion_yaw(Quaternion(*q))
    assert math.remainder(difference, 2 * math.pi) == pytest.approx(0, abs=1e-7)


def test_points_are_transformed_one_by_one_and_in_batches() -> None:
    generator = torch.Generator().manual_seed(2)
    points = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    matrices = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    result = transform_points(points, matrices)
    for b in range(2):
        for k in range(7):
            homogeneous = torch.cat([points[b, k], torch.ones(1, dtype=torch.float64)])
            torch.testing.assert_close(result[b, k], (matrices[b] @ homogeneous)[:3])
    torch.testing.assert_close(transform_points(points.flip(1), matrices), result.flip(1))
    assert transform_points(points[:, :0], matrices).shape == (2, 0, 3)


def random_boxes(count: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    centre = rng.uniform(-50, 50, (count, 3))
    size = rng.uniform(0.3, 12.0, (count, 3))
    rest = np.concatenate([rng.uniform(-4, 4, (count, 1)), rng.uniform(-10, 10, (count, 2))], axis=1)
    return double(np.concatenate([centre, size, rest], axis=1))


def devkit_box(row: torch.Tensor) -> Box:
    x, y, z, length, width, height, yaw, vx, vy = row.tolist()
    turn = Quaternion(axis=[0, 0, 1], radians=yaw)
    return Box([x, y, z], [width, length, height], turn, velocity=(vx, vy, 0.0))


DEVKIT_ORDER = [3, 7, 6, 2, 0, 4, 5, 1]
"""Index of our corners 0 to 7 in the devkit's: front upper left first, then around the front."""


def test_corners_are_the_devkits() -> None:
    boxes = random_boxes(20, seed=3)
    ours = box_corners(boxes)
    for row, corners in zip(boxes, ours, strict=True):
        np.testing.assert_allclose(corners.numpy(), devkit_box(row).corners().T[DEVKIT_ORDER], atol=1e-9)


def test_corners_are_counter_clockwise_from_the_front_left_bottom_first() -> None:
    corners = box_corners(double([[1.0, 2.0, 3.0, 4.0, 2.0, 1.0, 0.0, 0.0, 0.0]]))[0]
    bottom = [[3, 3, 2.5], [-1, 3, 2.5], [-1, 1, 2.5], [3, 1, 2.5]]
    np.testing.assert_allclose(corners[:4].numpy(), bottom)
    np.testing.assert_allclose(corners[4:].numpy(), np.add(bottom, [0, 0, 1.0]))
    assert box_corners(torch.zeros(0, 9)).shape == (0, 8, 3)


@settings(max_examples=40, deadline=None)
@given(metres, metres, metres, angle)
def test_boxes_move_as_the_devkits_do(x: float, y: float, z: float, yaw: float) -> None:
    boxes = random_boxes(6, seed=4)
    a_to_b = planar_pose(x, y, yaw)
    a_to_b[2, 3] = z
    moved = transform_boxes(boxes, a_to_b)
    for row, result in zip(boxes, moved, strict=True):
        box = devkit_box(row)
        box.rotate(Quaternion(axis=[0, 0, 1], radians=yaw))
        box.translate(np.array([x, y, z]))
        np.testing.assert_allclose(result[:3].numpy(), box.center, atol=1e-9)
        np.testing.assert_allclose(result[3:6].numpy(), box.wlh[[1, 0, 2]], atol=1e-9)
        off = result[6].item() - quaternion_yaw(box.orientation)
        assert math.remainder(off, 2 * math.pi) == pytest.approx(0, abs=1e-7)
        np.testing.assert_allclose(result[7:].numpy(), box.velocity[:2], atol=1e-9)


@pytest.mark.parametrize("flip", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
@pytest.mark.parametrize("scale", [1.0, 0.5, 1.7])
def test_augmented_boxes_cover_the_augmented_corners(flip: tuple[int, int], scale: float) -> None:
    boxes = random_boxes(8, seed=5)
    augment = planar_pose(3.0, -2.0, 0.7)
    augment[:3, :3] = augment[:3, :3] @ torch.diag(double([scale * flip[0], scale * flip[1], scale]))
    moved = box_corners(transform_boxes(boxes, augment))
    expected = transform_points(box_corners(boxes), augment)
    distance = torch.cdist(moved, expected)
    assert float(distance.min(dim=2).values.max()) < 1e-9
    assert float(distance.min(dim=1).values.max()) < 1e-9
    # a box's front stays its front
    front = [0, 3, 7, 4]
    torch.testing.assert_close(moved[:, front].mean(dim=1), expected[:, front].mean(dim=1))


def test_moving_boxes_keeps_nan_velocities_dtype_and_emptiness() -> None:
    boxes = random_boxes(3, seed=6).float()
    boxes[1, 7:] = math.nan
    moved = transform_boxes(boxes, planar_pose(1, 2, 3))
    assert moved.dtype == torch.float32
    assert moved[1, 7:].isnan().all()
    assert moved[[0, 2]].isfinite().all()
    assert moved[1, :7].isfinite().all()
    assert transform_boxes(boxes[:0], planar_pose(1, 2, 3)).shape == (0, 9)
    assert len(BOX_COLUMNS) == boxes.shape[1]


def test_moving_boxes_there_and_back_changes_nothing() -> None:
    boxes = random_boxes(9, seed=7)
    a_to_b = planar_pose(120.0, -40.0, 2.2)
    back = transform_boxes(transform_boxes(boxes, a_to_b), invert_rigid(a_to_b))
    off = wrap_angle(back[:, 6] - boxes[:, 6])
    torch.testing.assert_close(off, torch.zeros_like(off), atol=1e-9, rtol=0)
    keep = [0, 1, 2, 3, 4, 5, 7, 8]
    torch.testing.assert_close(back[:, keep], boxes[:, keep])


def test_projection_is_the_devkits_in_front_of_the_camera() -> None:
    rng = np.random.default_rng(8)
    points = np.concatenate([rng.uniform(-5, 5, (30, 2)), rng.uniform(1, 40, (30, 1))], axis=1)
    intrinsics = np.array([[1266.4, 0, 816.3], [0, 1266.4, 491.5], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = intrinsics
    pixels, depth = project_points(double(points), double(matrix))
    expected = view_points(points.T, intrinsics, normalize=True)[:2].T
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(depth.numpy(), points[:, 2], atol=1e-12)


def test_projection_behind_the_camera_is_finite_and_tells_the_depth() -> None:
    points = double([[1.0, 2.0, 0.0], [1.0, 2.0, -3.0]])
    pixels, depth = project_points(points, torch.eye(4, dtype=torch.float64))
    assert pixels.isfinite().all()
    assert depth.tolist() == [0.0, -3.0]
    torch.testing.assert_close(pixels[0], double([1.0, 2.0]) / MIN_DEPTH_M)


@pytest.mark.parametrize(
    "values",
    [
        (0.0, 0.0, -1.0, 1.0, 4, 4),
        (-1.0, 1.0, 1.0, -1.0, 4, 4),
        (-1.0, 1.0, -1.0, 1.0, 0, 4),
        (-1.0, 1, -1, 1, 4, 0),
    ],
)
def test_empty_grids_are_refused(values: tuple[float, float, float, float, int, int]) -> None:
    with pytest.raises(ValueError, match="BEV grid"):
        BEVGrid(*values)


def test_cell_centres_are_half_a_cell_in() -> None:
    grid = BEVGrid(x_min_m=-3.0, x_max_m=6.0, y_min_m=10.0, y_max_m=12.0, rows=4, columns=3)
    assert (grid.cell_x_m, grid.cell_y_m) == (3.0, 0.5)
    centres = grid.cell_centres()
    assert centres.shape == (4, 3, 2)
    for row in range(4):
        for column in range(3):
            expected = [-3.0 + (column + 0.5) * 3.0, 10.0 + (row + 0.5) * 0.5]
            assert centres[row, column].tolist() == pytest.approx(expected)
            assert grid.to_cells(centres[row, column]).tolist() == pytest.approx([column, row])
    assert grid.cell_centres(torch.float32).dtype == torch.float32


def test_grid_edges_lie_half_a_cell_outside_the_outer_centres() -> None:
    grid = BEVGrid(-51.2, 51.2, -40.0, 30.0, rows=70, columns=50)
    corners = double([[-51.2, -40.0, 9.0], [51.2, 30.0, 9.0]])
    np.testing.assert_allclose(grid.to_cells(corners).numpy(), [[-0.5, -0.5], [49.5, 69.5]], atol=1e-9)
