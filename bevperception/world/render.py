"""Render the pictures of one scene: ground, sky, scenery and actors, with hidden surfaces by depth.

The ground is looked up in its picture from above. Things that stand on it are drawn from far to near. Where
the depths of two things that meet in the picture overlap, order alone does not tell which hides which; such
things are compared pixel by pixel by the depth at which the pixel's ray enters the box around the thing.
Since no two boxes overlap, that puts any two things in the right order at every pixel.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from bevperception.world.backdrop import SHADOW_M, Backdrop
from bevperception.world.camera import NEAR_M, Camera
from bevperception.world.cast import Cast, actor_bounds
from bevperception.world.ground import Ground
from bevperception.world.rig import CAMERAS
from bevperception.world.scenery import Prop
from bevperception.world.shadows import shadow_points
from bevperception.world.solids import Faces, Solids
from bevperception.world.weather import Weather

Array = NDArray[np.float64]

SHIFT: Final = 4
ONE: Final = 1 << SHIFT
SCENERY_M: Final = 120.0
ACTOR_M: Final = 100.0
"""Things further away are not drawn."""
SCENERY_ID: Final = -1
NOISE_MARGIN: Final = 64


@dataclass(frozen=True)
class View:
    """A rendered picture with the actor of every pixel.

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


class SceneRenderer:
    """Renders the pictures of one scene.

    Args:
        cast: the actors.
        props: scenery.
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
        self._cast, self._weather = cast, weather
        self._eyes = [Camera(mount, image_size) for mount in CAMERAS]
        self._backdrops = [Backdrop(eye, ground, weather) for eye in self._eyes]
        actors = [actor_bounds(actor.size_m) for actor in cast.actors]
        meshes = [actor.mesh for actor in cast.actors] + [prop.mesh for prop in props]
        self._solids = Solids(meshes, np.array(actors + [prop.bounds for prop in props]))
        self._poses = np.array([[0.0, 0.0, 0.0]] * len(actors) + [prop.pose.tolist() for prop in props])
        self._reach = np.array([ACTOR_M] * len(actors) + [SCENERY_M] * len(props))
        size = (image_size[0] + NOISE_MARGIN, image_size[1] + NOISE_MARGIN, 3)
        noise = rng.normal(128.0, weather.noise, size)
        self._noise = np.clip(np.round(noise), 0, 255).astype(np.uint8)

    def render(self, camera: int, time_s: float, ego_pose: Array, noise_place: tuple[int, int]) -> View:
        """Render one picture.

        Args:
            camera: number in ``rig.CAMERAS``.
            time_s: of exposure, from the first key frame.
            ego_pose: (3,) x, y, yaw at that time.
            noise_place: which part of the noise pattern lies over it, each 0 to NOISE_MARGIN.
        """
        eye, actors = self._eyes[camera], len(self._cast)
        to_global, position = eye.to_global(ego_pose)
        self._poses[:actors] = self._cast.at(time_s)[:, :3]
        near = np.linalg.norm(self._poses[:actors, :2] - position[:2], axis=1) < SHADOW_M
        shadows = shadow_points(
            self._poses[:actors][near], self._solids.bounds[:actors][near], self._weather.sun
        )
        image = self._backdrops[camera].draw(ego_pose, shadows)
        ids = np.zeros(image.shape[:2], dtype=np.int16)
        silhouette = np.zeros(actors, dtype=np.int64)
        chosen = self._solids.in_sight(eye, to_global, position, self._poses, self._reach)
        if len(chosen):
            faces = self._solids.visible_faces(chosen, eye, to_global, position, self._poses)
            canvas = _Canvas(eye, image, ids, actors)
            canvas.draw(faces, self._lit(faces), self._solids.mark[faces.face], silhouette)
        visible = np.bincount(np.maximum(ids, 0).ravel(), minlength=actors + 1)[1:]
        return View(self._expose(image, noise_place), ids, visible, silhouette)

    def _lit(self, faces: Faces) -> Array:
        """(f, 3) colours of faces in the light and the haze."""
        weather = self._weather
        sun = np.maximum(faces.normals @ weather.sun, 0.0)[:, None]
        light = weather.ambient * (0.74 + 0.26 * faces.normals[:, 2:]) + weather.direct * sun
        paint = self._solids.colours[faces.face]
        shine = weather.night * self._solids.glow[faces.face][:, None]
        colour = paint * light * (1 - shine) + np.minimum(paint * 1.6 + 30.0, 255.0) * shine
        keep = np.repeat(np.exp(-faces.distance / weather.haze_m), np.diff(faces.start))[:, None]
        return np.asarray(np.clip(colour * keep + weather.haze * (1 - keep), 0, 255))

    def _expose(self, image: NDArray[np.uint8], noise_place: tuple[int, int]) -> NDArray[np.uint8]:
        row, column = noise_place
        noise = self._noise[row : row + image.shape[0], column : column + image.shape[1]]
        soft = cv2.GaussianBlur(image, (3, 3), 0.55)
        return np.asarray(cv2.addWeighted(soft, 1.0, noise, 1.0, -128.0))


class _Canvas:
    """A picture being drawn, with the nearness and the owner of its pixels."""

    def __init__(self, eye: Camera, image: NDArray[np.uint8], ids: NDArray[np.int16], actors: int) -> None:
        self._eye, self._image, self._ids, self._actors = eye, image, ids, actors
        self._held = np.zeros(image.shape[:2], dtype=np.float32)
        self._scratch = np.empty_like(image)
        self._mask = np.empty(image.shape[:2], dtype=np.uint8)

    def draw(
        self, faces: Faces, colours: Array, mark: NDArray[np.bool_], silhouette: NDArray[np.int64]
    ) -> None:
        """Draw things from far to near; the pixels of actors' silhouettes are written into ``silhouette``."""
        points = np.round(np.clip(faces.pixels, -1e6, 1e6) * ONE).astype(np.int32)
        shapes = list(points)
        starts = faces.start.tolist()
        spans = [slice(a, b) for a, b in itertools.pairwise(starts)]
        low, high = points.min(axis=1), points.max(axis=1)
        for index in np.flatnonzero(faces.behind).tolist():
            for row in range(*spans[index].indices(len(shapes))):
                shapes[row] = self._clipped(faces.corners[row])
                if len(shapes[row]):
                    low[row], high[row] = shapes[row].min(axis=0), shapes[row].max(axis=0)
                else:
                    low[row], high[row] = ONE << 20, -ONE << 20
        boxes = self._boxes(low, high, spans)
        compared = self._overlap(boxes, faces.nearness).tolist()
        paints, marks = colours.tolist(), mark.tolist()
        for index, thing in enumerate(faces.things.tolist()):
            x0, y0, x1, y1 = boxes[index].tolist()
            if x1 <= x0 or y1 <= y0:
                continue
            span, window = spans[index], (slice(y0, y1), slice(x0, x1))
            number = thing + 1 if thing < self._actors else SCENERY_ID
            drawn = list(zip(shapes[span], paints[span], marks[span], strict=True))
            if compared[index]:
                planes = faces.planes[index][np.isfinite(faces.planes[index, :, 2])]
                count = self._compare(drawn, window, planes, faces.nearness[index], number)
            else:
                count = self._cover(drawn, window, number)
            if thing < self._actors:
                silhouette[thing] = count

    def _boxes(
        self, low: NDArray[np.int32], high: NDArray[np.int32], spans: list[slice]
    ) -> NDArray[np.int64]:
        """(t, 4) pixels x, y from and to that things' faces lie in; from beyond to where there are none."""
        boxes = np.zeros((len(spans), 4), dtype=np.int64)
        filled = [index for index, span in enumerate(spans) if span.stop > span.start]
        if filled:
            firsts = [spans[index].start for index in filled]
            boxes[filled, :2] = np.minimum.reduceat(low, firsts) // ONE - 1
            boxes[filled, 2:] = np.maximum.reduceat(high, firsts) // ONE + 3
        edge = [self._eye.width, self._eye.height]
        return np.asarray(np.clip(boxes, 0, edge + edge))

    @staticmethod
    def _overlap(boxes: NDArray[np.int64], nearness: Array) -> NDArray[np.bool_]:
        """(t,) whether an object overlaps another in the picture and in depth."""
        x0, y0, x1, y1 = (boxes[:, k] for k in range(4))
        least, most = nearness[:, 0], nearness[:, 1]
        meet = (x0[:, None] < x1[None]) & (x0[None] < x1[:, None])
        meet &= (y0[:, None] < y1[None]) & (y0[None] < y1[:, None])
        meet &= (least[:, None] < most[None]) & (least[None] < most[:, None])
        np.fill_diagonal(meet, False)
        return np.asarray(meet.any(axis=1))

    def _clipped(self, corners: Array) -> NDArray[np.int32]:
        """Outline of a face that may reach behind the near plane; empty if nothing is left."""
        points = _clip_near(corners)
        if len(points) < 3:
            return np.zeros((0, 2), dtype=np.int32)
        return np.asarray(np.round(np.clip(self._eye.project(points), -1e6, 1e6) * ONE), dtype=np.int32)

    def _cover(
        self,
        drawn: list[tuple[NDArray[np.int32], list[float], bool]],
        window: tuple[slice, slice],
        number: int,
    ) -> int:
        """Draw over everything so far; returns the number of pixels."""
        for outline, colour, mark in drawn:
            if len(outline):
                cv2.fillConvexPoly(self._image, outline, colour, cv2.LINE_8, SHIFT)
                if not mark:
                    cv2.fillConvexPoly(self._ids, outline, (number,), cv2.LINE_8, SHIFT)
        return 0 if number == SCENERY_ID else int(np.count_nonzero(self._ids[window] == number))

    def _compare(
        self,
        drawn: list[tuple[NDArray[np.int32], list[float], bool]],
        window: tuple[slice, slice],
        planes: Array,
        nearness: Array,
        number: int,
    ) -> int:
        """Draw where it is nearer than what was compared before; returns the pixels of the silhouette."""
        mask = self._mask[window]
        mask[:] = 0
        for outline, colour, mark in drawn:
            if len(outline):
                cv2.fillConvexPoly(self._scratch, outline, colour, cv2.LINE_8, SHIFT)
                if not mark:
                    cv2.fillConvexPoly(self._mask, outline, (255,), cv2.LINE_8, SHIFT)
        rows, columns = (np.arange(part.start, part.stop) for part in window)
        near = np.full(mask.shape, nearness[1], dtype=np.float32)
        for a, b, c in planes.tolist():
            np.minimum(
                near,
                np.add.outer((b * rows + c).astype(np.float32), (a * columns).astype(np.float32)),
                out=near,
            )
        np.maximum(near, np.float32(nearness[0]), out=near)
        held = self._held[window]
        shown = cv2.bitwise_and(mask, cv2.compare(near, held, cv2.CMP_GT))
        cv2.copyTo(near, shown, held)
        cv2.copyTo(self._scratch[window], shown, self._image[window])
        np.copyto(self._ids[window], number, where=shown.astype(bool))
        return int(cv2.countNonZero(mask)) if number != SCENERY_ID else 0


def _clip_near(points: Array) -> Array:
    """A polygon of camera-frame points, cut off at the near plane."""
    kept = []
    for index in range(len(points)):
        a, b = points[index - 1], points[index]
        if (a[2] >= NEAR_M) != (b[2] >= NEAR_M):
            kept.append(a + (b - a) * (NEAR_M - a[2]) / (b[2] - a[2]))
        if b[2] >= NEAR_M:
            kept.append(b)
    return np.array(kept).reshape(-1, 3)
