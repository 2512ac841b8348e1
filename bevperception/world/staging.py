"""Stage a scene: the ego car's way, the traffic around it, and objects and people beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bevperception.world import ego as ego_car
from bevperception.world.cast import Actor, Cast, actor_bounds, overlapping, state_times
from bevperception.world.catalogue import KINDS, RIDDEN_HEIGHT_M, draw_colour, draw_size
from bevperception.world.ego import EgoPath
from bevperception.world.lidar import sweep
from bevperception.world.markings import crossings
from bevperception.world.paths import Path
from bevperception.world.roads import Lane, Town
from bevperception.world.roadside import Roadside
from bevperception.world.routes import Route, random_route
from bevperception.world.seeds import generator
from bevperception.world.shapes import make_mesh
from bevperception.world.traffic import STEP_S, Driver, Motion, Walker, position_at, simulate

Array = NDArray[np.float64]

WARM_UP_S: Final = 8.0
EVALUATED_M: Final = {
    "pedestrian": 40.0,
    "motorcycle": 40.0,
    "bicycle": 40.0,
    "traffic_cone": 30.0,
    "barrier": 30.0,
}
"""How far from the ego car the devkit evaluates a class, in metres; 50 for what is not named."""
TRAFFIC: Final = {
    "car": 16,
    "truck": 3,
    "bus": 3,
    "truck with trailer": 2,
    "motorcycle": 3,
    "bicycle": 3,
}
"""Vehicles under way around the ego car, at most."""
SPEEDS: Final = {"car": (7.0, 12.0), "motorcycle": (7.0, 11.0), "bicycle": (3.5, 5.5)}
"""Wanted speeds in m/s; (6, 10) for what is not named."""
GAP_M: Final = 19.0
"""Between the middles of vehicles that start on the same lane."""
ROUNDS: Final = 5
ENOUGH: Final = 1.3
"""Actors of each class that the lidar meets within the range of evaluation, on average, in every scene."""


@dataclass
class Stage:
    """Town, ego car and actors of a scene, before it is rendered.

    Attributes:
        town: its map.
        ego: the ego car's way.
        cast: all that is annotated.
    """

    town: Town
    ego: EgoPath
    cast: Cast


def set_stage(town: Town, seed: int, scene: int, duration_s: float) -> Stage:
    """Stage a scene; it depends on these arguments alone.

    Args:
        town: the map.
        seed: of the world.
        scene: number of the scene in the world.
        duration_s: from the first to the last key frame.
    """
    rng = generator(seed, "stage", scene)
    times = state_times(duration_s)
    route, start = _ego_route(town, duration_s, rng)
    wanted = float(rng.uniform(7.5, 11.5))
    drivers = [Driver(route, ego_car.FRONT_M, ego_car.REAR_M, ego_car.WIDTH_M, wanted, start, 6.0)]
    kinds = _add_traffic(town, drivers, duration_s, rng)
    walkers, walks = _crossing_people(town, route, start, duration_s, rng)
    motion = simulate(drivers, walkers, int((WARM_UP_S + times[-1]) / STEP_S) + 3)
    ego = EgoPath(route, motion, WARM_UP_S)
    roadside = Roadside(town, ego, times, rng)
    actors = _vehicles(drivers, kinds, motion, times, rng)
    actors += _crossers(walkers, walks, times, rng)
    actors += roadside.required_and_people()
    cast = _without_collisions(actors, ego, times)
    cast = _top_up(cast, roadside, ego, times, duration_s)
    cast = _without_collisions([*cast.actors, *roadside.parked_vehicles()], ego, times)
    return Stage(town, ego, _top_up(cast, roadside, ego, times, duration_s))


def _top_up(cast: Cast, roadside: Roadside, ego: EgoPath, times: Array, duration_s: float) -> Cast:
    """Add actors of the classes that are too rare, as far as there is room."""
    for _ in range(ROUNDS):
        lacking = [kind for kind, mean in mean_counts(cast, ego, duration_s).items() if mean < ENOUGH]
        if not lacking:
            break
        more = [actor for kind in lacking for _ in range(3) for actor in roadside.more_of(kind)]
        cast = _without_collisions([*cast.actors, *more], ego, times)
    return cast


def mean_counts(cast: Cast, ego: EgoPath, duration_s: float) -> dict[str, float]:
    """Count the actors of each class that the lidar hits within the class's range, averaged over a scene."""
    times = np.linspace(0.0, duration_s, 4)
    bounds = np.array([actor_bounds(actor.size_m) for actor in cast.actors])
    met = []
    for time, pose in zip(times.tolist(), ego.poses(times), strict=True):
        states = cast.at(time)
        near = np.linalg.norm(states[:, :2] - pose[:2], axis=1)
        met.append(np.where(sweep(pose, states[:, :3], bounds, len(cast)).counts > 0, near, np.inf))
    away = np.array(met)
    kinds = np.array([actor.kind for actor in cast.actors])
    reach = {kind: EVALUATED_M.get(kind, 50.0) - 1.0 for kind in KINDS}
    return {kind: float((away[:, kinds == kind] < reach[kind]).sum(axis=1).mean()) for kind in KINDS}


