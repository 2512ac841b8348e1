"""Draw one perception as a bird's-eye-view picture for a topic; plainer than stills are, for speed."""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from bevperception.config_model import SegmentationConfig
from bevperception.geometry import box_corners
from bevperception.inference import Perception
from bevperception.structures import Boxes3D
from bevperception.taxonomy import DETECTION_CLASSES
from bevperception.visualization.bev import (
    MAX_SPEED_MPS,
    BEVView,
    draw_ego,
    draw_rings,
    pixels_to_cells,
)
from bevperception.visualization.drawing import SUBPIXEL_BITS, fixed_point
from bevperception.visualization.palette import DETECTION_COLOURS, PANEL, RGB, SEGMENTATION_COLOURS, VELOCITY
from bevperception.visualization.text import Image

MIN_ARROW_SPEED_M_S = 0.3
"""Slower objects are drawn without a velocity arrow."""
_HEAD_PX = 5.0
_PAINTED_ABOVE = 0.5


def bev_picture(
    perception: Perception, boxes: Boxes3D, head: SegmentationConfig | None, side_px: int
) -> Image:
    """Draw segmentation, boxes and velocities from above, forward up.

    Args:
        perception: segmentation and frames.
        boxes: base_link, those to be drawn.
        head: the model's segmentation settings; None without a head.
        side_px: width and height.

    Returns:
        (side_px, side_px, 3) uint8 RGB.
    """
    view = BEVView(side_px, side_px)
    image: Image = _blank(side_px).copy()
    if perception.segmentation is not None and head is not None:
        _paint_ground(image, view, perception, head)
    draw_rings(image, view)
    draw_ego(image, view)
    _outline(image, view, boxes)
    return image


@lru_cache(maxsize=4)
def _blank(side_px: int) -> Image:
    return np.full((side_px, side_px, 3), PANEL, dtype=np.uint8)


def _paint_ground(image: Image, view: BEVView, perception: Perception, head: SegmentationConfig) -> None:
    """Colour the cells first, then sample them once for all classes."""
    assert perception.segmentation is not None
    painted = perception.segmentation.numpy() > _PAINTED_ABOVE
    colours, shown = [PANEL], np.zeros((head.grid.rows, head.grid.columns), dtype=np.uint8)
    for name, colour_of_class in SEGMENTATION_COLOURS.items():
        if name in head.classes:
            shown[painted[head.classes.index(name)]] = len(colours)
            colours.append(colour_of_class)
    cv2.warpAffine(
        np.take(np.array(colours, dtype=np.uint8), shown, axis=0),
        pixels_to_cells(view, head.grid, perception.bev_to_ego),
        (view.width, view.height),
        dst=image,
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_TRANSPARENT,
    )


def _outline(image: Image, view: BEVView, boxes: Boxes3D) -> None:
    """Draw outlines with a line to the front, and where each box will be in a second."""
    near = boxes.values[:, :7].isfinite().all(-1) & (boxes.values[:, :6].abs().amax(-1) < 1e3)
    shown = boxes[near]
    corners = view.to_pixels(box_corners(shown.values)[:, :4, :2].numpy())
    fronts = np.stack((corners.mean(axis=1), corners[:, [0, 3]].mean(axis=1)), axis=1)
    labels = shown.labels.numpy()
    for label in np.unique(labels).tolist():
        ink = DETECTION_COLOURS[DETECTION_CLASSES[label]]
        for strokes, closed in ((corners, True), (fronts, False)):
            _strokes(image, strokes[labels == label], closed, ink)
    velocities = shown.values[:, 7:9].numpy()
    speeds = np.hypot(velocities[:, 0], velocities[:, 1])
    moving = (speeds >= MIN_ARROW_SPEED_M_S) & (speeds < MAX_SPEED_MPS)
    tails, moves = shown.values[:, :2].numpy()[moving], velocities[moving]
    _strokes(image, _arrows(view.to_pixels(tails), view.to_pixels(tails + moves)), False, VELOCITY)


def _arrows(tails: NDArray[np.float64], tips: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shafts and heads (3 n, 2, 2) of n arrows in pixels; heads do not grow with the arrows."""
    along = tips - tails
    length = np.maximum(np.hypot(along[:, :1], along[:, 1:]), 1e-9)
    back = along * np.minimum(0.5, _HEAD_PX / length) * math.sqrt(0.5)
    across = back[:, ::-1] * (1, -1)
    return np.concatenate(
        [np.stack((start, tips), axis=1) for start in (tails, tips - back - across, tips - back + across)]
    )


def _strokes(image: Image, strokes: NDArray[np.float64], closed: bool, ink: RGB) -> None:
    cv2.polylines(image, list(fixed_point(strokes)), closed, ink, 1, cv2.LINE_AA, SUBPIXEL_BITS)
