"""Coordinates from the model's output to messages: one box at a known place, in both BEV frames."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pyquaternion import Quaternion

from bevperception.config_model import SegmentationConfig
from bevperception.geometry import BEVGrid, invert_rigid, transform_boxes
from bevperception.inference import Perception
from bevperception.streaming import conversions
from bevperception.streaming.picture import bev_picture
from bevperception.streaming.rig import pose_from_xyzw
from bevperception.streaming.settings import NodeSettings
from bevperception.structures import Boxes3D
from bevperception.taxonomy import DETECTION_CLASSES
from bevperception.visualization.bev import (
    BEVView,
    SegmentationLayers,
    draw_ego,
    draw_rings,
    draw_segmentation,
)
from bevperception.visualization.palette import DETECTION_COLOURS, PANEL

BOX = torch.tensor([[12.0, -4.0, 0.5, 4.5, 2.0, 1.5, 0.7, 3.0, 4.0]], dtype=torch.float64)
"""base_link."""
IDENTITY = torch.eye(4, dtype=torch.float64)
LIDAR = pose_from_xyzw([0.94, 0.0, 1.84], [0.0, 0.0, -math.sqrt(0.5), math.sqrt(0.5)])
HEAD = SegmentationConfig(classes=("drivable_area", "vehicle"), range_m=20.0, cell_m=0.5)


def perception(bev_to_ego: torch.Tensor) -> Perception:
    """A perception whose model saw BOX, and its footprint's centre as a vehicle cell."""
    in_bev = transform_boxes(BOX, invert_rigid(bev_to_ego))
    boxes = Boxes3D(in_bev.float(), torch.tensor([3]), torch.tensor([0.75]))
    maps = torch.zeros(2, HEAD.grid.rows, HEAD.grid.columns)
    column, row = HEAD.grid.to_cells(in_bev[0, :2]).round().long().tolist()
    maps[1, row, column] = 0.876
    return Perception(1.0, boxes, maps, bev_to_ego, IDENTITY, (), None, {})


@pytest.mark.parametrize("bev_to_ego", [IDENTITY, LIDAR], ids=["ego", "lidar"])
def test_a_box_arrives_in_base_link(bev_to_ego: torch.Tensor) -> None:
    boxes = conversions.boxes_in_base(perception(bev_to_ego))
    (found,) = conversions.detections(boxes)
    assert found.class_name == DETECTION_CLASSES[3]
    assert found.score == 0.75
    np.testing.assert_allclose(found.position, BOX[0, :3], atol=1e-5)
    np.testing.assert_allclose(found.size, BOX[0, 3:6], atol=1e-5)
    np.testing.assert_allclose(found.velocity, BOX[0, 7:9], atol=1e-5)
    x, y, z, w = found.orientation
    turn = Quaternion(w, x, y, z)
    assert turn.radians * np.sign(turn.axis[2]) == pytest.approx(0.7, abs=1e-5)
    rows = conversions.object_rows(boxes)
    np.testing.assert_allclose(rows[0], [*BOX[0].tolist(), 0.75, 3], atol=1e-5)
    again = conversions.boxes_of_rows(rows)
    torch.testing.assert_close(again.values, BOX.float(), atol=1e-5, rtol=0)
    assert (again.labels.tolist(), again.scores.tolist()) == ([3], [0.75])  # type: ignore[union-attr]
    (front, tip), moves = found.heading, found.arrow
    np.testing.assert_allclose(front, BOX[0, :3], atol=1e-5)
    reach = 4.5 / 2 + 1
    np.testing.assert_allclose(tip[:2], [12 + reach * math.cos(0.7), -4 + reach * math.sin(0.7)], atol=1e-5)
    np.testing.assert_allclose(moves[1], [15.0, 0.0, 0.5], atol=1e-5)