def _ego_route(town: Town, duration_s: float, rng: np.random.Generator) -> tuple[Route, float]:
    lane = town.lanes[int(rng.integers(len(town.lanes)))]
    route = random_route(town, lane, 13.0 * (duration_s + WARM_UP_S) + 120.0, 0.0, rng)
    return route, float(rng.uniform(12.0, lane.path.length - 35.0))


def _add_traffic(
    town: Town, drivers: list[Driver], duration_s: float, rng: np.random.Generator
) -> list[tuple[str, tuple[float, float, float], float]]:
    """Append drivers on lanes near the ego car's way; returns kind, size and trailer length of each."""
    ego = drivers[0]
    reach = ego.s + np.arange(0.0, 9.0 * (duration_s + WARM_UP_S), 8.0)
    line = ego.route.path.at(reach)
    places = _spawn_places(town, line, rng)
    lane_of_ego = next(
        lane for lane in town.lanes if np.allclose(lane.path.points[0], ego.route.path.points[0])
    )
    taken = [(lane_of_ego.index, ego.s)]
    kinds = [kind for kind, count in TRAFFIC.items() for _ in range(count)]
    added = []
    for kind in [kinds[k] for k in rng.permutation(len(kinds)).tolist()]:
        body = "truck" if kind == "truck with trailer" else kind
        for index, (lane, s) in enumerate(places):
            if any(lane.index == other and abs(s - place) < GAP_M for other, place in taken):
                continue
            if kind == "bicycle" and lane.place != town.roads[lane.road].lanes - 1:
                continue
            places.pop(index)
            taken.append((lane.index, s))
            size = draw_size(body, rng)
            trailer = draw_size("trailer", rng)[0] if kind == "truck with trailer" else 0.0
            low, high = SPEEDS.get(kind, (6.0, 10.0))
            left = {"bicycle": -1.15, "motorcycle": -0.4}.get(kind, 0.0)
            route = random_route(town, lane, s + 12.0 * (duration_s + WARM_UP_S) + 60.0, left, rng)
            rear = size[0] / 2 + (trailer + 0.9 if trailer else 0.0)
            wanted = float(rng.uniform(low, high))
            drivers.append(Driver(route, size[0] / 2, rear, max(size[1], 0.9), wanted, s, 0.7 * wanted))
            added.append((kind, size, trailer))
            break
    return added


def _spawn_places(town: Town, line: Array, rng: np.random.Generator) -> list[tuple[Lane, float]]:
    places = []
    for lane in town.lanes:
        for s in np.arange(24.0, lane.path.length - 20.0, 9.0).tolist():
            away = np.linalg.norm(line - lane.path.at(s), axis=1)
            if away.min() < 45.0:
                places.append((lane, s))
    return [places[k] for k in rng.permutation(len(places)).tolist()]


def _crossing_people(
    town: Town, route: Route, start: float, duration_s: float, rng: np.random.Generator
) -> tuple[list[Walker], list[Path]]:
    """Add groups of people who cross where the ego car passes, mostly not in front of it."""
    walkers, walks = [], []
    all_crossings = crossings(town)
    for gate in [g for g in route.gates if g.stop_s > start][:4]:
        here = [c for c in all_crossings if c.node == gate.node]
        others = [c for c in here if c.arm not in (gate.arm_in, gate.arm_out)]
        chosen = [others[int(rng.integers(len(others)))]] if others and rng.random() < 0.6 else []
        if rng.random() < 0.12:
            chosen.append(next(c for c in here if c.arm == gate.arm_out))
        for crossing in chosen:
            begin = float(rng.uniform(0.0, WARM_UP_S + duration_s))
            for _ in range(int(rng.integers(1, 5))):
                way = crossing.walk if rng.random() < 0.5 else crossing.walk[::-1]
                out = (way[0] - way[1]) / np.linalg.norm(way[0] - way[1])
                aside = np.array([-out[1], out[0]]) * rng.uniform(-1.3, 1.3)
                line = Path(
                    np.array([way[0] + out * rng.uniform(0.9, 1.8), way[1] - out * rng.uniform(0.9, 1.8)])
                    + aside
                )
                speed = float(rng.uniform(1.4, 2.0))
                walkers.append(Walker(crossing.node, crossing.arm, begin, line.length / speed))
                walks.append(line)
    return walkers, walks


