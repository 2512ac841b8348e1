"""Draw antialiased strokes and translucent fills at fractions of a pixel, with OpenCV."""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from bevperception.visualization.palette import RGB
from bevperception.visualization.text import Image

FloatArray = npt.NDArray[np.float64]

SUBPIXEL_BITS: Final = 4
"""OpenCV takes coordinates as whole numbers of 1 / 16 pixel."""


def fixed_point(pixels: FloatArray) -> npt.NDArray[np.int32]:
    """Pixels as OpenCV's fixed-point numbers.

    Args:
        pixels: (...) finite, below 1e8.
    """
    fixed: npt.NDArray[np.int32] = np.rint(pixels * (1 << SUBPIXEL_BITS)).astype(np.int32)
    return fixed


def draw_line(image: Image, start: FloatArray, end: FloatArray, colour: RGB, thickness_px: int) -> None:
    """Draw a line.

    Args:
        image: (height, width, 3) uint8 RGB, changed in place.
        start, end: (2,) column and row in pixels.
        colour: of the line.
        thickness_px: its width.
    """
    (u0, v0), (u1, v1) = fixed_point(start).tolist(), fixed_point(end).tolist()
    cv2.line(image, (u0, v0), (u1, v1), colour, thickness_px, cv2.LINE_AA, SUBPIXEL_BITS)


def draw_arrow(image: Image, start: FloatArray, end: FloatArray, colour: RGB, thickness_px: int) -> None:
    """Draw an arrow whose head grows with the thickness, not with the length.

    Args:
        image: (height, width, 3) uint8 RGB, changed in place.
        start, end: (2,) column and row in pixels; nothing is drawn if they are closer than a pixel.
        colour: of the line.
        thickness_px: its width.
    """
    length = float(np.linalg.norm(end - start))
    if length < 1.0:
        return
    tip = min(0.5, 5.0 * thickness_px / length)
    (u0, v0), (u1, v1) = fixed_point(start).tolist(), fixed_point(end).tolist()
    cv2.arrowedLine(image, (u0, v0), (u1, v1), colour, thickness_px, cv2.LINE_AA, SUBPIXEL_BITS, tip)


def fill_polygon(image: Image, polygon: FloatArray, colour: RGB, opacity: float = 1.0) -> None:
    """Lay a colour over a polygon; only the pixels around it are touched.

    Args:
        image: (height, width, 3) uint8 RGB, changed in place.
        polygon: (k, 2) column and row in pixels, in order; fewer than three corners draw nothing.
        colour: of the fill.
        opacity: in [0, 1].
    """
    if len(polygon) < 3:
        return
    low = np.clip(np.floor(polygon.min(axis=0)).astype(int) - 1, 0, None)
    high = np.minimum(np.ceil(polygon.max(axis=0)).astype(int) + 2, (image.shape[1], image.shape[0]))
    if (low >= high).any():
        return
    under = image[low[1] : high[1], low[0] : high[0]]
    over = under.copy()
    cv2.fillPoly(over, [fixed_point(polygon - low)], colour, cv2.LINE_AA, SUBPIXEL_BITS)
    cv2.addWeighted(over, opacity, under, 1 - opacity, 0, dst=under)
