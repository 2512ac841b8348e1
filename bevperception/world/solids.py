"""All objects of a scene as one set of arrays, so that a picture's geometry is computed in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bevperception.world.camera import NEAR_M, Camera
from bevperception.world.meshes import Mesh

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

SMALL_PX: Final = 15.0
"""Things with a smaller radius in the picture are drawn without their fine marks."""

_PLANES = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=np.float64)


@dataclass(frozen=True)
class Faces:
    """Faces of things as one camera sees them, thing by thing from far to near.

    Attributes:
        things: (t,) numbers of the things.
        start: (t + 1,) where each thing's faces begin.
        pixels: (f, CORNERS, 2) corners in the picture; meaningless for things that reach behind the camera.
        corners: (f, CORNERS, 3) in the camera frame.
        behind: (t,) bool, whether a thing reaches behind the near plane.
        normals: (f, 3) in the global frame.
        face: (f,) which face of the scene it is.
        distance: (t,) metres from the camera.
        planes: (t, 6, 3) see :meth:`Solids.see`.
        nearness: (t, 2) least and greatest 1 / depth.
    """

    things: Indices
    start: Indices
    pixels: Array
    corners: Array
    behind: NDArray[np.bool_]
    normals: Array
    face: Indices
    distance: Array
    planes: Array
    nearness: Array


class Solids:
    """All meshes of a scene with the boxes around them.

    Args:
        meshes: of the things.
        bounds: (t, 6) x, y, z from and to of each thing's box in its own frame; the mesh lies inside.

    Attributes:
        bounds: as given.
        colours, glow, mark: of all faces, see :class:`Mesh`.
    """

    def __init__(self, meshes: Sequence[Mesh], bounds: Array) -> None:
        self.bounds = bounds
        self.colours = np.concatenate([mesh.colours for mesh in meshes])
        self.glow = np.concatenate([mesh.glow for mesh in meshes])
        self.mark = np.concatenate([mesh.mark for mesh in meshes])
        self._fine = np.concatenate([mesh.fine for mesh in meshes])
        self._vertices = np.concatenate([mesh.vertices for mesh in meshes])
        self._normals = np.concatenate([mesh.normals for mesh in meshes])
        self._corners = np.concatenate([mesh.corners for mesh in meshes])
        self._part = np.concatenate([mesh.part for mesh in meshes])
        self._layer = np.concatenate([mesh.layer for mesh in meshes])
        self._centres = np.concatenate([mesh.centres for mesh in meshes])
        self._vertex_ranges = _ranges([len(mesh.vertices) for mesh in meshes])
        self._face_ranges = _ranges([len(mesh.normals) for mesh in meshes])
        self._part_ranges = _ranges([len(mesh.layer) for mesh in meshes])
        x, y, z = bounds[:, [0, 0, 0, 0, 1, 1, 1, 1]], bounds[:, [2, 2, 3, 3] * 2], bounds[:, [4, 5] * 4]
        self._box = np.stack((x, y, z), axis=-1)
        self._box_offsets = np.stack(
            [bounds[:, k] * (1 if k % 2 else -1) for k in (1, 0, 3, 2, 5, 4)], axis=1
        )
        self.centre = self._box.mean(axis=1)
        self.radius = np.linalg.norm(self._box - self.centre[:, None], axis=-1).max(axis=1)

    def in_sight(
        self, eye: Camera, to_global: Array, position: Array, poses: Array, reach_m: Array
    ) -> Indices:
        """Numbers of the things whose bounding sphere may touch the picture.

        Args:
            eye, to_global, position: the camera and where it is.
            poses: (t, 3) x, y, yaw.
            reach_m: (t,) how far each is drawn.
        """
        c, s = np.cos(poses[:, 2]), np.sin(poses[:, 2])
        x, y = self.centre[:, 0], self.centre[:, 1]
        centre = np.stack(
            (poses[:, 0] + c * x - s * y, poses[:, 1] + s * x + c * y, self.centre[:, 2]), axis=1
        )
        local = (centre - position) @ to_global
        inside = (local @ eye.side_planes.T > -self.radius[:, None]).all(axis=1)
        depth = local[:, 2]
        return np.flatnonzero(inside & (depth > NEAR_M - self.radius) & (depth < reach_m))

    def visible_faces(
        self, chosen: Indices, eye: Camera, to_global: Array, position: Array, poses: Array
    ) -> Faces:
        """Select the faces of some objects that are turned to the camera, in drawing order.

        The nearness at which a pixel's ray enters the box of a thing is the smallest of the values
        a u + b v + c of its planes, of which those turned away are left at infinity.

        Args:
            chosen: numbers of the things.
            eye, to_global, position: the camera and where it is.
            poses: (t, 3) of all things.
        """
        pose = poses[chosen]
        c, s = np.cos(pose[:, 2]), np.sin(pose[:, 2])
        zero, one = np.zeros_like(c), np.ones_like(c)
        turn = np.stack((c, -s, zero, s, c, zero, zero, zero, one), axis=1).reshape(-1, 3, 3)
        place = np.column_stack((pose[:, :2], zero)) - position
        box = (self._box[chosen] @ turn.transpose(0, 2, 1) + place[:, None]) @ to_global
        depth = np.stack((box[..., 2].max(axis=1), np.maximum(box[..., 2].min(axis=1), NEAR_M)), axis=1)
        order = np.argsort(-depth[:, 1], kind="stable")
        chosen, turn, place, depth = chosen[order], turn[order], place[order], depth[order]

        rows, counts = _gather(self._vertex_ranges, chosen)
        owner = np.repeat(np.arange(len(chosen)), counts)
        world = (turn[owner] @ self._vertices[rows][..., None])[..., 0] + place[owner]
        starts = np.cumsum(counts) - counts
        faces, face_counts = _gather(self._face_ranges, chosen)
        face_owner = np.repeat(np.arange(len(chosen)), face_counts)
        corners = self._corners[faces] + starts[face_owner][:, None]
        normals = (turn[face_owner] @ self._normals[faces][..., None])[..., 0]
        distance = np.linalg.norm(place, axis=1)
        small = eye.focal_px * self.radius[chosen] / np.maximum(distance, 0.1) < SMALL_PX
        kept = (normals * world[corners[:, 0]]).sum(axis=1) < 0
        kept &= ~(small[face_owner] & self._fine[faces])
        rank = self._part_ranks(chosen, turn, place)
        kept_rows = np.flatnonzero(kept)
        part_starts = np.cumsum([len(self._part_ranges[t]) for t in chosen]) - [
            len(self._part_ranges[t]) for t in chosen
        ]
        key = rank[(self._part[faces] + part_starts[face_owner])[kept_rows]]
        kept_rows = kept_rows[np.argsort(key, kind="stable")]
        camera_frame = world @ to_global
        planes, away = self._planes(chosen, turn, place, to_global, eye)
        return Faces(
            things=chosen,
            start=np.searchsorted(face_owner[kept_rows], np.arange(len(chosen) + 1)),
            pixels=eye.project(camera_frame)[corners[kept_rows]],
            corners=camera_frame[corners[kept_rows]],
            behind=depth[:, 1] <= NEAR_M,
            normals=normals[kept_rows],
            face=faces[kept_rows],
            distance=distance,
            planes=np.where((away < -1e-6)[..., None], planes, [0.0, 0.0, np.inf]),
            nearness=1.0 / depth,
        )

    def _part_ranks(self, chosen: Indices, turn: Array, place: Array) -> Indices:
        """Place of every part of some things in the drawing order: by thing, layer, then from far to near."""
        rows, counts = _gather(self._part_ranges, chosen)
        owner = np.repeat(np.arange(len(chosen)), counts)
        centres = (turn[owner] @ self._centres[rows][..., None])[..., 0] + place[owner]
        rank = np.empty(len(rows), dtype=np.int64)
        rank[np.lexsort((-(centres**2).sum(axis=1), self._layer[rows], owner))] = np.arange(len(rows))
        return rank

    def _planes(
        self, chosen: Indices, turn: Array, place: Array, to_global: Array, eye: Camera
    ) -> tuple[Array, Array]:
        normals = _PLANES @ turn.transpose(0, 2, 1)
        away = self._box_offsets[chosen] + (normals @ place[..., None])[..., 0]
        rays = to_global @ np.linalg.inv(eye.intrinsics)
        safe = np.where(np.abs(away) < 1e-6, -1e-6, away)
        return normals @ rays / safe[..., None], away


def _ranges(counts: list[int]) -> list[Indices]:
    ends = np.cumsum(counts)
    return [np.arange(end - count, end) for end, count in zip(ends.tolist(), counts, strict=True)]


def _gather(ranges: list[Indices], chosen: Indices) -> tuple[Indices, Indices]:
    parts = [ranges[index] for index in chosen.tolist()]
    counts = np.array([len(part) for part in parts], dtype=np.int64)
    return np.concatenate(parts), counts
