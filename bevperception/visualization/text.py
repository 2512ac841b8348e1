"""Write text on images, antialiased, in Pillow's built-in typeface (OpenCV's own letters are bare strokes).

The typeface holds ASCII and little else: keep to it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from bevperception.visualization.palette import RGB

Image = npt.NDArray[np.uint8]
"""(height, width, 3) RGB."""


@lru_cache(maxsize=16)
def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)


@lru_cache(maxsize=1024)
def _coverage(text: str, size_px: int) -> npt.NDArray[np.float32]:
    """Render a text: the share of each pixel that letters cover, in [0, 1]; all texts have one height."""
    font = _font(size_px)
    width = max(1, round(font.getlength(text)))
    height = round(size_px * 1.25)
    canvas = PillowImage.new("L", (width, height), 0)
    ImageDraw.Draw(canvas).text((0, 0), text, font=font, fill=255)
    return np.asarray(canvas, dtype=np.float32) / 255.0


def text_size(text: str, size_px: int) -> tuple[int, int]:
    """(width, height) in pixels that :func:`draw_text` would cover.

    Args:
        text: one line.
        size_px: size of the type in pixels.
    """
    height, width = _coverage(text, size_px).shape
    return width, height


def draw_text(
    image: Image,
    text: str,
    position: tuple[float, float],
    size_px: int,
    colour: RGB,
    align: Literal["left", "centre", "right"] = "left",
    plate: RGB | None = None,
) -> None:
    """Write one line of text into an image; what lies outside of it is cut off.

    Args:
        image: (height, width, 3) uint8 RGB, changed in place.
        text: one line of ASCII.
        position: (x, y) in pixels of the top of the line at its left, centre or right.
        size_px: size of the type in pixels.
        colour: of the letters.
        align: which point of the line ``position`` is.
        plate: colour of a half transparent plate behind the letters; None for none.
    """
    if not text:
        return
    coverage = _coverage(text, size_px)
    height, width = coverage.shape
    left = round(position[0] - {"left": 0.0, "centre": 0.5, "right": 1.0}[align] * width)
    top = round(position[1])
    if plate is not None:
        pad = max(2, size_px // 5)
        box = np.ones((height + 2, width + 2 * pad), dtype=np.float32)
        _blend(image, box * 0.65, left - pad, top - 1, plate)
    _blend(image, coverage, left, top, colour)


def _blend(image: Image, alpha: npt.NDArray[np.float32], left: int, top: int, colour: RGB) -> None:
    rows = slice(max(0, top), min(image.shape[0], top + alpha.shape[0]))
    columns = slice(max(0, left), min(image.shape[1], left + alpha.shape[1]))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    a = alpha[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None]
    under = image[rows, columns].astype(np.float32)
    image[rows, columns] = np.rint(under + (np.asarray(colour, dtype=np.float32) - under) * a).astype(
        np.uint8
    )
