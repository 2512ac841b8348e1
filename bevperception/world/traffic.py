"""Simulate traffic: drivers on routes that keep their distance, brake for bends and share crossings.

Every driver follows its route with the intelligent driver model (Treiber, Hennecke, Helbing 2000) behind
whatever stands or moves in the corridor ahead. Crossings are passed in order of arrival, by several at once
where their ways do not cross; people on a crossing keep the cars of that arm waiting.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bevperception.world.routes import Gate, Route

Array = NDArray[np.float64]

STEP_S = 0.1
ACCELERATION, BRAKING, HARDEST_BRAKING = 2.0, 2.4, 7.0
HEADWAY_S, STANDSTILL_M = 1.3, 2.2
LOOK_AHEAD_M = np.array([0.4, 1.5, 3, 5, 7, 9, 11, 13, 15, 18, 21, 24, 28, 32, 36])
LOOK_EVERY = 2
"""Drivers look ahead at every so manieth step."""
SIDE_GAP_M = 0.35
FAVOURED = 0
"""The driver who need not queue: the ego car, or scenes would be spent waiting."""
CIRCLES = 4
"""Circles along its length that stand for a vehicle where others look ahead."""


@dataclass
class Driver:
    """A vehicle under way; positions are arc lengths of its own reference point.

    Attributes:
        route: what it follows.
        front_m, rear_m: from the reference point to its ends (a trailer included).
        width_m: of the vehicle.
        speed_wanted: m/s where nothing holds it up.
        s, speed: now.
    """

    route: Route
    front_m: float
    rear_m: float
    width_m: float
    speed_wanted: float
    s: float
    speed: float


@dataclass
class Walker:
    """A pedestrian who wants to cross at an arm of a crossing.

    Attributes:
        node, arm: where.
        start_s: seconds from the start of the simulation.
        walk_s: how long it takes.
        granted_s: when it began, or None as long as it waits.
    """

    node: int
    arm: int
    start_s: float
    walk_s: float
    granted_s: float | None = None


@dataclass
class _Crossing:
    """State of a crossing: its users, its queue in order of arrival, and the arms that people walk over."""

    inside: dict[int, Gate] = field(default_factory=dict)
    queue: dict[int, Gate] = field(default_factory=dict)
    walking: dict[int, int] = field(default_factory=dict)

    def people_in(self, gate: Gate) -> bool:
        """Whether somebody walks over an arm that a way takes."""
        return any(arm in (gate.arm_in, gate.arm_out) for arm in self.walking.values())

    def may_enter(self, index: int, drivers: list[Driver]) -> bool:
        """Whether it is a waiting driver's turn: nobody inside or before it is in its way."""
        gate = self.queue[index]
        if self.people_in(gate):
            return False
        for inside, other in self.inside.items():
            back = drivers[inside].s - drivers[inside].rear_m
            if other.arm_in != gate.arm_in and gate.crosses(other, back):
                return False
        if index == FAVOURED:
            return True
        before = [earlier for earlier in self.queue if earlier == FAVOURED]
        before += list(self.queue)[: list(self.queue).index(index)]
        return not any(
            not self.people_in(other) and (other.arm_in == gate.arm_in or gate.crosses(other))
            for other in (self.queue[earlier] for earlier in before)
        )


@dataclass(frozen=True)
class Motion:
    """Arc length and speed of every driver over time.

    Attributes:
        s, speed: (steps, drivers) at every ``STEP_S``.
    """

    s: Array
    speed: Array


def simulate(drivers: list[Driver], walkers: list[Walker], steps: int) -> Motion:
    """Simulate the drivers; they and the walkers are changed.

    Args:
        drivers: the ego car first.
        walkers: those who want to cross; ``granted_s`` is set when they go.
        steps: of ``STEP_S``.
    """
    crossings: dict[int, _Crossing] = {}
    passed = [0] * len(drivers)
    s, speed = np.zeros((steps, len(drivers))), np.zeros((steps, len(drivers)))
    for step in range(steps):
        now = step * STEP_S
        s[step] = [driver.s for driver in drivers]
        speed[step] = [driver.speed for driver in drivers]
        _let_walk(walkers, crossings, now)
        if step % LOOK_EVERY == 0:
            gaps, ahead = _gaps(drivers)
        for index, driver in enumerate(drivers):
            stop = _stop_gap(index, drivers, passed, crossings, gaps[index])
            leaders = [(gaps[index], ahead[index]), (stop, 0.0)]
            acceleration = min(_idm(driver, gap, leader) for gap, leader in leaders)
            after = max(0.0, driver.speed + acceleration * STEP_S)
            driver.s += (driver.speed + after) / 2 * STEP_S
            driver.speed = after
    return Motion(s, speed)


