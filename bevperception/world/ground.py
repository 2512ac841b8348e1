"""Paint the ground around a scene as a picture from above: asphalt, paint, walkways, grass, house shadows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray

from bevperception.world import markings
from bevperception.world.markings import crossings, stop_lines
from bevperception.world.roads import Town
from bevperception.world.scenery import Prop
from bevperception.world.shadows import shadow_points
from bevperception.world.weather import Weather

Array = NDArray[np.float64]
Picture = NDArray[np.uint8]

SHIFT: Final = 4
LEVELS: Final = 5
MARGIN_M: Final = 62.0
# blue, green, red
ASPHALT, CAR_PARK, WALKWAY, GRASS = (92, 90, 88), (108, 102, 100), (158, 164, 168), (62, 104, 88)
CROSSING_ASPHALT, KERB = (86, 84, 82), (186, 188, 190)
WHITE, YELLOW = (232, 234, 234), (60, 186, 226)


@dataclass(frozen=True)
class Ground:
    """A picture of the ground, in several sizes.

    Attributes:
        levels: (rows, columns, 3) each half as fine as the one before; row 0 lies at the lowest y.
        origin: (2,) global position of the first level's pixel edge (0, 0).
        texel_m: metres a pixel of the first level.
    """

    levels: list[Picture]
    origin: Array
    texel_m: float

    def to_texel(self, level: int) -> Array:
        """(3, 3) global x, y, 1 to pixels of a level, whose centres are whole numbers."""
        size = self.texel_m * 2**level
        x, y = self.origin
        return np.array([[1 / size, 0.0, -x / size - 0.5], [0.0, 1 / size, -y / size - 0.5], [0.0, 0.0, 1.0]])


def paint_ground(
    town: Town,
    props: list[Prop],
    weather: Weather,
    line: Array,
    texel_m: float,
    rng: np.random.Generator,
) -> Ground:
    """Paint the ground around the ego car's way.

    Args:
        town, props: what is there.
        weather: whose light falls on it.
        line: (n, 2) places of the ego car.
        texel_m: metres a pixel.
        rng: of the grain.
    """
    low = np.floor(line.min(axis=0) - MARGIN_M)
    extent = np.ceil((line.max(axis=0) + MARGIN_M - low) / texel_m).astype(int)
    brush = _Brush(np.full((int(extent[1]), int(extent[0]), 3), GRASS, dtype=np.uint8), low, texel_m)
    _paint_surfaces(brush, town)
    _paint_lines(brush, town)
    image = _grain(brush.image, rng)
    image = _cast_shadows(image, brush, props, weather)
    levels = [np.asarray(cv2.transform(image, np.diag(np.clip(weather.ground, 0, 1.2))), dtype=np.uint8)]
    for _ in range(LEVELS - 1):
        height, width = levels[-1].shape[:2]
        size = (max(1, width // 2), max(1, height // 2))
        levels.append(np.asarray(cv2.resize(levels[-1], size, interpolation=cv2.INTER_AREA), dtype=np.uint8))
    return Ground(levels, low, texel_m)


@dataclass
class _Brush:
    image: Picture
    origin: Array
    texel_m: float

    def pixels(self, points: Array) -> NDArray[np.int32]:
        pixels = (points - self.origin) / self.texel_m - 0.5
        return np.asarray(np.round(pixels * (1 << SHIFT)), dtype=np.int32)

    def inside(self, points: Array) -> bool:
        top = self.origin + np.array(self.image.shape[1::-1]) * self.texel_m
        return bool((points.max(axis=0) > self.origin).all() and (points.min(axis=0) < top).all())

    def fill(self, rings: list[Array], colour: tuple[int, int, int]) -> None:
        if self.inside(rings[0]):
            cv2.fillPoly(self.image, [self.pixels(ring) for ring in rings], colour, cv2.LINE_AA, SHIFT)

    def line(self, points: Array, width_m: float, colour: tuple[int, int, int]) -> None:
        step = np.diff(points, axis=0)
        normal = np.stack((-step[:, 1], step[:, 0]), axis=1) / np.linalg.norm(step, axis=1, keepdims=True)
        normal = np.concatenate((normal[:1], normal[:-1] + normal[1:], normal[-1:]))
        normal *= width_m / 2 / np.linalg.norm(normal, axis=1, keepdims=True)
        self.fill([np.concatenate((points + normal, (points - normal)[::-1]))], colour)


def _paint_surfaces(brush: _Brush, town: Town) -> None:
    for walkway in town.walkways:
        brush.fill([np.asarray(r.coords) for r in (walkway.exterior, *walkway.interiors)], WALKWAY)
    for car_park in town.car_parks:
        brush.fill([np.asarray(car_park.exterior.coords)[:-1]], CAR_PARK)
    for part in shapely.get_parts(town.drivable):
        rings = [np.asarray(ring.coords) for ring in (part.exterior, *part.interiors)]
        brush.fill(rings, ASPHALT)
        for ring in rings:
            if brush.inside(ring):
                cv2.polylines(
                    brush.image,
                    [brush.pixels(ring)],
                    True,
                    KERB,
                    max(1, round(0.2 / brush.texel_m)),
                    cv2.LINE_AA,
                    SHIFT,
                )
    for road in town.roads:  # a slightly different surface tells roads from crossings
        half = road.carriageway_m
        brush.fill([road.centre.strip(-half, half, 0.0, road.centre.length, 2.0)], CROSSING_ASPHALT)


def _paint_lines(brush: _Brush, town: Town) -> None:
    for road in town.roads:
        divider = markings.road_divider(town, road)
        if not brush.inside(divider):
            continue
        for aside in (-0.12, 0.12):
            start, stop = markings.marked_stretch(town, road)
            along = np.arange(start, stop, 1.0)
            brush.line(road.centre.beside(along, aside), 0.13, YELLOW)
        for line in markings.edge_lines(town, road):
            brush.line(line, 0.14, WHITE)
        start, stop = markings.marked_stretch(town, road)
        for number in range(1, road.lanes):
            for side in (-1, 1):
                for dash_s in np.arange(start, stop - 2.5, 6.0).tolist():
                    dash = road.centre.beside(
                        np.linspace(dash_s, dash_s + 3.0, 4), side * number * road.lane_m
                    )
                    brush.line(dash, 0.16, WHITE)
    for crossing in crossings(town):
        for stripe in crossing.stripes:
            brush.fill([stripe], WHITE)
    for stop_line in stop_lines(town):
        brush.fill([stop_line.outline], WHITE)
    for road in town.roads:
        for place, yaw in markings.parking_bays(road):
            out, across = np.array([np.cos(yaw), np.sin(yaw)]), np.array([-np.sin(yaw), np.cos(yaw)])
            for aside in (-1.37, 1.37):
                middle = place + across * aside
                brush.line(np.array([middle - out * 2.5, middle + out * 2.5]), 0.12, WHITE)


def _grain(image: Picture, rng: np.random.Generator) -> Picture:
    """Fine and coarse noise, as of worn asphalt and grass."""
    height, width = image.shape[:2]
    fine = rng.normal(0.0, 5.0, (512, 512))
    coarse = cv2.resize(rng.normal(0.0, 7.0, (24, 24)), (512, 512), interpolation=cv2.INTER_CUBIC)
    tile = np.clip(fine + coarse + 128.0, 0, 255).astype(np.uint8)
    cover = np.tile(tile, (height // 512 + 1, width // 512 + 1))[:height, :width]
    grain = cv2.merge([cover, cover, cover])
    return np.asarray(cv2.addWeighted(image, 1.0, grain, 1.0, -128.0), dtype=np.uint8)


def _cast_shadows(image: Picture, brush: _Brush, props: list[Prop], weather: Weather) -> Picture:
    mask = np.zeros(image.shape[:2], dtype=np.uint8)
    poses = np.array([prop.pose for prop in props]).reshape(-1, 3)
    bounds = np.array([prop.bounds for prop in props]).reshape(-1, 6)
    for points in shadow_points(poses, bounds, weather.sun):
        outline = cv2.convexHull(points.astype(np.float32))[:, 0].astype(np.float64)
        if brush.inside(outline):
            cv2.fillConvexPoly(mask, brush.pixels(outline), (255,), cv2.LINE_8, SHIFT)
    dark = cv2.convertScaleAbs(image, alpha=weather.shadow)
    soft = cv2.blur(mask, (5, 5))
    weight = cv2.merge([soft, soft, soft])
    shaded, lit = cv2.multiply(dark, weight, scale=1 / 255), cv2.multiply(image, 255 - weight, scale=1 / 255)
    return np.asarray(cv2.add(shaded, lit), dtype=np.uint8)
