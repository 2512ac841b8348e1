"""The warp of BEV maps under any planar motion and on any grid."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bevperception.geometry import BEVGrid, planar_pose
from bevperception.models.bev.alignment import cells_in_previous, warp_bev
from tests.models.test_memory import world_pattern

angles = st.floats(-math.pi, math.pi)
metres = st.floats(-30, 30)
poses = st.tuples(metres, metres, angles)


@st.composite
def grids(draw: st.DrawFn) -> BEVGrid:
    """Grids that are not square, off centre, with cells that are not square, of 0.3 to 0.8 m."""
    x_min, y_min = draw(st.floats(-30, -5)), draw(st.floats(-30, -5))
    rows, columns = draw(st.integers(20, 60)), draw(st.integers(20, 60))
    cell_x, cell_y = draw(st.floats(0.3, 0.8)), draw(st.floats(0.3, 0.8))
    return BEVGrid(x_min, x_min + columns * cell_x, y_min, y_min + rows * cell_y, rows, columns)


def world_coordinates(grid: BEVGrid, bev_to_global: Tensor) -> Tensor:
    """(1, 2, rows, columns): every cell holds where in the world its centre lies."""
    centres = grid.cell_centres()
    ones = torch.ones(*centres.shape[:2], 1, dtype=torch.float64)
    homogeneous = torch.cat((centres, 0 * ones, ones), -1)
    return (homogeneous @ bev_to_global.T)[..., :2].permute(2, 0, 1)[None]


@settings(max_examples=60, deadline=None)
@given(grid=grids(), start=poses, motion=poses)
def test_a_pattern_fixed_to_the_world_stays_put(
    grid: BEVGrid, start: tuple[float, float, float], motion: tuple[float, float, float]
) -> None:
    """Bilinear sampling is exact for a linear pattern: a cell that shows where it lies must still do so."""
    previous = planar_pose(*start)
    current = previous @ planar_pose(*motion)
    warped, coverage = warp_bev(world_coordinates(grid, previous), grid, current[None], previous[None])
    inside = (coverage > 1 - 1e-9).expand_as(warped)
    # In metres; cells are 0.3 m at least, and positions are rounded to a millionth of one.
    assert ((warped - world_coordinates(grid, current)).abs()[inside] < 1e-4).all()


@settings(max_examples=30, deadline=None)
@given(grid=grids(), start=poses)
def test_no_motion_returns_the_map_bit_for_bit(grid: BEVGrid, start: tuple[float, float, float]) -> None:
    features = torch.randn(1, 3, grid.rows, grid.columns)
    pose = planar_pose(*start)[None]
    warped, coverage = warp_bev(features, grid, pose, pose.clone())
    assert torch.equal(warped, features)
    assert (coverage == 1).all()


@settings(max_examples=40, deadline=None)
@given(
    first=st.tuples(st.floats(-6, 6), st.floats(-6, 6), angles),
    second=st.tuples(st.floats(-6, 6), st.floats(-6, 6), angles),
)
def test_two_warps_agree_with_one(
    first: tuple[float, float, float], second: tuple[float, float, float]
) -> None:
    grid = BEVGrid(-21.0, 24.0, -18.0, 20.0, 76, 110)
    oldest = planar_pose(10.0, -7.0, 0.4)
    middle = oldest @ planar_pose(*first)
    newest = middle @ planar_pose(*second)
    pattern = world_pattern(grid, oldest)
    once, covered_once = warp_bev(pattern, grid, newest[None], oldest[None])
    step, covered_step = warp_bev(pattern, grid, middle[None], oldest[None])
    twice, covered_twice = warp_bev(step, grid, newest[None], middle[None])
    # A cell whose second sample touches cells that the first left uncovered proves nothing.
    known, _ = warp_bev((covered_step > 0.999).double()[:, None], grid, newest[None], middle[None])
    inside = (covered_once > 0.999) & (covered_twice > 0.999) & (known[:, 0] > 0.999)
    difference = (once - twice).abs()[inside[:, None].expand_as(once)]
    # Twice the interpolation error of this pattern over half-metre cells.
    assert difference.numel() == 0 or float(difference.max()) < 2e-3


def test_two_warps_agree_with_one_over_most_of_the_map() -> None:
    """The comparison above is not empty for a car's motion."""
    grid = BEVGrid(-21.0, 24.0, -18.0, 20.0, 76, 110)
    pose, step = planar_pose(3.0, 4.0, -1.0), planar_pose(1.0, 0.2, 0.1)
    _, coverage = warp_bev(world_pattern(grid, pose), grid, (pose @ step @ step)[None], pose[None])
    assert float((coverage > 0.999).double().mean()) > 0.8


def test_gradients_of_the_warp() -> None:
    torch.manual_seed(0)
    grid = BEVGrid(-3.0, 4.0, -2.0, 2.5, 4, 6)
    features = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    previous = torch.stack([planar_pose(5.0, 1.0, 0.3), planar_pose(0.0, 0.0, -2.0)])
    current = torch.stack([planar_pose(5.6, 1.3, 0.5), planar_pose(0.4, -0.3, -1.4)])
    assert torch.autograd.gradcheck(lambda f: warp_bev(f, grid, current, previous)[0], (features,))


def test_a_jump_of_the_pose_leaves_nothing_covered() -> None:
    grid = BEVGrid(-10, 10, -10, 10, 8, 8)
    features = torch.full((1, 1, 8, 8), 7.0)
    far = planar_pose(1e7, -1e7, 1.0)[None]
    warped, coverage = warp_bev(features, grid, far, torch.eye(4).double()[None])
    assert (warped == 0).all()
    assert (coverage == 0).all()
    assert cells_in_previous(grid, far, torch.eye(4).double()[None]).isfinite().all()