def position_at(motion: Motion, driver: int, time_s: Array) -> tuple[Array, Array]:
    """Arc length and speed of a driver at times since the start of the simulation.

    Speed changes evenly within a step, as in the simulation, so that position is its integral.
    """
    step = np.clip((time_s / STEP_S).astype(np.int64), 0, len(motion.s) - 2)
    part = time_s - step * STEP_S
    v0, v1 = motion.speed[step, driver], motion.speed[step + 1, driver]
    slope = (v1 - v0) / STEP_S
    return motion.s[step, driver] + v0 * part + 0.5 * slope * part**2, v0 + slope * part


def _idm(driver: Driver, gap: float, leader_speed: float) -> float:
    wanted = max(0.5, min(driver.speed_wanted, driver.route.limit_at(driver.s + 0.5 * driver.speed)))
    free = 1.0 - (driver.speed / wanted) ** 4
    closing = driver.speed * (driver.speed - leader_speed) / (2 * np.sqrt(ACCELERATION * BRAKING))
    distance = STANDSTILL_M + max(0.0, driver.speed * HEADWAY_S + closing)
    return float(
        np.clip(ACCELERATION * (free - (distance / max(gap, 0.1)) ** 2), -HARDEST_BRAKING, ACCELERATION)
    )


def _gaps(drivers: list[Driver]) -> tuple[Array, Array]:
    """Free length of the corridor ahead of each driver, and the speed of what ends it, along the corridor."""
    count = len(drivers)
    fractions = np.linspace(0.0, 1.0, CIRCLES)
    circles, points = np.zeros((count, CIRCLES, 2)), np.zeros((count, len(LOOK_AHEAD_M), 2))
    yaw, yaw_ahead = np.zeros(count), np.zeros((count, len(LOOK_AHEAD_M)))
    for index, driver in enumerate(drivers):
        half = driver.width_m / 2
        rear, front = driver.s - driver.rear_m + half, driver.s + driver.front_m - half
        ahead = driver.s + driver.front_m + LOOK_AHEAD_M
        circles[index] = driver.route.path.at(rear + fractions * max(front - rear, 0.1))
        points[index] = driver.route.path.at(ahead)
        yaw[index] = float(driver.route.path.yaw(driver.s))
        yaw_ahead[index] = driver.route.path.yaw(ahead)
    width, speed = np.array([d.width_m for d in drivers]), np.array([d.speed for d in drivers])
    x = points[:, :, 0, None, None] - circles[:, :, 0]
    y = points[:, :, 1, None, None] - circles[:, :, 1]
    touch = (x * x + y * y).min(axis=-1) < (width[:, None] / 2 + width[None] / 2 + SIDE_GAP_M)[:, None] ** 2
    touch[np.arange(count), :, np.arange(count)] = False
    blocked = touch.any(axis=2)
    first = np.where(blocked.any(axis=1), blocked.argmax(axis=1), len(LOOK_AHEAD_M) - 1)
    rows = np.arange(count)
    along = np.where(
        touch[rows, first], speed * np.cos(yaw[None] - yaw_ahead[rows, first][:, None]), np.inf
    ).min(axis=1)
    gap = np.where(blocked.any(axis=1), np.maximum(LOOK_AHEAD_M[first] - 0.9, 0.1), np.inf)
    return gap, np.where(np.isfinite(along), np.maximum(along, 0.0), 0.0)


def _stop_gap(
    index: int, drivers: list[Driver], passed: list[int], crossings: dict[int, _Crossing], free_m: float
) -> float:
    """Distance to where a driver has to stop before a crossing; infinite where it need not.

    ``free_m`` is the length of its corridor that nothing stands in.
    """
    driver, gates = drivers[index], drivers[index].route.gates
    while passed[index] < len(gates):
        gate = gates[passed[index]]
        crossing = crossings.setdefault(gate.node, _Crossing())
        if driver.s - driver.rear_m <= gate.clear_s:
            break
        crossing.inside.pop(index, None)
        passed[index] += 1
    else:
        return np.inf
    if index in crossing.inside:
        return np.inf
    away = gate.stop_s - (driver.s + driver.front_m)
    if away < -1.0:  # it started beyond the line
        crossing.inside[index] = gate
        return np.inf
    if free_m < away or away > max(9.0, driver.speed**2 / (2 * BRAKING) + 6.0):
        return np.inf  # the turn of whoever stands before it comes first
    crossing.queue.setdefault(index, gate)
    if crossing.may_enter(index, drivers):
        crossing.inside[index] = crossing.queue.pop(index)
        return np.inf
    return max(away + STANDSTILL_M, 0.1)


def _let_walk(walkers: list[Walker], crossings: dict[int, _Crossing], now: float) -> None:
    for index, walker in enumerate(walkers):
        crossing = crossings.setdefault(walker.node, _Crossing())
        if walker.granted_s is not None:
            if now > walker.granted_s + walker.walk_s:
                crossing.walking.pop(index, None)
        elif now >= walker.start_s:
            using = {arm for gate in crossing.inside.values() for arm in (gate.arm_in, gate.arm_out)}
            if walker.arm not in using:
                walker.granted_s = now
                crossing.walking[index] = walker.arm
