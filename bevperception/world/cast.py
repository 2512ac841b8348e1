"""The annotated objects of a scene (actors), and their states over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bevperception.world.catalogue import KINDS, Colour
from bevperception.world.meshes import Mesh

Array = NDArray[np.float64]

STATE_STEP_S: Final = 0.1
LEAD_S: Final = 1.0
"""How long before the first key frame, and after the last, states are known."""
MOVING_M_S: Final = 0.3


@dataclass
class Actor:
    """One annotated object with its mesh and its states over time.

    Attributes:
        kind: detection class.
        size_m: length, width, height of its box, which stands on the ground.
        colour, mesh: how it looks.
        states: (n, 4) x, y, yaw (without jumps) and speed, every ``STATE_STEP_S`` from ``-LEAD_S`` on; a
            single row for what never moves.
        state_name: attribute while it rests, for example vehicle.parked; '' for none.
        moving_name: attribute while it moves.
    """

    kind: str
    size_m: tuple[float, float, float]
    colour: Colour
    mesh: Mesh
    states: Array
    state_name: str
    moving_name: str

    @property
    def category(self) -> str:
        """Category of nuScenes."""
        return KINDS[self.kind].category

    @property
    def is_static(self) -> bool:
        """Whether it stays where it is for the whole scene."""
        return len(self.states) == 1

    def attribute(self, speed: float) -> str:
        """Name of its nuScenes attribute at a speed in m/s; '' if it has none."""
        return self.moving_name if speed > MOVING_M_S else self.state_name


class Cast:
    """All actors of a scene.

    Args:
        actors: in the order of their numbers.
        steps: number of states of those that move.
    """

    def __init__(self, actors: list[Actor], steps: int) -> None:
        self.actors = actors
        self.steps = steps
        shape = (steps, len(actors), 4)
        self._states = np.zeros(shape)
        for index, actor in enumerate(actors):
            self._states[:, index] = actor.states

    def __len__(self) -> int:
        return len(self.actors)

    @property
    def states(self) -> Array:
        """(steps, actors, 4), see :class:`Actor`."""
        return self._states

    def at(self, time_s: float) -> Array:
        """(actors, 4) x, y, yaw, speed at a time from the first key frame."""
        place = np.clip((time_s + LEAD_S) / STATE_STEP_S, 0.0, self.steps - 1.000001)
        step = int(place)
        part = place - step
        return np.asarray(self._states[step] * (1 - part) + self._states[step + 1] * part)


def actor_bounds(size_m: tuple[float, float, float]) -> Array:
    """(6,) x, y, z from and to of an actor's box in its own frame."""
    length, width, height = size_m
    return np.array([-length / 2, length / 2, -width / 2, width / 2, 0.0, height])


def state_times(duration_s: float) -> Array:
    """(n,) times of states of a scene that lasts ``duration_s`` from first to last key frame."""
    count = int(np.ceil((duration_s + 2 * LEAD_S) / STATE_STEP_S)) + 2
    return np.arange(count) * STATE_STEP_S - LEAD_S


def overlapping(cast: Cast, margin_m: float) -> list[tuple[int, int]]:
    """Find pairs of actors whose boxes come nearer than a margin, seen from above, at some time.

    Args:
        cast: whose states are looked at every half second or so.
        margin_m: added to every side of every box.
    """
    pairs: set[tuple[int, int]] = set()
    half = np.array([actor.size_m[:2] for actor in cast.actors]) / 2 + margin_m
    radius = np.linalg.norm(half, axis=1)
    static = np.array([actor.is_static for actor in cast.actors])
    for step in range(0, cast.steps, 4):
        states = cast.states[step]
        x, y = (states[:, None, k] - states[None, :, k] for k in (0, 1))
        near = np.triu(x * x + y * y < (radius[:, None] + radius[None]) ** 2, 1)
        if step:
            near &= ~(static[:, None] & static[None])
        first, second = np.nonzero(near)
        hit = rectangles_overlap(states[first], half[first], states[second], half[second])
        pairs.update(zip(first[hit].tolist(), second[hit].tolist(), strict=True))
    return sorted(pairs)


def rectangles_overlap(a: Array, half_a: Array, b: Array, half_b: Array) -> NDArray[np.bool_]:
    """Whether turned rectangles overlap, pair by pair (separating axes).

    Args:
        a, b: (n, 3 or more) x, y, yaw.
        half_a, half_b: (n, 2) half the length and half the width.
    """
    apart = b[:, :2] - a[:, :2]
    overlap = np.ones(len(a), dtype=bool)
    for yaw in (a[:, 2], a[:, 2] + np.pi / 2, b[:, 2], b[:, 2] + np.pi / 2):
        axis = np.stack((np.cos(yaw), np.sin(yaw)), axis=-1)
        reach = sum(
            half[:, k] * np.abs(np.cos(yaw - box[:, 2] - k * np.pi / 2))
            for box, half in ((a, half_a), (b, half_b))
            for k in (0, 1)
        )
        overlap &= np.abs((apart * axis).sum(axis=1)) < reach
    return overlap
