"""Lay out a town's roads: a jittered grid of crossings, curved roads between them, connected lanes.

Traffic keeps to the right. The cross-section of a road, from its centre outwards on each side: one or two
lanes, a parking strip, the kerb, a walkway. Beside some roads lies a car park.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import MultiPoint, MultiPolygon, Polygon

from bevperception.world.areas import area, one_polygon
from bevperception.world.paths import Path, hermite
from bevperception.world.seeds import generator
from bevperception.world.settings import LOCATIONS

Array = NDArray[np.float64]

COLUMNS, ROWS = 6, 5
SPACING_M = 125.0
MARGIN_M = 130.0
PARKING_M = 2.9
CORNER_M = 5.5
"""How far a road ends before the edge of the widest road that it meets."""
CROSSING_M = (1.0, 4.6)
STOP_LINE_M = (5.4, 6.1)
MARKING_END_M = 6.1
"""Distances from a road's end: of the pedestrian crossing, the stop line and where lane markings end."""
STOP_M = 6.8
"""Where the front of a waiting car stands, from the road's end."""


@dataclass(frozen=True)
class Road:
    """A road between two crossings.

    Attributes:
        index: in the town.
        ends: nodes at the start and the end of the centre line.
        arms: which arm (quarter turn) of each node it is.
        centre: line from the first node to the second.
        lanes: to each side.
        lane_m, walkway_m: widths.
        car_park: (side, start, stop, depth): +1 left or -1 right, along the centre line; or None.
    """

    index: int
    ends: tuple[int, int]
    arms: tuple[int, int]
    centre: Path
    lanes: int
    lane_m: float
    walkway_m: float
    car_park: tuple[int, float, float, float] | None

    @property
    def carriageway_m(self) -> float:
        """Half the width of the lanes together."""
        return self.lanes * self.lane_m

    @property
    def half_width_m(self) -> float:
        """From the centre line to the kerb."""
        return self.carriageway_m + PARKING_M


@dataclass(frozen=True)
class Lane:
    """A lane in its direction of travel.

    Attributes:
        index: in the town.
        road: its road's index.
        forward: whether it runs with the road's centre line.
        place: 0 next to the centre line.
        path: its middle.
        start_node, end_node: where it comes from and goes to.
        end_arm: the arm of ``end_node`` that it arrives by.
    """

    index: int
    road: int
    forward: bool
    place: int
    path: Path
    start_node: int
    end_node: int
    end_arm: int


@dataclass(frozen=True)
class Connector:
    """A way through a crossing, from one lane to another."""

    index: int
    start_lane: int
    end_lane: int
    node: int
    path: Path


@dataclass
class Node:
    """A crossing, or a bend where only two roads meet.

    Attributes:
        index: in the town.
        position: (2,).
        yaw: direction of arm 0.
        roads: road index by arm.
        area: drivable polygon.
    """

    index: int
    position: Array
    yaw: float
    roads: dict[int, int] = field(default_factory=dict)
    area: Polygon = field(default_factory=Polygon)

    @property
    def is_crossing(self) -> bool:
        """Whether ways cross here, so that cars stop and people cross."""
        return len(self.roads) > 2


@dataclass(eq=False)
class Town:
    """The roads of one map.

    Attributes:
        location: the devkit's name of the map.
        canvas_m: (width, height); everything lies between 0 and these.
    """

    location: str
    canvas_m: tuple[float, float]
    nodes: list[Node]
    roads: list[Road]
    lanes: list[Lane]
    connectors: list[Connector]

    @cached_property
    def next_connectors(self) -> dict[int, list[int]]:
        """Connectors that leave each lane."""
        out: dict[int, list[int]] = {lane.index: [] for lane in self.lanes}
        for connector in self.connectors:
            out[connector.start_lane].append(connector.index)
        return out

    @cached_property
    def drivable(self) -> Polygon | MultiPolygon:
        """The union of roads, crossings and the drives of car parks."""
        strips = [area(road_outline(road)) for road in self.roads]
        drives = [area(drive) for road in self.roads if (drive := drive_outline(road)) is not None]
        return shapely.unary_union([*strips, *(node.area for node in self.nodes), *drives])

    @cached_property
    def walkways(self) -> list[Polygon]:
        """Walkways along all kerbs, without the drives."""
        paved = shapely.unary_union(
            [area(road_outline(road)) for road in self.roads] + [node.area for node in self.nodes]
        )
        bands = [
            area(r.centre.strip(-half, half, -CORNER_M, r.centre.length + CORNER_M, 2.0)).buffer(0)
            for r in self.roads
            for half in [r.half_width_m + r.walkway_m]
        ]
        corners = [node.area.buffer(3.0, quad_segs=4) for node in self.nodes]
        around = shapely.unary_union([*bands, *corners]).difference(paved).difference(self.drivable)
        parts = shapely.get_parts(around.simplify(0.03))
        return [part for part in parts if part.area > 3.0]

    @cached_property
    def car_parks(self) -> list[Polygon]:
        """The places for parking beside roads."""
        outlines = [car_park_outline(road) for road in self.roads]
        return [area(outline) for outline in outlines if outline is not None]


