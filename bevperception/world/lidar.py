"""Simulate a 32-beam lidar sweep over boxes and the flat ground.

Every ray of every beam is cast; it ends at the nearest box or on the ground. Things are the boxes around
them, so a beam that would pass under a car or over its bonnet still meets its box.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bevperception.world.rig import LIDAR_POSITION_M, LIDAR_ROTATION_WXYZ, rotation_matrix

Array = NDArray[np.float64]

BEAMS: Final = 32
AZIMUTHS: Final = 1080
ELEVATIONS: Final = np.deg2rad(np.linspace(-30.67, 10.67, BEAMS))
REACH_M: Final = 80.0
INTO_M: Final = 0.02
"""Points lie so deep inside the surface that they hit, so that they count as inside the box."""
GROUND_STEP: Final = 24
"""Of the ground and of scenery the files hold only the points of every so manieth azimuth,"""
ACTOR_POINTS: Final = 40
"""and of an actor some so many, evenly chosen, or all if there are fewer."""


@dataclass(frozen=True)
class Sweep:
    """One turn of the lidar.

    Attributes:
        points: (n, 5) float32 as in nuScenes' files: x, y, z in the lidar frame, intensity, beam.
        counts: (actors,) points on each actor, before the files are thinned.
    """

    points: NDArray[np.float32]
    counts: NDArray[np.int64]


def sweep(ego_pose: Array, poses: Array, bounds: Array, actors: int) -> Sweep:
    """Cast one turn of rays.

    Args:
        ego_pose: (3,) x, y, yaw of the ego car.
        poses: (n, 3) x, y, yaw of all things, actors first.
        bounds: (n, 6) x, y, z from and to of their boxes, each in its own frame.
        actors: how many of the things are actors.
    """
    x, y, height = LIDAR_POSITION_M
    c, s = np.cos(ego_pose[2]), np.sin(ego_pose[2])
    eye = np.array([ego_pose[0] + c * x - s * y, ego_pose[1] + s * x + c * y])
    near = np.flatnonzero(np.linalg.norm(poses[:, :2] - eye, axis=1) < REACH_M)
    pair_thing, pair_azimuth = _candidates(eye, poses[near], bounds[near], float(ego_pose[2]))
    distance = _cast(eye, height, poses[near], bounds[near], pair_thing, pair_azimuth, float(ego_pose[2]))
    down = np.tan(-ELEVATIONS)
    ground = np.where(down > 0, height / np.maximum(down, 1e-9), np.inf)
    ranges = np.broadcast_to(ground, (AZIMUTHS, BEAMS)).copy()
    hits = np.full((AZIMUTHS, BEAMS), -1, dtype=np.int64)
    order = np.argsort(-np.where(np.isfinite(distance), distance, 1e9).min(axis=1), kind="stable")
    # Boxes do not overlap, so that at one azimuth the nearer of two is nearer for every beam that meets both.
    for chunk in _one_per_azimuth(order, pair_azimuth):
        azimuth = pair_azimuth[chunk]
        closer = distance[chunk] < ranges[azimuth]
        ranges[azimuth] = np.where(closer, distance[chunk], ranges[azimuth])
        hits[azimuth] = np.where(closer, near[pair_thing[chunk]][:, None], hits[azimuth])
    ranges[ranges > REACH_M] = np.inf
    hits[~np.isfinite(ranges)] = -1
    counts = np.bincount(hits[(hits >= 0) & (hits < actors)], minlength=actors)
    return Sweep(_points(ranges, hits, actors), counts)


def _angles(yaw: float) -> Array:
    return yaw + np.arange(AZIMUTHS) * (2 * np.pi / AZIMUTHS)


def _candidates(
    eye: Array, poses: Array, bounds: Array, yaw: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find pairs of an object and an azimuth at which a ray may hit it."""
    step = 2 * np.pi / AZIMUTHS
    c, s = np.cos(poses[:, 2:3]), np.sin(poses[:, 2:3])
    x, y = bounds[:, [0, 1, 1, 0]], bounds[:, [2, 2, 3, 3]]
    x, y = c * x - s * y + poses[:, :1] - eye[0], s * x + c * y + poses[:, 1:2] - eye[1]
    middle = np.arctan2(y.mean(axis=1), x.mean(axis=1))
    turn = (np.arctan2(y, x) - middle[:, None] + np.pi) % (2 * np.pi) - np.pi
    first = np.ceil((middle + turn.min(axis=1) - yaw) / step).astype(np.int64)
    count = np.maximum(np.floor((middle + turn.max(axis=1) - yaw) / step).astype(np.int64) - first + 1, 0)
    things = np.repeat(np.arange(len(poses)), count)
    within = np.arange(len(things)) - np.repeat(np.cumsum(count) - count, count)
    return things, (first[things] + within) % AZIMUTHS


