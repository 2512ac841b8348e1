"""Rasterise polygons exactly: a cell is on when its centre lies inside.

Edges are directed: exteriors counter-clockwise, holes clockwise. A scan line through a row's centres
crosses edges; the sum of their directions to the left of a cell is the number of polygons around it, so
one pass draws the union of any number of overlapping polygons with holes. A mirrored frame turns all
directions round and gives the same union.
"""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import MultiPolygon, Polygon
from shapely.geometry.polygon import orient
from torch import Tensor

from bevperception.geometry import BEVGrid, box_corners

Edges = NDArray[np.float64]
"""(n, 2, 2): start and end of directed edges, x and y in metres."""


def polygon_edges(polygon: Polygon | MultiPolygon) -> Edges:
    """Directed edges of a polygon with holes, or of several that do not overlap.

    An invalid polygon (one that crosses itself) is repaired first; its lines and points are dropped.

    Args:
        polygon: x and y in metres.

    Returns:
        (n, 2, 2).
    """
    if not polygon.is_valid:
        polygon = shapely.make_valid(polygon)
    edges: list[Edges] = []
    for part in shapely.get_parts(polygon):
        if part.geom_type == "MultiPolygon":
            edges.append(polygon_edges(part))
        elif part.geom_type == "Polygon" and not part.is_empty:
            turned = orient(part, 1.0)
            for ring in (turned.exterior, *turned.interiors):
                points = np.asarray(ring.coords, dtype=np.float64)[:, :2]
                edges.append(np.stack((points[:-1], points[1:]), axis=1))
    return np.concatenate(edges) if edges else np.zeros((0, 2, 2))


def box_edges(boxes: Tensor) -> Edges:
    """Directed edges of boxes' footprints.

    Args:
        boxes: (n, 7 or more) rows as in ``geometry.BOX_COLUMNS``.

    Returns:
        (4 n, 2, 2).
    """
    corners = box_corners(boxes.double())[:, :4, :2].numpy()
    edges: Edges = np.stack((corners, np.roll(corners, -1, axis=1)), axis=2).reshape(-1, 2, 2)
    return edges


def rasterise(edges: Edges, grid: BEVGrid) -> NDArray[np.bool_]:
    """Draw the union of polygons onto a grid.

    Args:
        edges: (n, 2, 2) closed rings of directed edges, in the grid's frame.
        grid: whose cells are asked for.

    Returns:
        (rows, columns), true where a cell's centre is inside; centres exactly on an edge belong to the
        polygon above or to the right of it.
    """
    columns = (edges[..., 0] - grid.x_min_m) / grid.cell_x_m - 0.5
    rows = (edges[..., 1] - grid.y_min_m) / grid.cell_y_m - 0.5
    first = np.clip(np.ceil(rows.min(axis=1)), 0, grid.rows).astype(np.int64)
    stop = np.clip(np.ceil(rows.max(axis=1)), 0, grid.rows).astype(np.int64)
    count = stop - first
    edge = np.repeat(np.arange(len(edges)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    start_row, start_column = rows[edge, 0], columns[edge, 0]
    slope = (columns[edge, 1] - start_column) / (rows[edge, 1] - start_row)
    crossing = start_column + (row - start_row) * slope
    column = np.clip(np.ceil(crossing), 0, grid.columns).astype(np.int64)
    direction = np.where(rows[edge, 1] > start_row, -1.0, 1.0)
    width = grid.columns + 1
    changes = np.bincount(row * width + column, weights=direction, minlength=grid.rows * width)
    around = changes.reshape(grid.rows, width)[:, :-1].cumsum(axis=1)
    return np.asarray(around != 0)
