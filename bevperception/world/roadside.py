"""Place objects beside the road: parked vehicles, work zones, cycles, barriers, people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import shapely
from numpy.typing import NDArray

from bevperception.world.cast import Actor
from bevperception.world.catalogue import KINDS, draw_colour, draw_size
from bevperception.world.ego import EgoPath
from bevperception.world.markings import parking_bays
from bevperception.world.roads import PARKING_M, Road, Town
from bevperception.world.shapes import make_mesh

Array = NDArray[np.float64]

END_M: Final = 10.5
"""No parking so near to a road's ends."""
CORNER_END_M: Final = 6.5
"""Nothing stands on the walkway so near to them: people cross there."""
NEAR_M: Final = 55.0
PARKED_WEIGHTS: Final = {
    "car": 0.50,
    "truck": 0.07,
    "trailer": 0.05,
    "bus": 0.05,
    "construction_vehicle": 0.05,
    "motorcycle": 0.04,
    "work zone": 0.05,
    "": 0.15,
}
WANTED: Final = {
    "construction_vehicle": 85.0,
    "trailer": 85.0,
    "bus": 85.0,
    "truck": 90.0,
    "work zone": 70.0,
    "motorcycle": 85.0,
}
"""What is placed first: one at every so many metres of the ego car's way, and one more."""
WORK_ZONES_M: Final = {"work zone": (12.0, 20.0), "short work zone": (6.8, 9.5)}
REACH_M: Final = {
    "work zone": 26.0,
    "short work zone": 26.0,
    "barrier": 26.0,
    "traffic_cone": 26.0,
    "bicycle": 26.0,
}
NEEDED_M: Final = {"trailer": 12.0, "bus": 11.0, "work zone": 15.0}
ON_WALKWAY: Final = {"bicycle": 30.0, "barrier": 40.0, "traffic_cone": 35.0, "motorcycle": 80.0}
WALKERS, STANDERS, SITTERS = 20, 8, 2


@dataclass
class _Site:
    """One side of a road near the ego car's way, with what is taken of its kerb and its walkway."""

    road: Road
    side: int
    parked: list[tuple[float, float]]
    walkway: list[tuple[float, float]]

    def heading(self, s: float) -> float:
        """Heading of the traffic on this side, radians."""
        return float(self.road.centre.yaw(s)) + (0.0 if self.side < 0 else np.pi)

    def place(self, s: float, out_m: float) -> Array:
        """(2,) a place so far from the kerb, away from the road."""
        return self.road.centre.beside(s, self.side * (self.road.half_width_m + out_m))


class Roadside:
    """Places objects and people beside the ego car's way.

    Args:
        town: the map.
        ego: the ego car's way.
        times: of the states of what moves.
        rng: chooses.
    """

    def __init__(self, town: Town, ego: EgoPath, times: Array, rng: np.random.Generator) -> None:
        self._times, self._rng = times, rng
        self._line = ego.poses(times[::10])[:, :2]
        self._sites = _sites(town, self._line)
        self._town = town

    def required_and_people(self) -> list[Actor]:
        """Place objects of the classes that every scene needs, and people."""
        actors: list[Actor] = []
        for kind, anchor in _anchors(WANTED, self._line, self._rng):
            _try_near(kind, anchor, self._sites, actors, self._rng)
        for kind, anchor in _anchors(ON_WALKWAY, self._line, self._rng):
            _try_on_walkway(kind, anchor, self._sites, actors, self._rng)
        return actors + _people(self._sites, self._line, self._times, self._rng)

    def more_of(self, kind: str) -> list[Actor]:
        """Place one or more objects of a class near the ego car's way; none if there is no room."""
        anchor = self._line[int(self._rng.integers(len(self._line)))]
        actors: list[Actor] = []
        if kind == "pedestrian":
            return [
                _stander(spot[0], spot[1], False, self._rng)
                for spot in [_draw_spot(self._sites, anchor, 25.0, self._rng) for _ in range(12)]
                if spot is not None
            ][:2]
        if kind in ("barrier", "traffic_cone") and self._rng.random() < 0.8:
            _try_near("short work zone", anchor, self._sites, actors, self._rng)
            return actors or _at_corner(kind, self._town, anchor, self._rng)
        if kind in ON_WALKWAY:
            _try_on_walkway(kind, anchor, self._sites, actors, self._rng)
        else:
            _try_near(kind, anchor, self._sites, actors, self._rng)
        return actors

    def parked_vehicles(self) -> list[Actor]:
        """Park vehicles at the kerb wherever there is still room, and in car parks."""
        actors: list[Actor] = []
        for site in self._sites:
            _fill(site, self._line, actors, self._rng)
        for road in {site.road.index: site.road for site in self._sites}.values():
            actors += _car_park(road, self._line, self._rng)
        return actors