def _cast(
    eye: Array,
    height: float,
    poses: Array,
    bounds: Array,
    thing: NDArray[np.int64],
    azimuth: NDArray[np.int64],
    yaw: float,
) -> Array:
    """(pairs, BEAMS) horizontal distance at which each beam enters a box; infinite where it misses."""
    pose, box = poses[thing], bounds[thing]
    angle = _angles(yaw)[azimuth] - pose[:, 2]
    away = eye - pose[:, :2]
    c, s = np.cos(pose[:, 2]), np.sin(pose[:, 2])
    start = np.stack((c * away[:, 0] + s * away[:, 1], -s * away[:, 0] + c * away[:, 1]), axis=1)
    along = np.stack((np.cos(angle), np.sin(angle)), axis=1)
    along = np.where(np.abs(along) < 1e-9, 1e-9, along)
    low, high = (box[:, [0, 2]] - start) / along, (box[:, [1, 3]] - start) / along
    enter = np.minimum(low, high).max(axis=1)[:, None]
    leave = np.maximum(low, high).min(axis=1)[:, None]
    rise = np.tan(ELEVATIONS)[None]
    rise = np.where(np.abs(rise) < 1e-9, 1e-9, rise)
    bottom, top = (box[:, 4:5] - height) / rise, (box[:, 5:6] - height) / rise
    enter = np.maximum(enter, np.minimum(bottom, top))
    leave = np.minimum(leave, np.maximum(bottom, top))
    return np.where((enter < leave) & (enter > 0.5), enter, np.inf)


def _one_per_azimuth(order: NDArray[np.int64], azimuth: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Split pairs into groups that name no azimuth twice, keeping their order at every azimuth."""
    by_azimuth = order[np.argsort(azimuth[order], kind="stable")]
    sorted_azimuth = azimuth[by_azimuth]
    starts = np.flatnonzero(np.r_[True, np.diff(sorted_azimuth) > 0])
    turn = np.arange(len(by_azimuth)) - np.repeat(starts, np.diff(np.r_[starts, len(by_azimuth)]))
    return [by_azimuth[turn == k] for k in range(int(turn.max()) + 1 if len(turn) else 0)]


def _points(ranges: Array, hits: NDArray[np.int64], actors: int) -> NDArray[np.float32]:
    elsewhere = (hits < 0) | (hits >= actors)
    keep = elsewhere & np.isfinite(ranges) & (np.arange(AZIMUTHS) % GROUND_STEP == 0)[:, None]
    rows = np.flatnonzero((hits >= 0) & (hits < actors))
    owner = hits.ravel()[rows]
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=actors)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    stride = np.maximum(-(-counts // ACTOR_POINTS), 1)
    keep.ravel()[rows[order[place % stride[owner[order]] == 0]]] = True
    azimuth, beam = np.nonzero(keep)
    flat = ranges[keep] + np.where(hits[keep] >= 0, INTO_M, 0.0)
    angle = azimuth * (2 * np.pi / AZIMUTHS)
    rays = np.stack((flat * np.cos(angle), flat * np.sin(angle), flat * np.tan(ELEVATIONS)[beam]), axis=1)
    local = rays @ rotation_matrix(LIDAR_ROTATION_WXYZ)
    intensity = np.where(hits[keep] < 0, 8.0, 30.0)
    return np.column_stack((local, intensity, beam)).astype(np.float32)
