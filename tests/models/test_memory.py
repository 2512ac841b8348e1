"""Ego-motion alignment of BEV maps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bevperception.can_bus import relative_can_bus
from bevperception.geometry import BEVGrid, planar_pose
from bevperception.models.bev.alignment import published_shift, rotate_bev, sample_bilinear, warp_bev

angles = st.floats(-math.pi, math.pi)
metres = st.floats(-8, 8)


def world_pattern(grid: BEVGrid, bev_to_global: torch.Tensor) -> torch.Tensor:
    """A smooth pattern fixed to the world, seen in a BEV frame: (1, 2, rows, columns)."""
    centres = grid.cell_centres()
    homogeneous = torch.cat(
        (centres, torch.zeros(*centres.shape[:2], 1), torch.ones(*centres.shape[:2], 1)), -1
    )
    world = homogeneous.double() @ bev_to_global.T
    return torch.stack(((world[..., 0] * 0.11).sin(), (world[..., 1] * 0.07).cos()))[None]


@settings(max_examples=40, deadline=None)
@given(x=metres, y=metres, yaw=angles, start=angles)
def test_static_world_stays_put(x: float, y: float, yaw: float, start: float) -> None:
    grid = BEVGrid(-20, 24, -15, 18, 66, 110)
    previous = planar_pose(100.0, -50.0, start)
    current = previous @ planar_pose(x, y, yaw)
    warped, coverage = warp_bev(world_pattern(grid, previous), grid, current[None], previous[None])
    expected = world_pattern(grid, current)
    # A cell that the earlier map covers but for a thousandth lacks up to a thousandth of its value.
    inside = (coverage > 0.9999).expand_as(warped)
    assert inside.any()
    # Bilinear interpolation of a pattern of this curvature over half-metre cells errs by less than this.
    assert (warped - expected).abs()[inside].max() < 1e-3


def test_a_point_moves_opposite_to_the_ego() -> None:
    grid = BEVGrid(-10, 10, -10, 10, 20, 20)
    features = torch.zeros(1, 1, 20, 20, dtype=torch.float64)
    row, column = 10, 16  # the cell at x 6.5 m, y 0.5 m
    features[0, 0, row, column] = 1.0
    ahead = planar_pose(3.0, 0.0, 0.0)
    warped, _ = warp_bev(features, grid, ahead[None], torch.eye(4).double()[None])
    assert warped[0, 0, row, column - 3] == 1.0
    assert warped.sum() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_motion_returns_the_map_bit_for_bit(dtype: torch.dtype) -> None:
    grid = BEVGrid(-51.2, 51.2, -33.3, 51.2, 13, 29)
    features = torch.randn(2, 3, 13, 29, dtype=dtype)
    pose = torch.stack([planar_pose(1234.5, 987.6, 0.7), planar_pose(-3.3, 2.2, -2.9)])
    warped, coverage = warp_bev(features, grid, pose, pose)
    assert torch.equal(warped, features)
    assert (coverage == 1).all()


def test_outside_is_zero_and_uncovered() -> None:
    grid = BEVGrid(-4, 4, -4, 4, 8, 8)
    features = torch.ones(1, 2, 8, 8)
    far = planar_pose(100, 0, 0)[None]
    warped, coverage = warp_bev(features, grid, far, torch.eye(4).double()[None])
    assert (warped == 0).all()
    assert (coverage == 0).all()


def test_bilinear_against_grid_sample_and_gradients() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    cells = torch.rand(2, 4, 6, 2, dtype=torch.float64) * torch.tensor([9.0, 7.0]).double() - 1.5
    size = torch.tensor([7.0, 5.0], dtype=torch.float64)
    expected = torch.nn.functional.grid_sample(features, (2 * cells + 1) / size - 1, align_corners=False)
    actual, _ = sample_bilinear(features, cells)
    torch.testing.assert_close(actual, expected)
    assert torch.autograd.gradcheck(lambda f: sample_bilinear(f, cells)[0], (features,))


def test_mirrored_bev_frames_are_warped_too() -> None:
    """BEV augmentation may mirror the frame; a matrix with a reflection is as good as any."""
    grid = BEVGrid(-20, 20, -20, 20, 80, 80)
    mirror = torch.diag(torch.tensor([1.0, -1, 1, 1], dtype=torch.float64))
    previous = planar_pose(5, 5, 0.3) @ mirror
    current = planar_pose(6, 5.5, 0.5) @ mirror
    warped, coverage = warp_bev(world_pattern(grid, previous), grid, current[None], previous[None])
    # A cell that the earlier map covers but for a thousandth lacks up to a thousandth of its value.
    inside = (coverage > 0.9999).expand_as(warped)
    assert (warped - world_pattern(grid, current)).abs()[inside].max() < 1e-3


def test_published_shift_is_the_displacement_in_the_lidar_frame() -> None:
    grid = BEVGrid(-50, 50, -40, 40, 16, 25)
    can = torch.zeros(1, 18, dtype=torch.float64)
    can[0, :2] = torch.tensor([0.0, 6.0])  # six metres to the north
    can[0, -2] = math.pi / 2  # heading north: straight ahead, which is +y of the lidar frame
    torch.testing.assert_close(published_shift(can, grid), torch.tensor([[0.0, 6 / 80]]).double())


def test_rotation_by_a_quarter_turn_is_exact() -> None:
    features = torch.randn(1, 2, 9, 9)
    turned = rotate_bev(features, torch.tensor([90.0]), (4.5, 4.5))
    torch.testing.assert_close(turned, features.rot90(1, (2, 3)))


def test_relative_can_bus() -> None:
    current, previous = torch.arange(36.0).view(2, 18) + 5, torch.zeros(2, 18)
    relative = relative_can_bus(current, previous, torch.tensor([True, False]))
    assert torch.equal(relative[0], current[0])
    assert (relative[1, :3] == 0).all()
    assert relative[1, -1] == 0
    assert torch.equal(relative[1, 3:-1], current[1, 3:-1])
