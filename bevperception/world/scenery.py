"""Place buildings, trees and lamp posts in a town; they are not annotated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Final

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import MultiPolygon, Polygon

from bevperception.world.catalogue import Colour, draw_colour
from bevperception.world.meshes import Mesh, MeshBuilder
from bevperception.world.roads import Road, Town
from bevperception.world.seeds import generator
from bevperception.world.settings import LOCATIONS
from bevperception.world.shapes import GLASS, shade

Array = NDArray[np.float64]

WALLS: Final = (
    (172, 150, 128),
    (150, 92, 74),
    (196, 188, 172),
    (128, 132, 138),
    (206, 176, 132),
    (104, 112, 122),
    (178, 186, 190),
)
LEAVES: Final = ((62, 96, 44), (80, 112, 52), (48, 82, 50), (104, 118, 50))
BARK: Final = (82, 64, 50)
METAL: Final = (110, 114, 118)
LAMP_M: Final = 6.5


@dataclass(frozen=True, eq=False)
class Prop:
    """A building, tree or lamp post.

    Attributes:
        pose: (3,) x, y, yaw.
        bounds: x, y and z from and to of its box, in its own frame: (6,) x0, x1, y0, y1, z0, z1.
        make: its mesh, in its own frame; a town has many that no scene comes near.
    """

    pose: Array
    bounds: Array
    make: Callable[[], Mesh]

    @cached_property
    def mesh(self) -> Mesh:
        """Made when it is first asked for."""
        return self.make()


def furnish_town(town: Town, seed: int) -> list[Prop]:
    """Place all props of a town; they depend on the seed and the location alone."""
    rng = generator(seed, "scenery", LOCATIONS.index(town.location))
    kept_free = shapely.union_all([town.drivable, *town.walkways, *town.car_parks]).buffer(0.4)
    shapely.prepare(kept_free)
    props: list[Prop] = []
    built: list[tuple[tuple[float, float], Polygon]] = []
    for road in town.roads:
        for side in (-1, 1):
            props += _buildings(road, side, kept_free, built, rng)
    tree = shapely.STRtree([outline for _, outline in built])
    for road in town.roads:
        for side in (-1, 1):
            props += _trees(road, side, kept_free, tree, rng)
            props += _lamps(road, side, rng)
    return props


def _buildings(
    road: Road,
    side: int,
    kept_free: Polygon | MultiPolygon,
    built: list[tuple[tuple[float, float], Polygon]],
    rng: np.random.Generator,
) -> list[Prop]:
    props: list[Prop] = []
    s = 4.0
    while s < road.centre.length - 8.0:
        width, depth = float(rng.uniform(9.0, 22.0)), float(rng.uniform(8.0, 14.0))
        setback = road.half_width_m + road.walkway_m + float(rng.uniform(2.4, 7.0))
        if rng.random() < 0.12:
            s += width
            continue
        middle = road.centre.beside(s + width / 2, side * (setback + depth / 2))
        yaw = float(road.centre.yaw(s + width / 2))
        outline = _rectangle(middle, yaw, width, depth)
        # Further away than 30 m along one axis no two buildings can meet.
        x, y = middle.tolist()
        beside = [other for place, other in built if abs(place[0] - x) < 30.0 and abs(place[1] - y) < 30.0]
        if not kept_free.intersects(outline) and not any(outline.intersects(other) for other in beside):
            built.append(((x, y), outline))
            props.append(_building(middle, yaw, width, depth, rng))
        s += width + float(rng.uniform(0.5, 5.0))
    return props


def _rectangle(middle: Array, yaw: float, length: float, width: float) -> Polygon:
    along, across = np.array([np.cos(yaw), np.sin(yaw)]), np.array([-np.sin(yaw), np.cos(yaw)])
    signs = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) / 2
    return Polygon(middle + signs * [length, width] @ np.array([along, across]))


def _building(middle: Array, yaw: float, width: float, depth: float, rng: np.random.Generator) -> Prop:
    floors = int(rng.integers(2, 8))
    height = _building_height(floors)
    wall: Colour = draw_colour(WALLS, rng)
    bands = bool(rng.random() < 0.5)
    lights = int(rng.integers(2**32))
    a, b = width / 2, depth / 2
    make = partial(_building_mesh, (width, depth), floors, wall, bands, lights)
    return Prop(np.array([*middle, yaw]), np.array([-a, a, -b, b, 0.0, height]), make)


def _building_mesh(size_m: tuple[float, float], floors: int, wall: Colour, bands: bool, lights: int) -> Mesh:
    rng = np.random.Generator(np.random.PCG64(lights))
    (width, depth), height = size_m, _building_height(floors)
    builder = MeshBuilder()
    a, b = width / 2, depth / 2
    body = builder.box((-a, a), (-b, b), (0.0, height), wall, colours={"top": shade(wall, 0.7)})
    for face, length in (("front", depth), ("back", depth), ("left", width), ("right", width)):
        columns = 1 if bands else max(2, round(length / 4.0))
        builder.mark(body, face, (0.0, 1.0), (0.0, 0.9 / height), shade(wall, 0.62))
        for floor in range(floors):
            low = (3.2 * floor + 1.1) / height
            for column in range(columns):
                u = ((column + 0.18) / columns, (column + 0.82) / columns) if not bands else (0.05, 0.95)
                lit = float(rng.random() < 0.35)
                builder.mark(body, face, u, (low, low + 1.5 / height), shade(GLASS, 1.7), glow=0.7 * lit)
    return builder.build()


def _building_height(floors: int) -> float:
    return 3.2 * floors + 0.8


def _trees(
    road: Road,
    side: int,
    kept_free: Polygon | MultiPolygon,
    built: shapely.STRtree,
    rng: np.random.Generator,
) -> list[Prop]:
    props: list[Prop] = []
    out = road.half_width_m + road.walkway_m + 1.1
    for s in np.arange(6.0, road.centre.length - 5.0, 9.5).tolist():
        place = road.centre.beside(s + float(rng.uniform(-2.0, 2.0)), side * out)
        if rng.random() < 0.45 or kept_free.intersects(shapely.Point(place).buffer(0.3)):
            continue
        if len(built.query(shapely.Point(place).buffer(1.6), predicate="intersects")):
            continue
        props += _tree(place, rng)
    return props


def _tree(place: Array, rng: np.random.Generator) -> list[Prop]:
    radius, trunk = float(rng.uniform(1.2, 1.9)), float(rng.uniform(1.9, 2.6))
    height = trunk + float(rng.uniform(1.6, 2.4)) * radius
    pose = np.array([*place, float(rng.uniform(-np.pi, np.pi))])
    leaves = draw_colour(LEAVES, rng)
    r = radius
    return [
        Prop(pose, np.array([-0.16, 0.16, -0.16, 0.16, 0.0, trunk]), partial(_post_mesh, 0.16, trunk, BARK)),
        Prop(pose, np.array([-r, r, -r, r, trunk, height]), partial(_crown_mesh, r, trunk, height, leaves)),
    ]


def _crown_mesh(radius: float, low: float, high: float, leaves: Colour) -> Mesh:
    middle, r, t = low + 0.4 * (high - low), radius, 0.55 * radius
    builder = MeshBuilder()
    builder.solid((-t, t, -t, t, low), (-r, r, -r, r, middle), shade(leaves, 0.85))
    builder.solid((-r, r, -r, r, middle), (-t, t, -t, t, high), leaves, layer=1)
    return builder.build()


def _post_mesh(radius: float, height: float, colour: Colour) -> Mesh:
    builder = MeshBuilder()
    builder.box((-radius, radius), (-radius, radius), (0.0, height), colour)
    return builder.build()


def _lamps(road: Road, side: int, rng: np.random.Generator) -> list[Prop]:
    props = []
    for s in np.arange(14.0 + float(rng.uniform(0, 8)), road.centre.length - 12.0, 30.0).tolist():
        place = road.centre.beside(s, side * (road.half_width_m + 0.12))
        pose = np.array([*place, float(road.centre.yaw(s))])
        bounds = np.array([-0.06, 0.06, -0.06, 0.06, 0.0, LAMP_M])
        props.append(Prop(pose, bounds, partial(_post_mesh, 0.06, LAMP_M, METAL)))
    return props
