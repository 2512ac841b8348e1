"""Properties of the pictures over seeds: boxes lie on their actors, hidden things are hidden."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.geometry_utils import view_points

from bevperception.world import WorldConfig
from bevperception.world.camera import NEAR_M, Camera
from bevperception.world.cast import actor_bounds
from bevperception.world.render import View
from bevperception.world.rig import CAMERAS
from bevperception.world.scene import Scene
from tests.world.conftest import SMALL

Array = NDArray[np.float64]
SIZE = (225, 400)


@lru_cache(maxsize=4)
def scene_of(seed: int) -> Scene:
    return Scene(WorldConfig(scenes=1, seed=seed, frames=12, image_size=SIZE), 0)


def exposure(scene: Scene, camera: int, frame: int) -> tuple[float, Array, View]:
    time_s = scene.frame_time_s(frame) + CAMERAS[camera].delay_us * 1e-6
    pose = scene.stage.ego.poses(np.array([time_s]))[0]
    return time_s, pose, scene.renderer.render(camera, time_s, pose, (0, 0))


def box_corners(state: Array, bounds: Array) -> Array:
    """(8, 3) global corners, computed apart from the renderer."""
    x0, x1, y0, y1, z0, z1 = bounds
    local = np.array([(x, y, z) for x in (x0, x1) for y in (y0, y1) for z in (z0, z1)])
    c, s = np.cos(state[2]), np.sin(state[2])
    return local @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + [state[0], state[1], 0.0]


def box_mask(corners_camera: Array, intrinsics: Array, grow_px: float) -> NDArray[np.bool_]:
    """Pixels of the projected box, grown; all of them if the box reaches behind the camera."""
    mask = np.zeros(SIZE, dtype=np.uint8)
    if corners_camera[:, 2].min() < NEAR_M + 0.05:
        return np.ones(SIZE, dtype=bool)
    pixels = corners_camera @ intrinsics.T
    hull = cv2.convexHull((pixels[:, :2] / pixels[:, 2:]).astype(np.float32))
    cv2.fillConvexPoly(mask, np.round(hull * 16).astype(np.int32), (255,), cv2.LINE_8, 4)
    size = 2 * int(np.ceil(grow_px)) + 1
    return cv2.dilate(mask, np.ones((size, size), np.uint8)) > 0


@settings(max_examples=12)
@given(seed=st.integers(0, 2), camera=st.integers(0, 5), frame=st.integers(0, 11))
def test_silhouettes_fill_and_stay_inside_the_projected_boxes(seed: int, camera: int, frame: int) -> None:
    scene = scene_of(seed)
    time_s, ego_pose, view = exposure(scene, camera, frame)
    eye = Camera(CAMERAS[camera], SIZE)
    to_global, position = eye.to_global(ego_pose)
    states = scene.stage.cast.at(time_s)
    assert (view.visible_px <= view.silhouette_px).all()
    for number in np.flatnonzero(view.visible_px).tolist():
        corners = box_corners(states[number], actor_bounds(scene.stage.cast.actors[number].size_m))
        local = (corners - position) @ to_global
        mask = box_mask(local, eye.intrinsics, 1.0)
        assert not ((view.instance_ids == number + 1) & ~mask).any()
        if local[:, 2].min() > 0.5 and view.silhouette_px[number] > 60:
            filled = view.silhouette_px[number] / box_mask(local, eye.intrinsics, 0.0).sum()
            assert filled > 0.2, scene.stage.cast.actors[number].kind


@settings(max_examples=10)
@given(seed=st.integers(0, 2), camera=st.integers(0, 5), frame=st.integers(0, 11))
def test_every_pixel_shows_the_nearest_surface(seed: int, camera: int, frame: int) -> None:
    """Against a ray caster over all triangles of all meshes, away from outlines."""
    scene = scene_of(seed)
    time_s, ego_pose, view = exposure(scene, camera, frame)
    eye = Camera(CAMERAS[camera], SIZE)
    to_global, position = eye.to_global(ego_pose)
    triangles, owner = triangles_of(scene, time_s)
    kernel = np.ones((3, 3), np.uint8)
    ids = view.instance_ids
    even = cv2.erode(ids, kernel) == cv2.dilate(ids, kernel)
    rows, columns = np.nonzero(even)
    rng = np.random.default_rng(seed)
    for k in rng.choice(len(rows), 60, replace=False).tolist():
        row, column = int(rows[k]), int(columns[k])
        ray = to_global @ np.linalg.inv(eye.intrinsics) @ np.array([column, row, 1.0])
        distance = cast_ray(position, ray, triangles)
        nearest = int(distance.argmin())
        if 90.0 < distance[nearest] < np.inf:
            continue  # such things may be left out
        expected = owner[nearest] if distance[nearest] < np.inf else 0
        assert ids[row, column] == expected, (row, column)


def triangles_of(scene: Scene, time_s: float) -> tuple[Array, NDArray[np.int64]]:
    """(n, 3, 3) triangles in the global frame and the value of their pixels in the picture of instances."""
    cast = scene.stage.cast
    things = [
        (actor.mesh, state[:3], k + 1)
        for k, (actor, state) in enumerate(zip(cast.actors, cast.at(time_s), strict=True))
    ]
    things += [(prop.mesh, prop.pose, -1) for prop in scene.props]
    triangles, owner = [], []
    for mesh, pose, number in things:
        c, s = np.cos(pose[2]), np.sin(pose[2])
        vertices = mesh.vertices @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + [pose[0], pose[1], 0.0]
        corners = vertices[mesh.corners[~mesh.mark]]
        for k in range(1, corners.shape[1] - 1):
            triangles.append(corners[:, [0, k, k + 1]])
            owner += [number] * len(corners)
    return np.concatenate(triangles), np.array(owner)


def cast_ray(eye: Array, ray: Array, triangles: Array) -> Array:
    """(n,) distance, in units of the ray, at which it meets the outside of each triangle.

    Source: Moeller and Trumbore, 1997. Faces show from outside only: the inside of a wheel does not.
    """
    a, ab, ac = triangles[:, 0], triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    across = np.cross(ray, ac)
    scale = (ab * across).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        away = eye - a
        u = (away * across).sum(axis=1) / scale
        q = np.cross(away, ab)
        v = (q @ ray) / scale
        distance = (ac * q).sum(axis=1) / scale
        hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (distance > NEAR_M)
    return np.where(hit & (scale > 1e-12), distance, np.inf)


def test_annotated_boxes_lie_on_the_pixels_of_their_actors(world: Path, nusc: NuScenes) -> None:
    """By the devkit's own projection, which takes a box at the sample's time for one at the exposure."""
    on, every = 0, 0
    for number, scene_record in enumerate(nusc.scene):
        scene = Scene(SMALL, number)
        places = np.array([actor.states[0, :2] for actor in scene.stage.cast.actors if actor.is_static])
        numbers = [k for k, actor in enumerate(scene.stage.cast.actors) if actor.is_static]
        sample = nusc.get("sample", scene_record["first_sample_token"])
        sample = nusc.get("sample", sample["next"])
        for camera, mount in enumerate(CAMERAS):
            token = sample["data"][mount.channel]
            _, _, view = exposure(scene, camera, 1)
            path, boxes, intrinsics = nusc.get_sample_data(token)
            image = cv2.imread(str(path))
            assert np.abs(image.astype(int) - view.image).mean() < 6.0  # JPEG and the noise
            for box in boxes:
                translation = nusc.get("sample_annotation", box.token)["translation"]
                nearest = int(np.linalg.norm(places - translation[:2], axis=1).argmin())
                if np.linalg.norm(places[nearest] - translation[:2]) > 0.01:
                    continue  # it moves
                corners = box.corners()
                if corners[2].min() < 0.5:
                    continue
                drawn = view.instance_ids == numbers[nearest] + 1
                if drawn.any():
                    pixels = view_points(corners, intrinsics, normalize=True)[:2].T
                    hull = cv2.convexHull(pixels.astype(np.float32))
                    mask = np.zeros(SIZE, np.uint8)
                    cv2.fillConvexPoly(mask, np.round(hull * 16).astype(np.int32), (255,), cv2.LINE_8, 4)
                    grown = cv2.dilate(mask, np.ones((3, 3), np.uint8)) > 0
                    assert not (drawn & ~grown).any()
                    on, every = on + 1, every + int(drawn.sum())
    assert on >= 15
    assert every > 1000


def test_hidden_actors_have_no_lidar_points_and_low_visibility(nusc: NuScenes) -> None:
    levels = [record["visibility_token"] for record in nusc.sample_annotation]
    assert {"1", "4"} <= set(levels)
    assert min(record["num_lidar_pts"] for record in nusc.sample_annotation) >= 1


@pytest.mark.parametrize("size", [(225, 400), (450, 800), (900, 1600)])
def test_rig_scales_with_the_picture(size: tuple[int, int]) -> None:
    for mount in CAMERAS:
        full, scaled = Camera(mount, (900, 1600)), Camera(mount, size)
        point = np.array([[1.0, 0.5, 8.0]])
        factor = size[1] / 1600
        np.testing.assert_allclose(scaled.project(point), full.project(point) * factor, rtol=1e-12)
