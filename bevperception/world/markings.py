"""Road markings of a town and its map: dividers, crossings, stop lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bevperception.world.roads import (
    CROSSING_M,
    MARKING_END_M,
    STOP_LINE_M,
    Lane,
    Road,
    Town,
)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Crossing:
    """A pedestrian crossing over one arm of a crossing.

    Attributes:
        node, arm, road: where.
        outline: (n, 2) counter-clockwise.
        stripes: outlines of the white stripes.
        walk: (2, 2) the way across, from kerb to kerb.
    """

    node: int
    arm: int
    road: int
    outline: Array
    stripes: list[Array]
    walk: Array


@dataclass(frozen=True)
class StopLine:
    """A stop line across the lanes that arrive at a crossing."""

    node: int
    arm: int
    outline: Array


@lru_cache(maxsize=4)
def crossings(town: Town) -> tuple[Crossing, ...]:
    """All pedestrian crossings of a town: one over every arm of every crossing."""
    result = []
    for road in town.roads:
        for end in (0, 1):
            node = town.nodes[road.ends[end]]
            if node.is_crossing:
                result.append(_crossing(road, end, node.index))
    return tuple(result)


def _crossing(road: Road, end: int, node: int) -> Crossing:
    near, far = _from_end(road, end, *CROSSING_M)
    half = road.half_width_m
    outline = road.centre.strip(-half, half, near, far, 1.0)
    edges = np.arange(-half + 0.35, half - 0.5, 1.0)
    stripes = [road.centre.strip(left, left + 0.5, near + 0.1, far - 0.1, 2.0) for left in edges]
    middle = (near + far) / 2
    walk = road.centre.beside(np.array([middle, middle]), np.array([-half, half]))
    return Crossing(node, road.arms[end], road.index, outline, stripes, walk)


@lru_cache(maxsize=4)
def stop_lines(town: Town) -> tuple[StopLine, ...]:
    """All stop lines of a town: before every crossing, over the arriving lanes."""
    result = []
    for road in town.roads:
        for end in (0, 1):
            node = town.nodes[road.ends[end]]
            if node.is_crossing:
                near, far = _from_end(road, end, *STOP_LINE_M)
                # Lanes arrive at the line's start on its left and at its end on its right.
                sides = (0.15, road.carriageway_m) if end == 0 else (-road.carriageway_m, -0.15)
                outline = road.centre.strip(*sides, near, far, 1.0)
                result.append(StopLine(node.index, road.arms[end], outline))
    return tuple(result)


def _from_end(road: Road, end: int, near: float, far: float) -> tuple[float, float]:
    return (near, far) if end == 0 else (road.centre.length - far, road.centre.length - near)


def marked_stretch(town: Town, road: Road) -> tuple[float, float]:
    """Start and end, along the centre line, of a road's dividers."""
    ends = [MARKING_END_M if town.nodes[node].is_crossing else 0.0 for node in road.ends]
    return ends[0], road.centre.length - ends[1]


def road_divider(town: Town, road: Road) -> Array:
    """(n, 2) the line between the two directions of travel."""
    return _line(road, 0.0, *marked_stretch(town, road))


def lane_dividers(town: Town, road: Road) -> Iterator[Array]:
    """(n, 2) the lines between lanes of the same direction."""
    for place in range(1, road.lanes):
        for side in (-1, 1):
            yield _line(road, side * place * road.lane_m, *marked_stretch(town, road))


def edge_lines(town: Town, road: Road) -> Iterator[Array]:
    """(n, 2) the painted lines between lanes and parking strips, which no map layer holds."""
    for side in (-1, 1):
        yield _line(road, side * road.carriageway_m, *marked_stretch(town, road))


def _line(road: Road, left_m: float, start: float, stop: float) -> Array:
    count = max(2, int(np.ceil((stop - start) / 2.0)) + 1)
    return road.centre.beside(np.linspace(start, stop, count), left_m)


def lane_outline(lane: Lane, width_m: float) -> Array:
    """(n, 2) a lane's area, counter-clockwise."""
    return lane.path.strip(-width_m / 2, width_m / 2, 0.0, lane.path.length, 2.0)


def parking_bays(road: Road) -> list[tuple[Array, float]]:
    """Places in a car park: (2,) centre and the heading of a car that backed in, in two rows."""
    if road.car_park is None:
        return []
    side, start, stop, depth = road.car_park
    near = road.half_width_m + road.walkway_m + 0.6
    bays = []
    middle = (start + stop) / 2
    for s in np.arange(start + 1.6, stop - 1.2, 2.75):
        yaw = float(road.centre.yaw(s))
        for row, distance in ((1, near + depth - 2.8), (0, near + 2.8)):
            if row == 0 and abs(s - middle) < 4.6:
                continue  # the drive
            heading = yaw + side * np.pi / 2 * (1 if row == 0 else -1)
            bays.append((road.centre.beside(s, side * distance), heading))
    return bays