@pytest.mark.parametrize("bev_to_ego", [IDENTITY, LIDAR], ids=["ego", "lidar"])
def test_the_cell_of_the_box_is_occupied(bev_to_ego: torch.Tensor) -> None:
    seen = perception(bev_to_ego)
    assert seen.segmentation is not None
    grid = conversions.occupancy(seen.segmentation[1], HEAD.grid, bev_to_ego)
    assert (grid.width, grid.height, grid.resolution_m) == (80, 80, 0.5)
    # As a reader of nav_msgs/OccupancyGrid finds the cell: into the grid's own frame, divide, row-major.
    (x, y, _), (_, _, qz, qw) = grid.position, grid.orientation
    yaw = 2 * math.atan2(qz, qw)
    across = np.array([12.0 - x, -4.0 - y])
    own = np.array([[math.cos(yaw), math.sin(yaw)], [-math.sin(yaw), math.cos(yaw)]]) @ across
    column, row = (int(v // grid.resolution_m) for v in own)
    flat = grid.cells.reshape(-1)
    assert flat[row * grid.width + column] == 88
    assert int((flat > 0).sum()) == 1
    assert flat.dtype == np.int8


def test_probabilities_stay_within_the_scale_of_occupancy_grids() -> None:
    grid = BEVGrid(0.0, 3.0, 0.0, 1.0, 1, 3)
    cells = conversions.occupancy(torch.tensor([[-0.1, 0.004, 1.2]]), grid, IDENTITY).cells
    assert cells.tolist() == [[0, 0, 100]]
    with pytest.raises(ValueError, match="square cells"):
        conversions.occupancy(torch.zeros(1, 3), BEVGrid(0.0, 6.0, 0.0, 1.0, 1, 3), IDENTITY)


def test_selection_by_score_and_class() -> None:
    boxes = Boxes3D(BOX.repeat(3, 1), torch.tensor([0, 8, 0]), torch.tensor([0.9, 0.5, 0.2]))
    assert conversions.select(boxes, 0.5).labels.tolist() == [0, 8]
    assert conversions.select(boxes, 0.0, ["pedestrian"]).labels.tolist() == [8]
    none = conversions.select(boxes, 1.0)
    assert conversions.detections(none) == []
    assert conversions.object_rows(none).shape == (0, 11)
    assert len(conversions.boxes_of_rows(conversions.object_rows(none))) == 0


def test_one_value_holds_everything_that_is_published() -> None:
    some = perception(LIDAR)
    boxes = replace(some.boxes, values=some.boxes.values.repeat(3, 1), labels=torch.tensor([0, 8, 0]))
    some = replace(some, boxes=replace(boxes, scores=torch.tensor([0.9, 0.2, 0.05])))
    settings = NodeSettings(score_threshold=0.1, marker_threshold=0.3, bev_image_size=64)
    output = conversions.convert(some, HEAD, settings)
    above = conversions.select(conversions.boxes_in_base(some), 0.1)
    assert output.objects is not None
    assert np.array_equal(output.objects, conversions.object_rows(above))
    assert output.detections == conversions.detections(above)
    assert output.markers == conversions.detections(above[:1])
    assert list(output.grids) == ["drivable_area", "vehicle"]
    assert output.picture is not None
    assert np.array_equal(output.picture, bev_picture(some, above[:1], HEAD, 64))
    assert conversions.convert(replace(some, segmentation=None), None, settings).grids == {}


def test_what_nobody_wants_is_not_computed() -> None:
    some, settings = perception(IDENTITY), NodeSettings()
    nothing = conversions.Wanted(False, False, False, False, ())
    assert conversions.convert(some, HEAD, settings, nothing) == conversions.Output()
    for name in ("objects", "detections", "markers", "picture"):
        output = conversions.convert(some, HEAD, settings, replace(nothing, **{name: True}))
        assert [key for key, value in vars(output).items() if value is not None and key != "grids"] == [name]
    one = conversions.convert(some, HEAD, settings, replace(nothing, grids=["vehicle"]))
    assert list(one.grids) == ["vehicle"]
    markers = conversions.convert(some, HEAD, settings, replace(nothing, markers=True)).markers
    assert markers == conversions.convert(some, HEAD, settings).markers


def test_standing_and_unknown_objects_have_no_arrow() -> None:
    for vx, vy in ((0.1, 0.1), (math.nan, 0.0), (math.inf, 0.0)):
        values = BOX.clone()
        values[0, 7], values[0, 8] = vx, vy
        (found,) = conversions.detections(Boxes3D(values, torch.tensor([0]), torch.tensor([1.0])))
        assert found.arrow == ()


@pytest.mark.parametrize("bev_to_ego", [IDENTITY, LIDAR], ids=["ego", "lidar"])
def test_the_picture_shows_the_box_ahead_up_and_left_left(bev_to_ego: torch.Tensor) -> None:
    seen = perception(bev_to_ego)
    boxes = conversions.boxes_in_base(seen)
    with_box = bev_picture(seen, boxes, HEAD, 208).astype(int)
    without = bev_picture(seen, boxes[:0], HEAD, 208).astype(int)
    changed = np.argwhere(np.abs(with_box - without).sum(axis=2) > 30)
    row, column = changed.mean(axis=0)
    # 208 pixels over 104 m: 2 pixels a metre; x = 12 is up, y = -4 is right. The arrow pulls a little.
    assert row == pytest.approx(104 - 24, abs=8)
    assert column == pytest.approx(104 + 8, abs=8)
    colour = np.array(DETECTION_COLOURS[DETECTION_CLASSES[3]])
    assert np.abs(with_box - colour).sum(axis=2).min() < 30


@pytest.mark.parametrize("bev_to_ego", [IDENTITY, LIDAR], ids=["ego", "lidar"])
def test_the_picture_paints_the_ground_where_the_still_picture_does(bev_to_ego: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 2, 8, 8, generator=generator)
    maps = torch.nn.functional.interpolate(coarse, size=(80, 80), mode="bilinear")[0]
    seen = replace(perception(bev_to_ego), segmentation=maps)
    none = conversions.boxes_in_base(seen)[:0]
    quick = bev_picture(seen, none, HEAD, 416).astype(int)
    still = np.full((416, 416, 3), PANEL, dtype=np.uint8)
    view = BEVView(416, 416)
    draw_segmentation(still, view, SegmentationLayers(maps, HEAD.classes, HEAD.grid), bev_to_ego)
    draw_rings(still, view)
    draw_ego(still, view)
    differ = np.abs(quick - still.astype(int)).sum(axis=2) > 60
    assert differ.mean() < 0.03  # the edges of cells