def _sites(town: Town, line: Array) -> list[_Site]:
    sites = []
    for road in town.roads:
        away = np.linalg.norm(road.centre.points[::4, None] - line[None], axis=-1)
        if away.min() < 35.0:
            sites += [_Site(road, side, [], []) for side in (-1, 1)]
    return sites


def _free(taken: list[tuple[float, float]], start: float, stop: float, gap: float) -> bool:
    return all(stop + gap <= a or start - gap >= b for a, b in taken)


def _near(point: Array, line: Array) -> float:
    return float(np.linalg.norm(line - point, axis=1).min())


def _anchors(spacing: dict[str, float], line: Array, rng: np.random.Generator) -> list[tuple[str, Array]]:
    """Draw places evenly along the ego car's way, near which an object of a kind is wanted."""
    along = np.concatenate(([0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))))
    anchors = []
    for kind, every in spacing.items():
        count = 2 + int(along[-1] // every)
        for part in ((np.arange(count) + rng.uniform(0.0, 1.0, count)) / count).tolist():
            s = part * along[-1]
            place = np.array([np.interp(s, along, line[:, 0]), np.interp(s, along, line[:, 1])])
            anchors.append((kind, place))
    shuffled = [anchors[k] for k in rng.permutation(len(anchors)).tolist()]
    return sorted(shuffled, key=lambda anchor: -NEEDED_M.get(anchor[0], 0.0))  # long ones find room first


def _draw_spot(
    sites: list[_Site], anchor: Array, reach_m: float, rng: np.random.Generator
) -> tuple[_Site, float] | None:
    """Draw a place along a random road; None if it is not within a distance of the anchor."""
    site = sites[int(rng.integers(len(sites)))]
    away = np.linalg.norm(site.road.centre.points - anchor, axis=1)
    nearest = int(away.argmin())
    s = float(site.road.centre.s[nearest]) + float(rng.uniform(-reach_m, reach_m))
    if not CORNER_END_M <= s <= site.road.centre.length - CORNER_END_M:
        return None
    return (site, s) if float(np.linalg.norm(site.place(s, 0.0) - anchor)) < reach_m else None


def _try_near(
    kind: str, anchor: Array, sites: list[_Site], actors: list[Actor], rng: np.random.Generator
) -> None:
    for _ in range(90):
        spot = _draw_spot(sites, anchor, REACH_M.get(kind, 42.0), rng)
        if spot is not None and _park(spot[0], kind, spot[1], actors, rng):
            return


def _fill(site: _Site, line: Array, actors: list[Actor], rng: np.random.Generator) -> None:
    s = END_M + float(rng.uniform(0.0, 4.0))
    names, weights = list(PARKED_WEIGHTS), np.array(list(PARKED_WEIGHTS.values()))
    while s < site.road.centre.length - END_M - 4.0:
        kind = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        if kind and _near(site.place(s, 0.0), line) < NEAR_M:
            _park(site, kind, s, actors, rng)
        s += float(rng.uniform(3.0, 5.5))


def _park(site: _Site, kind: str, s: float, actors: list[Actor], rng: np.random.Generator) -> bool:
    """Put a vehicle or a work zone into the parking strip from ``s`` on, if there is room."""
    if kind in WORK_ZONES_M:
        return _work_zone(site, s, float(rng.uniform(*WORK_ZONES_M[kind])), actors, rng)
    size = draw_size(kind, rng)
    across = kind == "motorcycle"
    length = 1.1 if across else size[0]
    drive = site.road.car_park
    stop = s + length
    blocked = (
        drive is not None
        and drive[0] == site.side
        and abs((drive[1] + drive[2]) / 2 - (s + stop) / 2) < (3.4 + length / 2)
    )
    if blocked or s < END_M or stop > site.road.centre.length - END_M or not _free(site.parked, s, stop, 0.9):
        return False
    site.parked.append((s, stop))
    middle = s + length / 2
    turn = site.side * float(rng.uniform(1.1, 1.5)) if across else float(rng.normal(0.0, 0.02))
    state_name = {"motorcycle": "cycle.without_rider"}.get(kind, "vehicle.parked")
    room = (PARKING_M - (size[1] if not across else size[0])) / 2
    place = site.place(middle, -PARKING_M / 2 + float(rng.uniform(-0.3, 0.6)) * room)
    actors.append(_standing(kind, size, place, site.heading(middle) + turn, state_name, rng))
    return True


def _work_zone(site: _Site, s: float, length: float, actors: list[Actor], rng: np.random.Generator) -> bool:
    """Barriers along the traffic, cones at both ends, and perhaps a machine behind them."""
    drive = site.road.car_park
    if drive is not None and drive[0] == site.side and s - 4.0 < (drive[1] + drive[2]) / 2 < s + length + 4.0:
        return False
    inside = s >= END_M and s + length <= site.road.centre.length - END_M
    if not inside or not _free(site.parked, s, s + length, 1.0):
        return False
    site.parked.append((s, s + length))
    edge = -PARKING_M + 0.3
    barrier = KINDS["barrier"].colours[int(rng.integers(3))]
    if length > 14.0 and rng.random() < 0.7:
        size = draw_size("construction_vehicle", rng)
        size = (size[0], min(size[1], PARKING_M - 0.75), size[2])
        heading = site.heading(s) + float(rng.integers(2)) * np.pi
        place = site.place(s + length / 2, -size[1] / 2 - 0.05)
        actors.append(_standing("construction_vehicle", size, place, heading, "vehicle.parked", rng))
    for at in np.arange(s + 3.4, s + length - 3.4, 2.9).tolist():
        size, heading = draw_size("barrier", rng), site.heading(at) + np.pi / 2 * float(rng.choice([-1, 1]))
        actors.append(_standing("barrier", size, site.place(at, edge), heading, "", rng, barrier))
    for start, sign in ((s, 1.0), (s + length, -1.0)) if length > 11.0 else ((s, 1.0),):
        for k, out in enumerate((-0.4, -1.2, -2.0, edge)):
            place = site.place(start + sign * (0.3 + 0.55 * k), out)
            actors.append(
                _standing("traffic_cone", draw_size("traffic_cone", rng), place, site.heading(s), "", rng)
            )
    return True


def _try_on_walkway(
    kind: str, anchor: Array, sites: list[_Site], actors: list[Actor], rng: np.random.Generator
) -> None:
    for _ in range(90):
        spot = _draw_spot(sites, anchor, REACH_M.get(kind, 42.0), rng)
        if spot is None:
            continue
        site, s = spot
        count = int(rng.integers(2, 5)) if kind in ("barrier", "traffic_cone") else int(rng.integers(1, 3))
        step = {"barrier": 2.9, "traffic_cone": 1.8, "bicycle": 0.95, "motorcycle": 1.3}[kind]
        stop = s + count * step
        drive = site.road.car_park
        if drive is not None and drive[0] == site.side and s - 5.0 < (drive[1] + drive[2]) / 2 < stop + 5.0:
            continue
        if stop > site.road.centre.length - CORNER_END_M or not _free(site.walkway, s, stop, 1.0):
            continue
        site.walkway.append((s, stop))
        colour = draw_colour(KINDS[kind].colours, rng)
        for at in (s + step / 2 + step * np.arange(count)).tolist():
            turn = {"barrier": np.pi / 2, "traffic_cone": 0.0}.get(
                kind, np.pi / 2 + float(rng.normal(0.0, 0.12))
            )
            out = {"barrier": 0.42, "traffic_cone": 0.4}.get(kind, 1.05)
            state_name = "cycle.without_rider" if kind in ("bicycle", "motorcycle") else ""
            heading = site.heading(at) + turn * float(rng.choice([-1, 1]))
            paint = colour if kind == "barrier" else None
            actors.append(
                _standing(kind, draw_size(kind, rng), site.place(at, out), heading, state_name, rng, paint)
            )
        return


def _at_corner(kind: str, town: Town, anchor: Array, rng: np.random.Generator) -> list[Actor]:
    """Place two in a row on the walkway round a crossing, for scenes that take place on it."""
    near = [n for n in town.nodes if float(np.linalg.norm(n.position - anchor)) < 26.0]
    for _ in range(20 if near else 0):
        ring = near[int(rng.integers(len(near)))].area.buffer(0.8).exterior
        start = float(rng.uniform(0.0, ring.length))
        line = np.array([ring.interpolate((start + k) % ring.length).coords[0] for k in (0.0, 1.45, 2.9)])
        if town.drivable.buffer(0.3).intersects(shapely.LineString(line)):
            continue
        heading = float(np.arctan2(*(line[2] - line[0])[::-1]))
        if kind == "barrier":
            return [_standing(kind, draw_size(kind, rng), line[1], heading + np.pi / 2, "", rng)]
        return [_standing(kind, draw_size(kind, rng), place, heading, "", rng) for place in line]
    return []


def _car_park(road: Road, line: Array, rng: np.random.Generator) -> list[Actor]:
    actors = []
    for place, heading in parking_bays(road):
        if rng.random() < 0.75 and _near(place, line) < NEAR_M:
            yaw = heading + (np.pi if rng.random() < 0.3 else 0.0) + float(rng.normal(0.0, 0.03))
            actors.append(_standing("car", draw_size("car", rng), place, yaw, "vehicle.parked", rng))
    return actors


def _people(sites: list[_Site], line: Array, times: Array, rng: np.random.Generator) -> list[Actor]:
    actors = []
    count = WALKERS + STANDERS + SITTERS
    for number in range(count):
        for _ in range(40):
            site = sites[int(rng.integers(len(sites)))]
            s = float(rng.uniform(2.0, site.road.centre.length - 2.0))
            if _near(site.place(s, 0.0), line) < 30.0:
                break
        else:
            continue
        if number >= WALKERS:
            actors.append(_stander(site, s, number >= WALKERS + STANDERS, rng))
            continue
        size = draw_size("pedestrian", rng)
        states = _stroll(site, s, times, rng)
        paint = draw_colour(KINDS["pedestrian"].colours, rng)
        mesh = make_mesh("pedestrian", size, paint, True, rng)
        actors.append(
            Actor("pedestrian", size, paint, mesh, states, "pedestrian.standing", "pedestrian.moving")
        )
    return actors


def _stander(site: _Site, s: float, sits: bool, rng: np.random.Generator) -> Actor:
    length, width, height = draw_size("pedestrian", rng)
    if sits:
        height = round(0.72 * height, 2)
    name = "pedestrian.sitting_lying_down" if sits else "pedestrian.standing"
    out = site.road.walkway_m - 0.35 if sits else float(rng.uniform(1.9, site.road.walkway_m - 0.4))
    # Those who sit look at the road.
    yaw = site.heading(s) + (np.pi / 2 if sits else float(rng.uniform(-np.pi, np.pi)))
    return _standing("pedestrian", (length, width, height), site.place(s, out), yaw, name, rng)


def _stroll(site: _Site, s: float, times: Array, rng: np.random.Generator) -> Array:
    """(n, 4) states of a walk along the walkway that turns round at its ends."""
    out = float(rng.uniform(1.9, max(2.0, site.road.walkway_m - 0.4)))
    walk = site.road.centre.offset(site.side * (site.road.half_width_m + out))
    speed = float(rng.uniform(0.9, 1.7))
    length = walk.length - 1.0
    way = (s + float(rng.choice([0.0, length])) + speed * times) % (2 * length)
    forward = way < length
    along = 0.5 + np.where(forward, way, 2 * length - way)
    yaw = np.unwrap(walk.yaw(along) + np.where(forward, 0.0, np.pi))
    return np.column_stack((walk.at(along), yaw, np.full(len(times), speed)))


def _standing(
    kind: str,
    size: tuple[float, float, float],
    place: Array,
    yaw: float,
    state_name: str,
    rng: np.random.Generator,
    colour: tuple[int, int, int] | None = None,
) -> Actor:
    paint = colour or draw_colour(KINDS[kind].colours, rng)
    mesh = make_mesh(kind, size, paint, False, rng)
    yaw = float((yaw + np.pi) % (2 * np.pi) - np.pi)
    states = np.array([[place[0], place[1], yaw, 0.0]])
    return Actor(kind, size, paint, mesh, states, state_name, state_name)