def _vehicles(
    drivers: list[Driver],
    kinds: list[tuple[str, tuple[float, float, float], float]],
    motion: Motion,
    times: Array,
    rng: np.random.Generator,
) -> list[Actor]:
    actors = []
    for number, (kind, size, trailer) in enumerate(kinds, start=1):
        path = drivers[number].route.path
        s, speed = position_at(motion, number, times + WARM_UP_S)
        if kind in ("bicycle", "motorcycle"):
            size = (size[0], size[1], round(RIDDEN_HEIGHT_M + float(rng.uniform(-0.08, 0.1)), 2))
            states = _rigid_on(path, s, 0.5 * size[0], speed)
            actors.append(
                make_actor(kind, size, states, "cycle.with_rider", "cycle.with_rider", rng, rider=True)
            )
            continue
        body = "truck" if trailer else kind
        actors.append(
            make_actor(
                body, size, _rigid_on(path, s, 0.3 * size[0], speed), "vehicle.stopped", "vehicle.moving", rng
            )
        )
        if trailer:
            _, width, height = draw_size("trailer", rng)
            behind = s - size[0] / 2 - 0.7 - trailer / 2
            states = _rigid_on(path, behind, 0.35 * trailer, speed)
            actors.append(
                make_actor(
                    "trailer", (trailer, width, height), states, "vehicle.stopped", "vehicle.moving", rng
                )
            )
    return actors


def _rigid_on(path: Path, s: Array, axle_m: float, speed: Array) -> Array:
    """(n, 4) states of a body whose axles, ``axle_m`` before and behind its middle, run on a line."""
    front, rear = path.at(s + axle_m), path.at(s - axle_m)
    yaw = np.unwrap(np.arctan2(front[:, 1] - rear[:, 1], front[:, 0] - rear[:, 0]))
    return np.concatenate(((front + rear) / 2, yaw[:, None], speed[:, None]), axis=1)


def _crossers(
    walkers: list[Walker], walks: list[Path], times: Array, rng: np.random.Generator
) -> list[Actor]:
    actors = []
    for walker, line in zip(walkers, walks, strict=True):
        begin = np.inf if walker.granted_s is None else walker.granted_s - WARM_UP_S
        speed = line.length / walker.walk_s
        s = np.clip((times - begin) * speed, 0.0, line.length) if np.isfinite(begin) else np.zeros(len(times))
        moving = (s > 0) & (s < line.length)
        yaw = np.full(len(times), float(line.yaw(0.0)))
        states = np.column_stack((line.at(s), yaw, moving * speed))
        actors.append(
            make_actor(
                "pedestrian",
                draw_size("pedestrian", rng),
                states,
                "pedestrian.standing",
                "pedestrian.moving",
                rng,
                True,
            )
        )
    return actors


def make_actor(
    kind: str,
    size: tuple[float, float, float],
    states: Array,
    state_name: str,
    moving_name: str,
    rng: np.random.Generator,
    rider: bool = False,
) -> Actor:
    """An actor with a mesh; see :class:`Actor` and :func:`make_mesh`."""
    paint = draw_colour(KINDS[kind].colours, rng)
    return Actor(kind, size, paint, make_mesh(kind, size, paint, rider, rng), states, state_name, moving_name)


def _without_collisions(actors: list[Actor], ego: EgoPath, times: Array) -> Cast:
    """Remove actors that collide with others: of two, the later one is left out."""
    poses = ego.poses(times)
    middle = ego_car.FRONT_M - ego_car.LENGTH_M / 2
    centre = poses[:, :2] + middle * np.stack((np.cos(poses[:, 2]), np.sin(poses[:, 2])), axis=-1)
    states = np.column_stack((centre, poses[:, 2], np.zeros(len(poses))))
    size = (ego_car.LENGTH_M, ego_car.WIDTH_M, ego_car.HEIGHT_M)
    stand_in = Actor("car", size, (0, 0, 0), actors[0].mesh, states, "", "")
    everyone = Cast([stand_in, *actors], len(times))
    out: set[int] = set()
    for first, second in overlapping(everyone, 0.04):
        if first not in out:
            out.add(second)
    return Cast([actor for index, actor in enumerate(actors, start=1) if index not in out], len(times))
