"""Write a town as a NuScenesMap expansion, version 1.3, and as the picture that the map table names."""

from __future__ import annotations

from typing import Any, Final

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import Polygon
from shapely.geometry.polygon import orient

from bevperception.world import markings
from bevperception.world.areas import area, one_polygon
from bevperception.world.paths import Path
from bevperception.world.roads import Road, Town, drive_outline, road_outline
from bevperception.world.seeds import token

Array = NDArray[np.float64]
Record = dict[str, Any]

MAP_IMAGE_M: Final = 0.1
"""Metres a pixel of the map picture, as the devkit expects."""
LAYERS: Final = (
    *("polygon", "line", "node", "drivable_area", "road_segment", "road_block", "lane", "ped_crossing"),
    *("walkway", "stop_line", "carpark_area", "road_divider", "lane_divider", "traffic_light"),
    "lane_connector",
)


class _Writer:
    """Collects records; tokens come from the seed, the location, the layer and the number."""

    def __init__(self, seed: int, town: Town) -> None:
        self._seed, self._town = seed, town
        self.content: dict[str, Any] = {layer: [] for layer in LAYERS}

    def token(self, layer: str, number: int) -> str:
        return token(self._seed, f"map {layer}", self._town.location, number)

    def add(self, layer: str, **fields: Any) -> str:
        name = self.token(layer, len(self.content[layer]))
        self.content[layer].append({"token": name, **fields})
        return name

    def nodes(self, points: Array) -> list[str]:
        return [self.add("node", x=round(float(x), 3), y=round(float(y), 3)) for x, y in points]

    def polygon(self, shape: Polygon | Array) -> str:
        polygon = orient(shape if isinstance(shape, Polygon) else area(shape), 1.0)
        exterior = self.nodes(np.asarray(polygon.exterior.coords)[:-1])
        holes = [{"node_tokens": self.nodes(np.asarray(r.coords)[:-1])} for r in polygon.interiors]
        return self.add("polygon", exterior_node_tokens=exterior, holes=holes)

    def line(self, points: Array) -> str:
        return self.add("line", node_tokens=self.nodes(points))


def map_expansion(town: Town, seed: int) -> Record:
    """The content of ``maps/expansion/{location}.json``.

    Args:
        town: whose roads are written.
        seed: of the world, which the tokens depend on.
    """
    writer = _Writer(seed, town)
    _add_roads(writer, town)
    _add_lanes(writer, town)
    crossing_tokens = {
        (c.node, c.arm): writer.add(
            "ped_crossing",
            polygon_token=writer.polygon(c.outline),
            road_segment_token=writer.token("road_segment", c.road),
        )
        for c in markings.crossings(town)
    }
    for line in markings.stop_lines(town):
        writer.add(
            "stop_line",
            polygon_token=writer.polygon(line.outline),
            stop_line_type="PED_CROSSING",
            ped_crossing_tokens=[crossing_tokens[line.node, line.arm]],
            traffic_light_tokens=[],
            road_block_token="",
        )
    for walkway in town.walkways:
        writer.add("walkway", polygon_token=writer.polygon(walkway))
    for car_park in town.car_parks:
        writer.add(
            "carpark_area", polygon_token=writer.polygon(car_park), orientation=0.0, road_block_token=""
        )
    content = writer.content
    content |= _lane_graph(writer, town)
    return {"version": "1.3", "canvas_edge": list(town.canvas_m), **content}


def _add_roads(writer: _Writer, town: Town) -> None:
    for road in town.roads:
        outline = road_outline(road)
        writer.add("drivable_area", polygon_tokens=[writer.polygon(outline)])
        segment = writer.add(
            "road_segment",
            polygon_token=writer.polygon(outline),
            is_intersection=False,
            drivable_area_token="",
        )
        for forward in (True, False):
            half = road.half_width_m
            sides = (-half, 0.0) if forward else (0.0, half)
            writer.add(
                "road_block",
                polygon_token=writer.polygon(road.centre.strip(*sides, 0.0, road.centre.length, 2.0)),
                from_edge_line_token=_cross_line(writer, road, 0.0 if forward else road.centre.length),
                to_edge_line_token=_cross_line(writer, road, road.centre.length if forward else 0.0),
                road_segment_token=segment,
            )
        writer.add(
            "road_divider",
            line_token=writer.line(markings.road_divider(town, road)),
            road_segment_token=segment,
        )
        for line in markings.lane_dividers(town, road):
            writer.add("lane_divider", line_token=writer.line(line), lane_divider_segments=[])
    for node in town.nodes:
        polygon = writer.polygon(node.area)
        writer.add("drivable_area", polygon_tokens=[polygon])
        writer.add("road_segment", polygon_token=polygon, is_intersection=True, drivable_area_token="")
    for road in town.roads:
        drive = drive_outline(road)
        if drive is not None:
            writer.add("drivable_area", polygon_tokens=[writer.polygon(drive)])


