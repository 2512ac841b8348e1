"""Routes through a town: chains of lanes and the crossings on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bevperception.world.paths import Path, join
from bevperception.world.roads import STOP_M, Lane, Town

Array = NDArray[np.float64]

LATERAL_ACCELERATION = 2.0
SPEED_STEP_M = 1.0
GENTLE_BRAKING = 1.8
CONFLICT_M = 3.3


@dataclass(frozen=True, eq=False)
class Gate:
    """A crossing on a route.

    Attributes:
        node: of the town.
        arm_in, arm_out: the arms that the route takes.
        stop_s: where a front has to stop.
        clear_s: where a back has left the crossing.
        way: (n, 2) places from the one to the other.
        way_s: (n,) their arc lengths on the route.
    """

    node: int
    arm_in: int
    arm_out: int
    stop_s: float
    clear_s: float
    way: Array
    way_s: Array

    def crosses(self, other: Gate, passed_s: float = -np.inf) -> bool:
        """Whether a way comes too near to what is left of another one to be used beside it.

        Args:
            other: a way through the same crossing.
            passed_s: how far on its route the back of the other vehicle is.
        """
        left = other.way[other.way_s > passed_s - 1.0]
        if not len(left):
            return False
        away = np.linalg.norm(self.way[:, None] - left[None], axis=-1)
        return bool(away.min() < CONFLICT_M)


@dataclass(frozen=True)
class Route:
    """A vehicle's route: its path, speed limits and crossings.

    Attributes:
        path: middle of the lanes and connectors, shifted sideways if the vehicle keeps to an edge.
        gates: crossings in order.
        roads: (start, stop, road) stretches of ``path`` on roads.
        speed_limit: (n,) m/s at every ``SPEED_STEP_M`` of the path, low before and in bends.
    """

    path: Path
    gates: tuple[Gate, ...]
    roads: tuple[tuple[float, float, int], ...]
    speed_limit: Array

    def limit_at(self, s: float) -> float:
        """Speed limit in m/s at an arc length."""
        index = min(max(int(s / SPEED_STEP_M), 0), len(self.speed_limit) - 1)
        return float(self.speed_limit[index])


def random_route(town: Town, lane: Lane, length_m: float, left_m: float, rng: np.random.Generator) -> Route:
    """Draw a route that starts with a lane and turns at random.

    Args:
        town: the roads.
        lane: first lane.
        length_m: at least this long.
        left_m: shift to the left of the lanes' middle, negative to the right.
        rng: chooses the turns.
    """
    pieces, gates, roads = [lane.path], [], [(0.0, lane.path.length, lane.road)]
    length, here = lane.path.length, lane
    while length < length_m:
        ways = town.next_connectors[here.index]
        connector = town.connectors[ways[int(rng.integers(len(ways)))]]
        after = town.lanes[connector.end_lane]
        out = length + connector.path.length
        if town.nodes[connector.node].is_crossing:
            road = town.roads[after.road]
            arm_out = road.arms[0] if after.forward else road.arms[1]
            ends = length - STOP_M, out + 1.5
            way = np.concatenate((connector.path.points[::3], after.path.at(np.arange(0.0, 6.0, 1.5))))
            way_s = np.concatenate((length + connector.path.s[::3], out + np.arange(0.0, 6.0, 1.5)))
            gates.append(Gate(connector.node, here.end_arm, arm_out, *ends, way, way_s))
        pieces += [connector.path, after.path]
        length = out + after.path.length
        roads.append((out, length, after.road))
        here = after
    path = join(pieces)
    if left_m:
        path = path.offset(left_m)
    return Route(path, tuple(gates), tuple(roads), _speed_limit(path))


def _speed_limit(path: Path) -> Array:
    s = np.arange(0.0, path.length + SPEED_STEP_M, SPEED_STEP_M)
    turn = np.abs(np.interp(s, path.s, path.curvature()))
    kernel = np.ones(5) / 5
    turn = np.convolve(np.pad(turn, 2, mode="edge"), kernel, mode="valid")
    limit = np.sqrt(LATERAL_ACCELERATION / np.maximum(turn, 1e-3))
    for index in range(len(limit) - 2, -1, -1):
        limit[index] = min(limit[index], np.sqrt(limit[index + 1] ** 2 + 2 * GENTLE_BRAKING * SPEED_STEP_M))
    return np.asarray(np.clip(limit, 2.5, 20.0))
