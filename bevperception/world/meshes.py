"""Solids of flat faces, made to be drawn quickly from any side.

A mesh consists of convex parts. Seen from anywhere, the front faces of a convex part do not hide each
other, so that drawing the parts from far to near, each with its marks (windows, lights) right after the
face that they lie on, gives the right picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bevperception.world.catalogue import Colour

Array = NDArray[np.float64]
Rectangle = tuple[float, float, float, float, float]
"""x from, x to, y from, y to, z."""
Point = tuple[float, float, float]

CORNERS = 8
"""Faces have at most as many corners; shorter ones repeat their last."""

_FACES = {
    "back": (0, 4, 7, 3),
    "front": (1, 2, 6, 5),
    "right": (0, 1, 5, 4),
    "left": (3, 7, 6, 2),
    "top": (4, 5, 6, 7),
    "bottom": (0, 3, 2, 1),
}
"""Corner numbers, counter-clockwise from outside; 0-3 below and 4-7 above, from (x from, y from) on."""

_FRAMES = {
    # lower left, lower right, upper left, upper right of a face in its own (u, v): u along x or y
    "back": (0, 3, 4, 7),
    "front": (1, 2, 5, 6),
    "right": (0, 1, 4, 5),
    "left": (3, 2, 7, 6),
    "top": (4, 5, 7, 6),
}


@dataclass(frozen=True)
class Mesh:
    """Faces of one thing, in its own frame: x forward, y left, z up from the ground.

    Attributes:
        vertices: (n, 3) metres.
        corners: (f, CORNERS) vertex numbers of each face.
        normals: (f, 3) unit, outwards.
        colours: (f, 3) blue, green, red, 0 to 255.
        glow: (f,) 0 to 1, how much a face shines by itself at night.
        fine: (f,) bool, marks that are left out when the thing is small in the picture.
        mark: (f,) bool, patches that lie within another face and so add nothing to the silhouette.
        part: (f,) number of the part.
        layer: (p,) parts of a lower layer are drawn first, whatever their distance.
        centres: (p, 3) of the parts.
    """

    vertices: Array
    corners: NDArray[np.int64]
    normals: Array
    colours: Array
    glow: Array
    fine: NDArray[np.bool_]
    mark: NDArray[np.bool_]
    part: NDArray[np.int64]
    layer: NDArray[np.int64]
    centres: Array


class MeshBuilder:
    """Puts a mesh together from solids and marks on them."""

    def __init__(self) -> None:
        self._vertices: list[Point] = []
        self._faces: list[tuple[int, list[int], Point, Colour, float, bool, bool]] = []
        self._parts: list[tuple[int, Point]] = []
        self._solids: list[list[Point]] = []

    def solid(
        self,
        below: Rectangle,
        above: Rectangle,
        colour: Colour,
        layer: int = 0,
        colours: dict[str, Colour] | None = None,
    ) -> int:
        """Add a body between a lower and an upper rectangle.

        Args:
            below, above: upright rectangles at two heights.
            colour: of all faces that ``colours`` does not name.
            layer: see :class:`Mesh`.
            colours: by face: front, back, left, right, top, bottom.

        Returns:
            the number of the part.
        """
        points = [
            corner
            for x0, x1, y0, y1, z in (below, above)
            for corner in ((x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z))
        ]
        part = len(self._parts)
        x, y, z = (sum(values) / len(points) for values in zip(*points, strict=True))
        self._parts.append((layer, (x, y, z)))
        self._solids.append(points)
        for name, order in _FACES.items():
            self._add(part, [points[k] for k in order], (colours or {}).get(name, colour))
        return part

    def box(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        z: tuple[float, float],
        colour: Colour,
        layer: int = 0,
        colours: dict[str, Colour] | None = None,
    ) -> int:
        """Add an upright box."""
        return self.solid((*x, *y, z[0]), (*x, *y, z[1]), colour, layer, colours)

    def mark(
        self,
        part: int,
        face: str,
        u: tuple[float, float],
        v: tuple[float, float],
        colour: Colour,
        glow: float = 0.0,
        fine: bool = True,
    ) -> None:
        """Add a patch on a face of a part.

        Args:
            part: from :meth:`solid`.
            face: front, back, left, right or top.
            u: from and to, 0 to 1 along y (front, back) or x (others).
            v: from and to, 0 to 1 upwards (to the left on top).
            colour, glow, fine: see :class:`Mesh`.
        """
        a, b, c, d = (self._solids[part][corner] for corner in _FRAMES[face])
        points: list[Point] = []
        for p, q in ((u[0], v[0]), (u[1], v[0]), (u[1], v[1]), (u[0], v[1])):
            x, y, z = (
                (1 - q) * ((1 - p) * a[k] + p * b[k]) + q * ((1 - p) * c[k] + p * d[k]) for k in range(3)
            )
            points.append((x, y, z))
        if face in ("back", "left"):
            points.reverse()
        self._add(part, points, colour, glow, fine, mark=True)

    def disc(self, part: int, side: int, x: float, z: float, radius: float, y: float, colour: Colour) -> None:
        """Add an upright eight-cornered disc that faces left (side 1) or right (-1), drawn with a part."""
        step = -2 * math.pi * side / CORNERS
        points = [
            (x + radius * math.cos(step * (k + 0.5)), y, z + radius * math.sin(step * (k + 0.5)))
            for k in range(CORNERS)
        ]
        self._add(part, points, colour)

    def build(self) -> Mesh:
        """The mesh."""
        return Mesh(
            vertices=np.array(self._vertices),
            corners=np.array([face[1] for face in self._faces]),
            normals=np.array([face[2] for face in self._faces]),
            colours=np.array([face[3][::-1] for face in self._faces], dtype=np.float64),
            glow=np.array([face[4] for face in self._faces]),
            fine=np.array([face[5] for face in self._faces]),
            mark=np.array([face[6] for face in self._faces]),
            part=np.array([face[0] for face in self._faces]),
            layer=np.array([layer for layer, _ in self._parts]),
            centres=np.array([centre for _, centre in self._parts]),
        )

    def _add(
        self,
        part: int,
        points: Sequence[Point],
        colour: Colour,
        glow: float = 0.0,
        fine: bool = False,
        mark: bool = False,
    ) -> None:
        start = len(self._vertices)
        self._vertices += points
        numbers = [start + min(k, len(points) - 1) for k in range(CORNERS)]
        # The diagonals of a quadrilateral span it even where two of its corners coincide.
        ax, ay, az = (points[2][k] - points[0][k] for k in range(3))
        bx, by, bz = (points[3][k] - points[1][k] for k in range(3))
        nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
        length = max(math.sqrt(nx * nx + ny * ny + nz * nz), 1e-12)
        normal = (nx / length, ny / length, nz / length)
        self._faces.append((part, numbers, normal, colour, glow, fine, mark))