def _cross_line(writer: _Writer, road: Road, s: float) -> str:
    half = road.half_width_m
    return writer.line(road.centre.beside(np.array([s, s]), np.array([-half, half])))


def _add_lanes(writer: _Writer, town: Town) -> None:
    for lane in town.lanes:
        width = town.roads[lane.road].lane_m
        ends = [
            lane.path.beside(np.array([s, s]), np.array([-1, 1]) * width / 2) for s in (0.0, lane.path.length)
        ]
        writer.add(
            "lane",
            polygon_token=writer.polygon(markings.lane_outline(lane, width)),
            lane_type="CAR",
            from_edge_line_token=writer.line(ends[0]),
            to_edge_line_token=writer.line(ends[1]),
            left_lane_divider_segments=_divider_segments(writer, lane.path, width / 2, lane.place == 0),
            right_lane_divider_segments=_divider_segments(writer, lane.path, -width / 2, False),
        )
    for connector in town.connectors:
        outline = connector.path.strip(-1.5, 1.5, 0.0, connector.path.length, 2.0)
        writer.add("lane_connector", polygon_token=writer.polygon(one_polygon(Polygon(outline).buffer(0))))


def _divider_segments(writer: _Writer, path: Path, left_m: float, centre: bool) -> list[Record]:
    kind = "DOUBLE_SOLID_YELLOW" if centre else "SINGLE_SOLID_WHITE"
    points = path.beside(np.linspace(0.0, path.length, 6), left_m)
    return [{"node_token": node, "segment_type": kind} for node in writer.nodes(points)]


def _lane_graph(writer: _Writer, town: Town) -> Record:
    lane_names = [writer.token("lane", lane.index) for lane in town.lanes]
    connector_names = [writer.token("lane_connector", c.index) for c in town.connectors]
    paths = {lane_names[lane.index]: arcline_path(lane.path) for lane in town.lanes}
    paths |= {connector_names[c.index]: arcline_path(c.path) for c in town.connectors}
    links: dict[str, Record] = {name: {"incoming": [], "outgoing": []} for name in paths}
    for connector in town.connectors:
        name = connector_names[connector.index]
        start, end = lane_names[connector.start_lane], lane_names[connector.end_lane]
        links[name] = {"incoming": [start], "outgoing": [end]}
        links[start]["outgoing"].append(name)
        links[end]["incoming"].append(name)
    return {"arcline_path_3": paths, "connectivity": links}


def arcline_path(path: Path) -> list[Record]:
    """A line in the devkit's code of arcs and straights: here straight pieces of some 5 metres."""
    count = max(1, round(path.length / 5.0))
    points = path.at(np.linspace(0.0, path.length, count + 1))
    pieces = []
    for (x0, y0), (x1, y1) in zip(points[:-1].tolist(), points[1:].tolist(), strict=True):
        yaw = float(np.arctan2(y1 - y0, x1 - x0))
        pieces.append(
            {
                "start_pose": [round(x0, 3), round(y0, 3), round(yaw, 5)],
                "end_pose": [round(x1, 3), round(y1, 3), round(yaw, 5)],
                "shape": "LSL",
                "radius": 1000.0,
                "segment_length": [0.0, round(float(np.hypot(x1 - x0, y1 - y0)), 4), 0.0],
            }
        )
    return pieces


def map_image(town: Town) -> NDArray[np.uint8]:
    """(height, width) picture of the drivable area and the walkways, 255 inside, north up."""
    width, height = (round(edge / MAP_IMAGE_M) for edge in town.canvas_m)
    image = np.zeros((height, width), dtype=np.uint8)
    for polygon in (*shapely.get_parts(town.drivable), *town.walkways):
        rings = [polygon.exterior, *polygon.interiors]
        points = [
            np.round(np.asarray(ring.coords) / MAP_IMAGE_M * [1, -1] + [0, height]).astype(np.int32)
            for ring in rings
        ]
        cv2.fillPoly(image, points, (255,))
    return image
