"""The bird's-eye view: forward is up, left is left, things lie where they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bevperception.geometry import BEVGrid, planar_pose, transform_boxes
from bevperception.structures import Boxes3D
from bevperception.taxonomy import DETECTION_CLASSES, SEGMENTATION_CLASSES
from bevperception.visualization.bev import (
    BEVView,
    SegmentationLayers,
    draw_boxes,
    draw_segmentation,
    render_bev,
)
from bevperception.visualization.palette import DETECTION_COLOURS, PANEL, SEGMENTATION_COLOURS

VIEW = BEVView(width=400, height=400, range_m=50.0)  # 4 pixels a metre


def boxes_at(*rows: tuple[float, ...], name: str = "car") -> Boxes3D:
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 9)
    return Boxes3D(values, torch.full((len(rows),), DETECTION_CLASSES.index(name)))


def blank(view: BEVView = VIEW) -> np.ndarray:
    return np.zeros((view.height, view.width, 3), dtype=np.uint8)


def test_forward_is_up_and_left_is_left() -> None:
    origin, ahead, left = VIEW.to_pixels(np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]))
    np.testing.assert_allclose(origin, [199.5, 199.5])
    np.testing.assert_allclose(ahead, [199.5, 159.5])
    np.testing.assert_allclose(left, [159.5, 199.5])


def test_pixel_to_ego_inverts_to_pixels() -> None:
    view = BEVView(width=301, height=200, range_m=37.0, centre_x_m=5.0, centre_y_m=-2.0)
    points = np.random.default_rng(0).uniform(-40, 40, (50, 2))
    pixels = np.concatenate([view.to_pixels(points), np.ones((50, 1))], axis=1)
    np.testing.assert_allclose((pixels @ view.pixel_to_ego().T)[:, :2], points, atol=1e-9)


@pytest.mark.parametrize(("x", "y"), [(20.0, 0.0), (-30.0, 10.0), (5.0, -25.0)])
def test_box_colours_the_pixels_at_its_place_and_no_others(x: float, y: float) -> None:
    image = blank()
    draw_boxes(image, VIEW, boxes_at((x, y, 0, 4, 2, 1.5, 0, 0, 0)))
    column, row = np.rint(VIEW.to_pixels(np.array([x, y]))).astype(int)
    assert image[row, column].any()
    rows, columns = np.nonzero(image.any(axis=-1))
    assert abs(rows - row).max() <= 2.0 * 4 + 4
    assert abs(columns - column).max() <= 1.0 * 4 + 4


def test_front_edge_is_on_the_side_of_the_heading() -> None:
    colour = np.array(DETECTION_COLOURS["car"])
    for yaw, (rows, columns) in {
        0.0: (slice(0, 195), slice(None)),
        math.pi / 2: (slice(None), slice(0, 195)),
        math.pi: (slice(205, None), slice(None)),
        -math.pi / 2: (slice(None), slice(205, None)),
    }.items():
        image = blank()
        draw_boxes(image, VIEW, boxes_at((0, 0, 0, 10, 10, 1, yaw, 0, 0)))
        strong = (image == colour).all(axis=-1)
        ahead = strong[rows, columns].sum()
        assert ahead > (strong.sum() - ahead) * 0.6, yaw


def test_velocity_arrow_reaches_one_second_ahead() -> None:
    still, moving = blank(), blank()
    draw_boxes(still, VIEW, boxes_at((0, 0, 0, 4, 2, 1.5, 0, 0, 0)))
    draw_boxes(moving, VIEW, boxes_at((0, 0, 0, 4, 2, 1.5, 0, 0, 10.0)))
    rows, columns = np.nonzero((still != moving).any(axis=-1))
    assert columns.min() == pytest.approx(199.5 - 40, abs=3)
    assert rows.mean() == pytest.approx(199.5, abs=2)


@pytest.mark.parametrize("velocity", [(math.nan, math.nan), (math.inf, 0.0), (0.1, 0.0), (1e9, 0.0)])
def test_unknown_or_absurd_velocity_has_no_arrow(velocity: tuple[float, float]) -> None:
    still, moving = blank(), blank()
    draw_boxes(still, VIEW, boxes_at((0, 0, 0, 4, 2, 1.5, 0, 0, 0)))
    draw_boxes(moving, VIEW, boxes_at((0, 0, 0, 4, 2, 1.5, 0, *velocity)))
    assert (still == moving).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e12])
def test_box_that_is_nowhere_draws_nothing(bad: float) -> None:
    image = blank()
    draw_boxes(image, VIEW, boxes_at((bad, 0, 0, 4, 2, 1.5, 0, 0, 0), (0, 0, 0, bad, 2, 1.5, 0, 0, 0)))
    draw_boxes(image, VIEW, boxes_at())
    assert not image.any()


def test_higher_score_is_drawn_last() -> None:
    row = [0.0, 0, 0, 6, 6, 1, 0, 0, 0]
    labels = torch.tensor([DETECTION_CLASSES.index("bus"), DETECTION_CLASSES.index("car")])
    image = blank()
    draw_boxes(image, VIEW, Boxes3D(torch.tensor([row, row]), labels, torch.tensor([0.9, 0.2])))
    assert (image == np.array(DETECTION_COLOURS["bus"])).all(axis=-1).sum() > 20
    assert not (image == np.array(DETECTION_COLOURS["car"])).all(axis=-1).any()


def layers_with(name: str, grid: BEVGrid, cells: np.ndarray) -> SegmentationLayers:
    probabilities = torch.zeros(len(SEGMENTATION_CLASSES), grid.rows, grid.columns)
    probabilities[SEGMENTATION_CLASSES.index(name)] = torch.from_numpy(cells.astype(np.float32))
    return SegmentationLayers(probabilities, SEGMENTATION_CLASSES, grid)


@pytest.mark.parametrize(
    "bev_to_ego", [None, planar_pose(1.3, -0.4, 0.5), planar_pose(0.9, 0.0, -math.pi / 2)]
)
def test_every_cell_centre_gets_its_own_class(bev_to_ego: torch.Tensor | None) -> None:
    grid = BEVGrid(-20.0, 30.0, -25.0, 25.0, 25, 20)  # cells of 2.5 m by 2 m, not symmetric
    cells = np.random.default_rng(1).random((25, 20)) < 0.5
    image = blank()
    draw_segmentation(image, VIEW, layers_with("vehicle", grid, cells), bev_to_ego)
    centres = torch.cat([grid.cell_centres(), torch.zeros(25, 20, 1, dtype=torch.float64)], dim=-1)
    matrix = torch.eye(4, dtype=torch.float64) if bev_to_ego is None else bev_to_ego
    ego = (centres @ matrix[:3, :3].T + matrix[:3, 3]).numpy()
    columns, rows = np.rint(VIEW.to_pixels(ego)).astype(int).transpose(2, 0, 1)
    inside = (rows >= 0) & (rows < 400) & (columns >= 0) & (columns < 400)
    painted = (image[rows[inside], columns[inside]] == SEGMENTATION_COLOURS["vehicle"]).all(axis=-1)
    assert (painted == cells[inside]).all()


def test_nothing_is_painted_outside_the_grid_or_below_the_threshold() -> None:
    grid = BEVGrid(-10.0, 10.0, -10.0, 10.0, 20, 20)
    image = blank()
    draw_segmentation(image, VIEW, layers_with("drivable_area", grid, np.ones((20, 20))))
    assert image.any(axis=-1).sum() == pytest.approx(80 * 80, rel=0.03)
    faint = blank()
    draw_segmentation(faint, VIEW, layers_with("drivable_area", grid, np.full((20, 20), 0.4)))
    assert not faint.any()


def test_vehicles_are_painted_over_the_ground() -> None:
    grid = BEVGrid(-10.0, 10.0, -10.0, 10.0, 20, 20)
    layers = SegmentationLayers(torch.ones(2, 20, 20), ("vehicle", "drivable_area"), grid)
    image = blank()
    draw_segmentation(image, VIEW, layers)
    assert (image[200, 200] == SEGMENTATION_COLOURS["vehicle"]).all()


def test_rendering_in_another_bev_frame_gives_the_same_picture() -> None:
    # lidar: x right, y forward; 0.9 m ahead of the ego origin
    lidar_to_ego = planar_pose(0.9, 0.0, -math.pi / 2)
    ego_to_lidar = torch.linalg.inv(lidar_to_ego)
    boxes = boxes_at((20, 5, 0, 4, 2, 1.5, 0.4, 3, 1), (-10, -12, 0, 8, 3, 3, 2.0, 0, 0), name="truck")
    in_lidar = Boxes3D(transform_boxes(boxes.values, ego_to_lidar), boxes.labels)
    direct = render_bev(VIEW, boxes)
    through = render_bev(VIEW, in_lidar, bev_to_ego=lidar_to_ego)
    assert np.abs(direct.astype(int) - through).max() <= 40  # a subpixel of rounding at most
    assert (direct != through).any(axis=-1).mean() < 0.002


def test_render_has_the_size_of_the_view_and_shows_the_car() -> None:
    view = BEVView(width=501, height=300, range_m=40.0)
    picture = render_bev(view)
    assert picture.shape == (300, 501, 3)
    column, row = np.rint(view.to_pixels(np.array([0.5, 0.0]))).astype(int)
    assert picture[row, column].min() > 230
    assert picture[2, 2].tolist() == list(PANEL)