def road_outline(road: Road) -> Array:
    """(n, 2) kerb to kerb."""
    half = road.half_width_m
    return road.centre.strip(-half, half, 0.0, road.centre.length, 2.0)


def car_park_outline(road: Road) -> Array | None:
    """(n, 2) the car park beside a road; None where there is none."""
    if road.car_park is None:
        return None
    side, start, stop, depth = road.car_park
    near = side * (road.half_width_m + road.walkway_m + 0.6)
    far = near + side * depth
    return road.centre.strip(min(near, far), max(near, far), start, stop, 2.0)


def drive_outline(road: Road) -> Array | None:
    """(n, 2) the drive over the walkway to a car park; None where there is none."""
    if road.car_park is None:
        return None
    side, start, stop, _ = road.car_park
    middle, near = (start + stop) / 2, side * (road.half_width_m - 0.2)
    far = near + side * (road.walkway_m + 1.2)
    return road.centre.strip(min(near, far), max(near, far), middle - 3.0, middle + 3.0, 2.0)


def build_town(seed: int, location: str) -> Town:
    """The roads of one location; they depend on the seed and the location alone.

    Args:
        seed: of the world.
        location: one of ``settings.LOCATIONS``.
    """
    town = lay_out_roads(seed, location)
    nodes, roads = town.nodes, town.roads
    town.lanes = _lanes(roads)
    town.connectors = _connectors(nodes, roads, town.lanes)
    for node in nodes:
        node.area = _node_area(node, roads, town.connectors)
    return town


def lay_out_roads(seed: int, location: str) -> Town:
    """A town's nodes and roads, as yet without lanes, connectors and the areas of the nodes."""
    rng = generator(seed, "town", LOCATIONS.index(location))
    canvas = (2 * MARGIN_M + (COLUMNS - 1) * SPACING_M, 2 * MARGIN_M + (ROWS - 1) * SPACING_M)
    nodes = _nodes(rng)
    edges = _edges(rng)
    lane_m = float(rng.uniform(3.4, 3.7))
    widths = [int(rng.integers(1, 3)) for _ in edges]
    for index, (a, b, arm) in enumerate(edges):
        nodes[a].roads[arm] = index
        nodes[b].roads[(arm + 2) % 4] = index
    reach = [max(widths[r] for r in node.roads.values()) * lane_m + PARKING_M + CORNER_M for node in nodes]
    roads = [
        _road(rng, index, nodes[a], nodes[b], arm, (reach[a], reach[b]), widths[index], lane_m)
        for index, (a, b, arm) in enumerate(edges)
    ]
    return Town(location, canvas, nodes, roads, lanes=[], connectors=[])


def _nodes(rng: np.random.Generator) -> list[Node]:
    nodes: list[Node] = []
    for row in range(ROWS):
        for column in range(COLUMNS):
            place = np.array([column, row]) * SPACING_M + MARGIN_M + rng.uniform(-14.0, 14.0, 2)
            nodes.append(Node(len(nodes), place, float(rng.uniform(-0.22, 0.22))))
    return nodes


