"""The pictures of one scene: ground, sky, scenery and actors, hidden surfaces by depth.

The ground is looked up in its picture from above. Everything that stands on it is drawn thing by thing:
its faces from far to near within the thing, then, pixel by pixel, only where it is nearer than what was
drawn before. The depth of a pixel is where its ray enters the box around the thing: since no two boxes
overlap, that puts any two things in the right order at every pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from bevperception.data.world.camera import NEAR_M, Camera
from bevperception.data.world.cast import Cast
from bevperception.data.world.ground import Ground, shadow_outline
from bevperception.data.world.meshes import Mesh
from bevperception.data.world.rig import CAMERAS
from bevperception.data.world.scenery import Prop
from bevperception.data.world.weather import Weather

Array = NDArray[np.float64]

SHIFT: Final = 4
ONE: Final = 1 << SHIFT
SCENERY_M: Final = 130.0
"""Scenery further away is not drawn."""
ACTOR_M: Final = 110.0
SMALL_PX: Final = 16.0
SCENERY_ID: Final = -1
NOISE_MARGIN: Final = 64


@dataclass(frozen=True)
class View:
    """What one camera saw.

    Attributes:
        image: (height, width, 3) blue, green, red.
        instance_ids: (height, width) actor number + 1; 0 ground and sky; SCENERY_ID buildings and trees.
        visible_px: (actors,) pixels of each actor in the picture.
        silhouette_px: (actors,) pixels it would have if nothing stood in front of it.
    """

    image: NDArray[np.uint8]
    instance_ids: NDArray[np.int16]
    visible_px: NDArray[np.int64]
    silhouette_px: NDArray[np.int64]


@dataclass
class _Canvas:
    image: NDArray[np.uint8]
    nearness: NDArray[np.float32]
    ids: NDArray[np.int16]
    scratch: NDArray[np.uint8]
    mask: NDArray[np.uint8]


class SceneRenderer:
    """Renders the pictures of one scene.

    Args:
        cast: the actors.
        props: scenery; what lies far from the ego car is skipped picture by picture.
        ground: picture of the ground, lit.
        weather: light.
        image_size: (height, width).
        rng: of the sensor noise's pattern.
    """

    def __init__(
        self,
        cast: Cast,
        props: list[Prop],
        ground: Ground,
        weather: Weather,
        image_size: tuple[int, int],
        rng: np.random.Generator,
    ) -> None:
        self._cast, self._ground, self._weather = cast, ground, weather
        self._cameras = [Camera(mount, image_size) for mount in CAMERAS]
        self._subrows = 4 if image_size[1] <= 800 else 2
        self._bands = [
            c.ground_bands(ground.texel_m, len(ground.levels), self._subrows) for c in self._cameras
        ]
        self._backdrops = [_backdrop(camera, weather) for camera in self._cameras]
        self._props = [_Thing(prop.mesh, prop.bounds, SCENERY_ID) for prop in props]
        self._prop_poses = np.array([prop.pose for prop in props]).reshape(-1, 3)
        self._actors = [
            _Thing(actor.mesh, actor_bounds(actor.size_m), number + 1) for number, actor in enumerate(cast.actors)
        ]
        size = (image_size[0] + NOISE_MARGIN, image_size[1] + NOISE_MARGIN, 3)
        noise = rng.normal(128.0, weather.noise, size)
        self._noise = np.clip(np.round(noise), 0, 255).astype(np.uint8)

    def render(self, camera: int, time_s: float, ego_pose: Array, noise_place: tuple[int, int]) -> View:
        """One picture.

        Args:
            camera: number in ``rig.CAMERAS``.
            time_s: of exposure, from the first key frame.
            ego_pose: (3,) x, y, yaw at that time.
            noise_place: which part of the noise pattern lies over it, each 0 to NOISE_MARGIN.
        """
        eye = self._cameras[camera]
        to_global, position = eye.to_global(ego_pose)
        states = self._cast.at(time_s)[:, :3]
        canvas = self._ground_and_sky(camera, ego_pose, states)
        silhouette = np.zeros(len(self._actors), dtype=np.int64)
        for index in _in_sight(eye, to_global, position, self._prop_poses, self._props, SCENERY_M):
            self._draw(canvas, eye, to_global, position, self._props[index], self._prop_poses[index])
        for index in _in_sight(eye, to_global, position, states, self._actors, ACTOR_M):
            silhouette[index] = self._draw(
                canvas, eye, to_global, position, self._actors[index], states[index]
            )
        count = len(self._actors) + 1
        visible = np.bincount(np.maximum(canvas.ids, 0).ravel(), minlength=count)[1:]
        return View(self._expose(canvas.image, noise_place), canvas.ids, visible, silhouette)

    def _ground_and_sky(self, camera: int, ego_pose: Array, states: Array) -> _Canvas:
        eye, ground = self._cameras[camera], self._ground
        backdrop, keep, fade = self._backdrops[camera]
        c, s = np.cos(ego_pose[2]), np.sin(ego_pose[2])
        place = np.array([[c, -s, ego_pose[0]], [s, c, ego_pose[1]], [0.0, 0.0, 1.0]])
        image = backdrop.copy()
        first = self._bands[camera][0].start
        rows = np.empty((eye.height - first, eye.width, 3), dtype=np.uint8)
        for band in self._bands[camera]:
            count = band.stop - band.start
            spread = np.array(
                [[1.0, 0.0, 0.0], [0.0, 1 / self._subrows, band.start + 0.5 / self._subrows - 0.5], [0.0, 0.0, 1.0]]
            )
            matrix = ground.to_texel(band.level) @ place @ eye.ground_homography @ spread
            fine = cv2.warpPerspective(
                ground.levels[band.level],
                matrix,
                (eye.width, count * self._subrows),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REPLICATE,
            )
            rows[band.start - first : band.stop - first] = cv2.resize(
                fine, (eye.width, count), interpolation=cv2.INTER_AREA
            )
        self._shade_ground(rows, eye, ego_pose, states, first)
        image[first:] = cv2.blendLinear(rows, image[first:], keep[first:], fade[first:])
        shape = (eye.height, eye.width)
        return _Canvas(
            image,
            np.zeros(shape, dtype=np.float32),
            np.zeros(shape, dtype=np.int16),
            np.empty((*shape, 3), dtype=np.uint8),
            np.empty(shape, dtype=np.uint8),
        )

    def _shade_ground(
        self, rows: NDArray[np.uint8], eye: Camera, ego_pose: Array, states: Array, first: int
    ) -> None:
        """Darken the ground under the actors."""
        to_global, position = eye.to_global(ego_pose)
        mask = np.zeros(rows.shape[:2], dtype=np.uint8)
        for index in _in_sight(eye, to_global, position, states, self._actors, 60.0):
            outline = shadow_outline(states[index], self._actors[index].bounds, self._weather.sun)
            local = np.column_stack((outline, np.zeros(len(outline)))) - position
            points = _clip_near(local @ to_global)
            if len(points) >= 3:
                pixels = _project(points, eye) - [0.0, first]
                cv2.fillConvexPoly(mask, np.round(pixels * ONE).astype(np.int32), 255, cv2.LINE_8, SHIFT)
        cv2.copyTo(cv2.convertScaleAbs(rows, alpha=self._weather.shadow), mask, rows)

    def _draw(
        self, canvas: _Canvas, eye: Camera, to_global: Array, position: Array, thing: _Thing, pose: Array
    ) -> int:
        """Draw one thing; returns the pixels of its silhouette."""
        c, s = np.cos(pose[2]), np.sin(pose[2])
        turn = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
        to_camera = to_global.T @ turn
        offset = to_global.T @ (np.array([pose[0], pose[1], 0.0]) - position)
        mesh = thing.mesh
        vertices = mesh.vertices @ to_camera.T + offset
        facing = ((mesh.normals @ to_camera.T) * vertices[mesh.corners[:, 0]]).sum(axis=1) < 0
        distance = float(np.linalg.norm(offset))
        if eye.focal_px * thing.radius / distance < SMALL_PX:
            facing &= ~mesh.fine
        away = ((mesh.centres @ to_camera.T + offset) ** 2).sum(axis=1)
        rank = np.empty(len(away), dtype=np.int64)
        rank[np.lexsort((-away, mesh.layer))] = np.arange(len(away))
        faces = np.flatnonzero(facing)
        faces = faces[np.argsort(rank[mesh.part[faces]], kind="stable")]
        polygons = _polygons(vertices, mesh.corners[faces], eye)
        colours = self._lit(thing, faces, turn, distance)
        return _paint(canvas, eye, polygons, colours, _box_nearness(eye, thing, to_camera, offset), thing.number)

    def _lit(self, thing: _Thing, faces: NDArray[np.int64], turn: Array, distance: float) -> Array:
        weather, mesh = self._weather, thing.mesh
        normals = mesh.normals[faces] @ turn.T
        sun = np.maximum(normals @ weather.sun, 0.0)[:, None]
        light = weather.ambient * (0.74 + 0.26 * normals[:, 2:3]) + weather.direct * sun
        colour = mesh.colours[faces]
        shine = weather.night * mesh.glow[faces][:, None]
        colour = colour * light * (1 - shine) + np.minimum(colour * 1.6 + 30.0, 255.0) * shine
        keep = np.exp(-distance / weather.haze_m)
        return np.clip(colour * keep + weather.haze * (1 - keep), 0, 255)

    def _expose(self, image: NDArray[np.uint8], noise_place: tuple[int, int]) -> NDArray[np.uint8]:
        row, column = noise_place
        noise = self._noise[row : row + image.shape[0], column : column + image.shape[1]]
        soft = cv2.GaussianBlur(image, (3, 3), 0.55)
        return np.asarray(cv2.addWeighted(soft, 1.0, noise, 1.0, -128.0))


class _Thing:
    """A mesh with the box around it, and its number in the picture of instances."""

    def __init__(self, mesh: Mesh, bounds: Array, number: int) -> None:
        self.mesh, self.bounds, self.number = mesh, bounds, number
        corners = np.array([(x, y, z) for x in bounds[:2] for y in bounds[2:4] for z in bounds[4:]])
        self.centre = corners.mean(axis=0)
        self.radius = float(np.linalg.norm(corners - self.centre, axis=1).max())
        # Planes n . p = d of the box, outwards: front, back, left, right, top, bottom.
        self.normals = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=float)
        self.offsets = np.array([bounds[1], -bounds[0], bounds[3], -bounds[2], bounds[5], -bounds[4]])
        self.corners = corners


def actor_bounds(size_m: tuple[float, float, float]) -> Array:
    """(6,) x, y, z from and to of an actor's box in its own frame."""
    length, width, height = size_m
    return np.array([-length / 2, length / 2, -width / 2, width / 2, 0.0, height])


