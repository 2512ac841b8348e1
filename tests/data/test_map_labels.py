"""Rasterisation and BEV labels against shapely, point by point, and the devkit's own map masks."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.map_expansion.map_api import NuScenesMap
from shapely.geometry import LineString, Point, Polygon
from shapely.ops import unary_union
from torch import Tensor

from bevperception.config import AugmentationConfig, ExperimentConfig
from bevperception.config_model import SegmentationConfig
from bevperception.data.dataset import build_dataset
from bevperception.data.map_labels import (
    MOST_MAP_BYTES,
    SegmentationLabels,
    draw_footprints,
    expansion_path,
    load_map,
)
from bevperception.data.nuscenes import NuScenesReader
from bevperception.data.rasterise import polygon_edges, rasterise
from bevperception.data.transforms import BEVDraw
from bevperception.errors import DataError
from bevperception.geometry import BEVGrid, box_corners, planar_pose
from bevperception.structures import Batch
from bevperception.taxonomy import DETECTION_CLASSES, MAP_CLASSES
from tests.fixtures.tiny_map import LINES, POLYGONS
from tests.fixtures.tiny_nuscenes import MAP_WITH_EXPANSION, TRAIN_SPLIT, VERSION, write_tiny_nuscenes

GRID = BEVGrid(-10.0, 12.0, -7.0, 9.0, rows=23, columns=37)
NO_BOXES = torch.zeros((0, 9))
HALF_WIDTH_M = 0.5


def slow_mask(shape: shapely.Geometry, grid: BEVGrid, grid_to_shape: Tensor | None = None) -> np.ndarray:
    """Cells whose centre shapely finds inside, asked one by one."""
    centres = grid.cell_centres().reshape(-1, 2)
    if grid_to_shape is not None:
        points = torch.nn.functional.pad(centres, (0, 1))
        points = torch.nn.functional.pad(points, (0, 1), value=1.0) @ grid_to_shape.T
        centres = points[:, :2]
    inside = [shape.contains(Point(x, y)) for x, y in centres.tolist()]
    return np.array(inside).reshape(grid.rows, grid.columns)


def star(rng: np.random.Generator, centre: tuple[float, float], radius: float, corners: int) -> Polygon:
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
    radii = radius * rng.uniform(0.3, 1.0, corners)
    ring = np.stack((centre[0] + radii * np.cos(angles), centre[1] + radii * np.sin(angles)), -1)
    polygon = Polygon(ring)
    return polygon if polygon.is_valid else polygon.buffer(0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_union_of_polygons_with_holes_is_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    polygons = []
    for _ in range(rng.integers(1, 6)):
        centre = (rng.uniform(-14, 16), rng.uniform(-11, 13))
        outer = star(rng, centre, rng.uniform(2, 12), int(rng.integers(3, 12)))
        hole = star(rng, centre, rng.uniform(0.5, 3), int(rng.integers(3, 8)))
        polygons.append(outer.difference(hole))
    edges = np.concatenate([polygon_edges(p) for p in polygons])
    expected = slow_mask(unary_union(polygons), GRID)
    np.testing.assert_array_equal(rasterise(edges, GRID), expected)
    # Mirrored, every edge runs the other way round.
    mirrored = BEVGrid(-12.0, 10.0, -7.0, 9.0, rows=23, columns=37)
    np.testing.assert_array_equal(rasterise(edges * [-1, 1], mirrored), expected[:, ::-1])


def test_edge_cases_of_polygons() -> None:
    assert not rasterise(np.zeros((0, 2, 2)), GRID).any()
    whole = polygon_edges(shapely.box(-100, -100, 100, 100))
    assert rasterise(whole, GRID).all()
    assert not rasterise(polygon_edges(shapely.box(50, 50, 60, 60)), GRID).any()
    bow_tie = Polygon([(-5.13, -5.07), (5.21, 5.02), (5.11, -4.9), (-5.03, 5.17)])
    np.testing.assert_array_equal(
        rasterise(polygon_edges(bow_tie), GRID), slow_mask(shapely.make_valid(bow_tie), GRID)
    )
    assert polygon_edges(Polygon()).shape == (0, 2, 2)
    # Two squares side by side share an edge through cell centres: no cell is lost or doubled.
    grid = BEVGrid(0.0, 4.0, 0.0, 4.0, 4, 4)
    left, right = shapely.box(0, 0, 1.5, 4), shapely.box(1.5, 0, 4, 4)
    drawn = [rasterise(polygon_edges(p), grid) for p in (left, right)]
    assert (drawn[0] ^ drawn[1]).all()


@pytest.mark.parametrize("cells", [(23, 37), (200, 200)])
def test_footprints_equal_point_in_polygon(cells: tuple[int, int]) -> None:
    grid = BEVGrid(-10.0, 12.0, -7.0, 9.0, *cells)
    generator = torch.Generator().manual_seed(1)
    values = torch.rand((12, 9), generator=generator) * torch.tensor([22, 16, 1, 6, 3, 2, 7, 1, 1])
    values[:, :2] -= torch.tensor([10.0, 7.0])
    values[:, 3:6] += 0.3
    drawn = draw_footprints(values, grid).numpy()
    shapes = [Polygon(corner.tolist()) for corner in box_corners(values.double())[:, :4, :2]]
    np.testing.assert_array_equal(drawn, slow_mask(unary_union(shapes), grid))
    assert not draw_footprints(NO_BOXES, grid).any()


CATEGORIES = (
    *("animal", "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.construction_worker"),
    *("human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.stroller"),
    *("human.pedestrian.wheelchair", "movable_object.barrier", "movable_object.debris"),
    *("movable_object.pushable_pullable", "movable_object.trafficcone", "static_object.bicycle_rack"),
    *("vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid", "vehicle.car", "vehicle.construction"),
    *("vehicle.emergency.ambulance", "vehicle.emergency.police", "vehicle.motorcycle", "vehicle.trailer"),
    "vehicle.truck",
)
"""All 23 of nuScenes."""


@pytest.mark.parametrize("frame", ["ego", "lidar"])
def test_the_vehicle_layer_shows_every_vehicle_and_nothing_else(tiny_nuscenes: Path, frame: str) -> None:
    config = ExperimentConfig()
    config.data = replace(config.data, root=str(tiny_nuscenes), version=VERSION, bev_frame=frame, history=0)
    config.model.segmentation = SegmentationConfig(classes=("vehicle",), range_m=24.0, cell_m=0.75)
    config.augmentation = AugmentationConfig(bev_rotation_deg=80.0, bev_scale=(0.8, 0.9), bev_flip_x=1.0)
    reader = NuScenesReader(config.data)
    dataset = build_dataset(reader, config, TRAIN_SPLIT, training=True)
    token = dataset.tokens[1]
    records = [reader.nusc.get("sample_annotation", t) for t in reader.nusc.get("sample", token)["anns"]]
    own = [record["category_name"] for record in records]
    assert own[0] == "vehicle.car"
    shown: dict[str, Tensor] = {}
    try:
        for name in CATEGORIES:
            for record in records:
                record["category_name"] = "animal"
            records[0]["category_name"] = name
            batch = dataset[1, 3]
            assert isinstance(batch, Batch)
            shown[name] = batch.targets.segmentation[0, 0]
            known = category_to_detection_name(name)
            assert [DETECTION_CLASSES[i] for i in batch.targets.boxes[0].labels] == ([known] if known else [])
    finally:
        for record, name in zip(records, own, strict=True):
            record["category_name"] = name
    # The box of a car is drawn at its augmented place: footprints of other categories are the same.
    assert 4 < shown["vehicle.car"].sum() < 40
    for name, drawn in shown.items():
        expected = shown["vehicle.car"] if name.startswith("vehicle.") else torch.zeros_like(drawn)
        torch.testing.assert_close(drawn, expected, rtol=0, atol=0, msg=name)


def global_shape(name: str) -> shapely.Geometry:
    if name == "divider":
        lines = [LineString(points) for layer in LINES.values() for points in layer]
        return unary_union([line.buffer(HALF_WIDTH_M, quad_segs=8) for line in lines])
    return unary_union([Polygon(exterior, holes) for exterior, holes in POLYGONS[name]])


def poses() -> list[Tensor]:
    tilt = torch.eye(4, dtype=torch.float64)
    tilt[:3, :3] = torch.linalg.matrix_exp(
        torch.tensor([[0, 0, 0.02], [0, 0, -0.015], [-0.02, 0.015, 0]], dtype=torch.float64)
    )
    plain = planar_pose(203.3, 201.7, 2.2) @ tilt
    mirrored = BEVDraw(0.4, 1.07, True, False).matrix()
    return [planar_pose(200.0, 200.0, 0.0), plain, plain @ torch.linalg.inv(mirrored), planar_pose(0, 0, 0)]


@pytest.mark.parametrize("pose", range(4))
def test_map_layers_equal_point_in_polygon(tiny_nuscenes: Path, pose: int) -> None:
    bev_to_global = poses()[pose]
    config = SegmentationConfig(range_m=30.0, cell_m=1.5)
    labels, present = SegmentationLabels(tiny_nuscenes, config, 2 * HALF_WIDTH_M).draw(
        MAP_WITH_EXPANSION, bev_to_global, NO_BOXES
    )
    assert present.all()
    assert labels.shape == (7, 40, 40)
    for name, drawn in zip(config.classes, labels, strict=True):
        if name != "vehicle":
            expected = slow_mask(global_shape(name), config.grid, bev_to_global)
            np.testing.assert_array_equal(drawn.numpy().astype(bool), expected, err_msg=name)
    assert labels[:6].sum() > 0


def test_dividers_have_the_stated_width(tiny_nuscenes: Path) -> None:
    config = SegmentationConfig(classes=("divider",), range_m=20.0, cell_m=0.1)
    lines = unary_union([LineString(points) for layer in LINES.values() for points in layer])
    bev_to_global = planar_pose(200.0, 200.0, 0.3)
    for width in (0.4, 2.0):
        labels, _ = SegmentationLabels(tiny_nuscenes, config, width).draw(
            MAP_WITH_EXPANSION, bev_to_global, NO_BOXES
        )
        cells = torch.nonzero(labels[0] != labels[0].roll(1, 0))
        assert len(cells) > 20
        centres = config.grid.cell_centres()[cells[:, 0].clamp(1, 398), cells[:, 1]]
        points = torch.nn.functional.pad(torch.nn.functional.pad(centres, (0, 1)), (0, 1), value=1.0)
        there = (points @ bev_to_global.T)[:, :2]
        distances = np.array([lines.distance(Point(x, y)) for x, y in there.tolist()])
        inner = (cells[:, 0] > 0).numpy()
        assert np.abs(distances[inner] - width / 2).max() < 0.15, (
            "where the label changes, the border is near"
        )


def test_agrees_with_the_devkits_map_mask(tiny_nuscenes: Path) -> None:
    # The devkit rounds corners to cells and draws polygons with their outline: borders differ, no more.
    yaw, x, y = 0.5, 201.0, 203.0
    config = SegmentationConfig(classes=("drivable_area", "walkway", "carpark_area", "ped_crossing"))
    labels, _ = SegmentationLabels(tiny_nuscenes, config, 1.0).draw(
        MAP_WITH_EXPANSION, planar_pose(x, y, yaw), NO_BOXES
    )
    masks = NuScenesMap(str(tiny_nuscenes), MAP_WITH_EXPANSION).get_map_mask(
        (x, y, 100.0, 100.0), math.degrees(yaw), list(config.classes), (200, 200)
    )
    for index, name in enumerate(config.classes):
        drawn, mask = labels[index].numpy().astype(bool), masks[index].astype(bool)
        iou = (drawn & mask).sum() / (drawn | mask).sum()
        assert iou > (0.97 if name == "drivable_area" else 0.75), (name, iou)
        border = global_shape(name).boundary
        for row, column in np.argwhere(drawn != mask):
            point = planar_pose(x, y, yaw) @ torch.tensor(
                [*config.grid.cell_centres()[row, column].tolist(), 0.0, 1.0], dtype=torch.float64
            )
            assert border.distance(Point(point[:2].tolist())) < 0.9


def test_no_expansion_means_no_map_labels(tiny_nuscenes: Path) -> None:
    config = SegmentationConfig(classes=("vehicle", "walkway"))
    labels = SegmentationLabels(tiny_nuscenes, config, 1.0)
    labels.preload(["boston-seaport", MAP_WITH_EXPANSION])
    box = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0, 0, 0]])
    maps, present = labels.draw("boston-seaport", planar_pose(0, 0, 0), box)
    assert present.tolist() == [True, False]
    assert maps[0].sum() == 4 * 2 / 0.25
    assert maps[1].sum() == 0


@pytest.mark.parametrize("damage", ["truncated", "incomplete", "outdated", "dangling", "no list", "text"])
def test_damaged_expansion(tmp_path: Path, damage: str) -> None:
    root = write_tiny_nuscenes(tmp_path)
    path = expansion_path(root, MAP_WITH_EXPANSION)
    content = json.loads(path.read_text())
    if damage == "truncated":
        path.write_text(path.read_text()[:-50])
    else:
        if damage == "incomplete":
            del content["walkway"]
        elif damage == "outdated":
            content["version"] = "1.2"
        elif damage == "no list":
            content["walkway"] = {}
        elif damage == "text":
            content["node"][0]["x"] = str(content["node"][0]["x"])
        else:
            content["node"] = content["node"][1:]
        path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"singapore-onenorth\.json .*version 1\.3"):
        load_map(root, MAP_WITH_EXPANSION, 1.0)


@pytest.mark.parametrize(
    ("kind", "message"), [("folder", "it is a folder"), ("pipe", "pipe"), ("large", "bytes")]
)
def test_maps_are_regular_files_of_bounded_size(tmp_path: Path, kind: str, message: str) -> None:
    root = write_tiny_nuscenes(tmp_path)
    path = expansion_path(root, MAP_WITH_EXPANSION)
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.touch()
        os.truncate(path, MOST_MAP_BYTES + 1)
    with pytest.raises(DataError, match=rf"cannot read map expansion .*onenorth\.json: .*{message}"):
        load_map(root, MAP_WITH_EXPANSION, 1.0)


def test_an_unknown_place_is_named(tmp_path: Path) -> None:
    root = write_tiny_nuscenes(tmp_path)
    path = expansion_path(root, MAP_WITH_EXPANSION)
    path.rename(path.with_name("atlantis.json"))
    with pytest.raises(DataError, match=r"atlantis\.json cannot be used"):
        load_map(root, "atlantis", 1.0)


def test_every_map_class_has_layers(tiny_nuscenes: Path) -> None:
    layers = load_map(tiny_nuscenes, MAP_WITH_EXPANSION, 1.0)
    assert layers is not None
    assert set(layers) == set(MAP_CLASSES)
    assert [len(layers[name].edges) for name in MAP_CLASSES] == [3, 1, 2, 1, 1, 3]