def _edges(rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """(first node, second node, arm of the first): a grid of which some roads are left out."""
    edges = []
    for row in range(ROWS):
        for column in range(COLUMNS):
            here = row * COLUMNS + column
            if column + 1 < COLUMNS:
                edges.append((here, here + 1, 0))
            if row + 1 < ROWS:
                edges.append((here, here + COLUMNS, 1))
    for index in rng.permutation(len(edges))[: len(edges) // 3].tolist():
        left = [edge for k, edge in enumerate(edges) if k != index and edge is not None]
        degree = np.bincount([n for edge in left for n in edge[:2]], minlength=ROWS * COLUMNS)
        if degree.min() >= 2 and rng.random() < 0.6 and _connected(left):
            edges[index] = None  # type: ignore[call-overload]
    return [edge for edge in edges if edge is not None]


def _connected(edges: list[tuple[int, int, int]]) -> bool:
    reached, grown = {0}, True
    while grown:
        grown = False
        for a, b, _ in edges:
            if (a in reached) != (b in reached):
                reached |= {a, b}
                grown = True
    return len(reached) == ROWS * COLUMNS


def _road(
    rng: np.random.Generator,
    index: int,
    a: Node,
    b: Node,
    arm: int,
    reach: tuple[float, float],
    lanes: int,
    lane_m: float,
) -> Road:
    out_a, out_b = _direction(a, arm), _direction(b, arm + 2)
    start, end = a.position + out_a * reach[0], b.position + out_b * reach[1]
    chord = float(np.linalg.norm(end - start))
    points = hermite(start, out_a * chord, end, -out_b * chord, 0.25)
    bow = float(rng.uniform(-9.0, 9.0)) * float(rng.random() < 0.6)
    centre = Path(points)
    points = centre.beside(centre.s, bow * np.sin(np.pi * centre.s / centre.length) ** 2)
    fine = Path(points)
    centre = Path(fine.at(np.linspace(0.0, fine.length, int(np.ceil(fine.length)) + 1)))
    walkway = float(rng.uniform(2.6, 4.0))
    car_park = None
    if rng.random() < 0.6:
        middle, half = centre.length / 2 + float(rng.uniform(-6, 6)), float(rng.uniform(11.0, 15.0))
        car_park = (int(rng.choice([-1, 1])), middle - half, middle + half, float(rng.uniform(15.0, 17.5)))
    return Road(index, (a.index, b.index), (arm, (arm + 2) % 4), centre, lanes, lane_m, walkway, car_park)


def _direction(node: Node, arm: int) -> Array:
    angle = node.yaw + arm * np.pi / 2
    return np.array([np.cos(angle), np.sin(angle)])


def _lanes(roads: list[Road]) -> list[Lane]:
    lanes: list[Lane] = []
    for road in roads:
        for forward in (True, False):
            line = road.centre if forward else road.centre.reversed()
            start, end = road.ends if forward else road.ends[::-1]
            for place in range(road.lanes):
                path = line.offset(-(place + 0.5) * road.lane_m)
                end_arm = road.arms[1] if forward else road.arms[0]
                lanes.append(Lane(len(lanes), road.index, forward, place, path, start, end, end_arm))
    return lanes


def _connectors(nodes: list[Node], roads: list[Road], lanes: list[Lane]) -> list[Connector]:
    connectors: list[Connector] = []
    for node in nodes:
        for lane in (lane for lane in lanes if lane.end_node == node.index):
            for end in _ways_on(node, roads, lanes, lane):
                points = _connecting_curve(lane.path, lanes[end].path)
                connectors.append(Connector(len(connectors), lane.index, end, node.index, Path(points)))
    return connectors


def _ways_on(node: Node, roads: list[Road], lanes: list[Lane], lane: Lane) -> list[int]:
    """Lanes that a lane leads to: straight on, right from the rightmost lane, left from the leftmost."""
    ways, others = [], []
    for arm in sorted(node.roads):
        turn = (arm - lane.end_arm) % 4  # 1 right, 2 straight on, 3 left
        if turn == 0:
            continue
        leaving = [
            other for other in lanes if other.road == node.roads[arm] and other.start_node == node.index
        ]
        last = len(leaving) - 1
        others.append(leaving[min(lane.place, last)].index)
        count = roads[lane.road].lanes
        if turn == 2 and lane.place <= last:
            ways.append(leaving[lane.place].index)
        elif turn == 1 and lane.place == count - 1:
            ways.append(leaving[last].index)
        elif turn == 3 and lane.place == 0:
            ways.append(leaving[0].index)
    return ways or others


def _connecting_curve(start: Path, end: Path) -> Array:
    a, b = start.points[-1], end.points[0]
    yaw_a, yaw_b = float(start.yaw(start.length)), float(end.yaw(0.0))
    chord = float(np.linalg.norm(b - a))
    turn = abs((yaw_b - yaw_a + np.pi) % (2 * np.pi) - np.pi)
    pull = chord * (1.0 + 0.35 * turn / (np.pi / 2))
    return hermite(
        a,
        pull * np.array([np.cos(yaw_a), np.sin(yaw_a)]),
        b,
        pull * np.array([np.cos(yaw_b), np.sin(yaw_b)]),
        0.5,
    )


def _node_area(node: Node, roads: list[Road], connectors: list[Connector]) -> Polygon:
    corners: list[Array] = []
    lane_m = roads[0].lane_m  # the same in the whole town
    for road_index in node.roads.values():
        road = roads[road_index]
        ends = [s for end, s in zip(road.ends, (0.0, road.centre.length), strict=True) if end == node.index]
        for s in ends:
            corners.extend(road.centre.beside(s, side * road.half_width_m) for side in (-1, 1))
    ways = [
        shapely.LineString(c.path.points).buffer(lane_m / 2 + 1.0, quad_segs=4)
        for c in connectors
        if c.node == node.index
    ]
    hull = MultiPoint(np.array(corners)).convex_hull
    rounded = shapely.unary_union([hull, *ways]).buffer(1.5, quad_segs=4).buffer(-1.5, quad_segs=4)
    return Polygon(one_polygon(rounded.simplify(0.05)).exterior)
