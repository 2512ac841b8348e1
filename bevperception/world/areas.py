"""Make valid polygons of a town's ground, so that they can be united."""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry


def area(outline: NDArray[np.float64]) -> Polygon:
    """The area inside an outline, valid.

    A band beside a bent road crosses itself where it reaches beyond the centre of the bend. GEOS may refuse
    to unite such a polygon with others.

    Args:
        outline: (n, 2) metres; it may cross itself.

    Returns:
        the polygon itself where it is valid, else the largest part of the repaired one.
    """
    return one_polygon(Polygon(outline))


def one_polygon(shape: BaseGeometry) -> Polygon:
    """The largest polygon of a shape, valid; a valid polygon comes back as it is.

    Args:
        shape: of any type, with any faults.

    Raises:
        ValueError: if no part of it has an area.
    """
    if shape.geom_type == "Polygon" and shape.is_valid and not shape.is_empty:
        return shape
    repaired = shapely.get_parts(shapely.get_parts(shapely.make_valid(shape)))
    polygons = [part for part in repaired if part.geom_type == "Polygon" and part.area > 0.0]
    if not polygons:
        raise ValueError(f"a shape without area stands for an area of the town: {shape.wkt:.80}")
    return max(polygons, key=lambda part: float(part.area))