def _backdrop(
    camera: Camera, weather: Weather
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """The picture without ground, and the shares of ground and of this picture at each pixel."""
    height = np.clip(camera.elevation / np.deg2rad(28.0), 0.0, 1.0)[..., None] ** 0.7
    sky = weather.sky_low * (1 - height) + weather.sky_top * height
    below = camera.elevation[..., None] < 0
    image = np.where(below, weather.haze, sky).astype(np.uint8)
    keep = np.exp(-camera.ground_distance / weather.haze_m).astype(np.float32)
    return image, keep, 1.0 - keep


def _in_sight(
    eye: Camera, to_global: Array, position: Array, poses: Array, things: list[_Thing], reach_m: float
) -> list[int]:
    """Numbers of the things whose bounding sphere may touch the picture."""
    if not things:
        return []
    radius = np.array([thing.radius for thing in things])
    height = np.array([thing.centre[2] for thing in things])
    local = (np.column_stack((poses[:, :2], height)) - position) @ to_global
    depth = local[:, 2]
    k = eye.intrinsics
    sides = np.array(
        [
            [k[0, 0], 0.0, k[0, 2]],
            [-k[0, 0], 0.0, eye.width - 1 - k[0, 2]],
            [0.0, k[1, 1], k[1, 2]],
            [0.0, -k[1, 1], eye.height - 1 - k[1, 2]],
        ]
    )
    sides /= np.linalg.norm(sides, axis=1, keepdims=True)
    inside = (local @ sides.T > -radius[:, None]).all(axis=1)
    return np.flatnonzero(inside & (depth > NEAR_M - radius) & (depth < reach_m)).tolist()


def _clip_near(points: Array) -> Array:
    """A polygon of camera-frame points, cut off at the near plane."""
    depth = points[:, 2]
    if depth.min() >= NEAR_M:
        return points
    kept = []
    for index in range(len(points)):
        a, b = points[index - 1], points[index]
        if (a[2] >= NEAR_M) != (b[2] >= NEAR_M):
            kept.append(a + (b - a) * (NEAR_M - a[2]) / (b[2] - a[2]))
        if b[2] >= NEAR_M:
            kept.append(b)
    return np.array(kept).reshape(-1, 3)


def _project(points: Array, eye: Camera) -> Array:
    """(n, 2) pixels of camera-frame points in front of the near plane."""
    k = eye.intrinsics
    return np.asarray(points[:, :2] / points[:, 2:] * [k[0, 0], k[1, 1]] + [k[0, 2], k[1, 2]])


def _polygons(vertices: Array, corners: NDArray[np.int64], eye: Camera) -> list[Array]:
    """Pixel outlines of faces; empty ones for faces behind the camera."""
    if vertices[:, 2].min() >= NEAR_M:
        return list(_project(vertices, eye)[corners])
    outlines = []
    for face in corners:
        points = _clip_near(vertices[face])
        outlines.append(_project(points, eye) if len(points) >= 3 else np.zeros((0, 2)))
    return outlines


def _box_nearness(eye: Camera, thing: _Thing, to_camera: Array, offset: Array) -> tuple[Array, float, float]:
    """How near (1 / depth) the rays of the pixels enter a thing's box.

    Returns:
        (n, 3) planes whose smallest value a u + b v + c at a pixel it is; its least and greatest value.
    """
    normals = thing.normals @ to_camera.T
    away = thing.offsets + normals @ offset
    front = away < -1e-6
    planes = normals[front] @ np.linalg.inv(eye.intrinsics) / away[front, None]
    depth = (thing.corners @ to_camera.T + offset)[:, 2]
    return planes, 1 / float(depth.max()), 1 / max(float(depth.min()), NEAR_M)


def _paint(
    canvas: _Canvas,
    eye: Camera,
    polygons: list[Array],
    colours: Array,
    nearness: tuple[Array, float, float],
    number: int,
) -> int:
    outlines = [p for p in polygons if len(p)]
    if not outlines:
        return 0
    every = np.concatenate(outlines)
    x0, y0 = np.maximum(np.floor(every.min(axis=0)).astype(int) - 1, 0).tolist()
    x1 = min(int(every[:, 0].max()) + 3, eye.width)
    y1 = min(int(every[:, 1].max()) + 3, eye.height)
    if x1 <= x0 or y1 <= y0:
        return 0
    scratch, mask = canvas.scratch[: y1 - y0, : x1 - x0], canvas.mask[: y1 - y0, : x1 - x0]
    mask[:] = 0
    shift = np.array([x0, y0])
    for outline, colour in zip(polygons, colours.tolist(), strict=True):
        if len(outline):
            points = np.round((outline - shift) * ONE).astype(np.int32)
            cv2.fillConvexPoly(scratch, points, colour, cv2.LINE_8, SHIFT)
            cv2.fillConvexPoly(mask, points, 255, cv2.LINE_8, SHIFT)
    planes, least, most = nearness
    u, v = np.arange(x0, x1), np.arange(y0, y1)
    near = np.full((y1 - y0, x1 - x0), most, dtype=np.float32)
    for a, b, c in planes:
        np.minimum(near, np.add.outer((b * v + c).astype(np.float32), (a * u).astype(np.float32)), out=near)
    np.maximum(near, np.float32(least), out=near)
    held = canvas.nearness[y0:y1, x0:x1]
    shown = cv2.bitwise_and(mask, cv2.compare(near, held, cv2.CMP_GT))
    silhouette = cv2.countNonZero(mask)
    cv2.copyTo(near, shown, held)
    cv2.copyTo(scratch, shown, canvas.image[y0:y1, x0:x1])
    np.copyto(canvas.ids[y0:y1, x0:x1], number, where=shown.astype(bool))
    return silhouette
