"""Towns: every seed gives one, with valid polygons that can be united, in the map and on the ground."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from shapely.geometry import MultiPolygon, Polygon

from bevperception.world.areas import area, one_polygon
from bevperception.world.expansion import map_expansion
from bevperception.world.paths import Path
from bevperception.world.roads import (
    Road,
    Town,
    build_town,
    car_park_outline,
    drive_outline,
    lay_out_roads,
)
from bevperception.world.scenery import furnish_town
from bevperception.world.settings import LOCATIONS

FOLDED = (5, "boston-seaport", 15)
"""Seed, location and road of a car park that reaches beyond the centre of its road's bend."""
TOWNS = list(itertools.product(range(50), LOCATIONS))


def areas_beside(road: Road) -> list[Polygon]:
    return [area(o) for o in (drive_outline(road), car_park_outline(road)) if o is not None]


def check_town(town: Town, seed: int) -> None:
    """Everything that is united, and what comes of it."""
    assert town.drivable.geom_type == "Polygon"
    assert town.drivable.is_valid
    for shape in (*town.walkways, *town.car_parks, *(node.area for node in town.nodes)):
        assert shape.geom_type == "Polygon"
        assert shape.is_valid
        assert shape.area > 3.0
    width, height = town.canvas_m
    assert shapely.box(0.0, 0.0, width, height).contains(shapely.union_all([town.drivable, *town.walkways]))
    assert len(furnish_town(town, seed)) > 500


def test_a_car_park_on_the_inside_of_a_sharp_bend_is_made_valid() -> None:
    seed, location, number = FOLDED
    town = build_town(seed, location)
    outline = car_park_outline(town.roads[number])
    assert outline is not None
    assert not Polygon(outline).is_valid, "this seed no longer shows the case"
    check_town(town, seed)
    repaired = town.car_parks[[r.index for r in town.roads if r.car_park is not None].index(number)]
    assert repaired.area > 0.9 * shapely.make_valid(Polygon(outline)).area
    content = map_expansion(town, seed)
    places = {node["token"]: (node["x"], node["y"]) for node in content["node"]}
    shapes = {p["token"]: [places[token] for token in p["exterior_node_tokens"]] for p in content["polygon"]}
    # Nodes are rounded to millimetres, which may fold an edge of that size anew, but no larger one.
    for layer in ("carpark_area", "walkway", "lane", "lane_connector", "road_block", "ped_crossing"):
        for record in content[layer]:
            written = Polygon(shapes[record["polygon_token"]])
            assert written.buffer(0.01).buffer(-0.01).area > 0.95 * written.area > 0.0, layer


def test_car_parks_of_200_towns_can_be_united() -> None:
    for seed, location in TOWNS:
        for road in lay_out_roads(seed, location).roads:
            shapes = areas_beside(road)
            assert all(shape.is_valid for shape in shapes), (seed, location, road.index)
            assert shapely.union_all(shapes).is_valid, (seed, location, road.index)


def test_a_town_has_areas_and_scenery() -> None:
    check_town(build_town(2**40 + 1, LOCATIONS[3]), 2**40 + 1)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "location"), TOWNS)
def test_200_towns_have_areas_and_scenery(seed: int, location: str) -> None:
    town = build_town(seed, location)
    check_town(town, seed)
    map_expansion(town, seed)


@given(
    bend_m=st.floats(3.0, 60.0),
    turn=st.floats(0.1, 3.0),
    near_m=st.floats(-30.0, 29.0),
    width_m=st.floats(1.0, 30.0),
)
def test_the_area_beside_any_bend_is_one_valid_polygon(
    bend_m: float, turn: float, near_m: float, width_m: float
) -> None:
    angles = np.linspace(0.0, turn, 40)
    line = Path(bend_m * np.stack((np.cos(angles), np.sin(angles)), axis=-1) + angles[:, None])
    outline = line.strip(near_m, near_m + width_m, 0.0, line.length, 2.0)
    shape = area(outline)
    assert shape.geom_type == "Polygon"
    assert shape.is_valid
    assert 0.0 < shape.area <= shapely.make_valid(Polygon(outline)).area * (1 + 1e-9)
    if Polygon(outline).is_valid:
        assert shape.equals_exact(Polygon(outline), 0.0)
    assert shapely.union_all([shape, shape.buffer(1.0), area(outline + 0.5)]).is_valid


def test_of_several_parts_the_largest_stands_for_all() -> None:
    small, large = shapely.box(0, 0, 1, 1), shapely.box(3, 0, 5, 4)
    assert one_polygon(MultiPolygon([small, large])).equals(large)
    assert one_polygon(small) is small
    bow_tie = Polygon([(0, 0), (4, 4), (4, 0), (1, 3)])
    assert one_polygon(bow_tie).equals(Polygon([(2, 2), (4, 4), (4, 0)]))
    with pytest.raises(ValueError, match="without area"):
        one_polygon(Polygon([(0, 0), (1, 1), (2, 2)]))
