"""Results as the plain values of messages, in the vehicle's frame: detections, markers, grids, a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bevperception.config_model import SegmentationConfig
from bevperception.geometry import BEVGrid, box_corners, transform_boxes, yaw_of
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

OBJECT_FIELDS: Final = (*("x", "y", "z", "length", "width", "height", "yaw", "vx", "vy", "score", "label"),)
"""Fields of an object, float32 each: base_link, metres, radians, metres a second, and the class as its index
in ``taxonomy.DETECTION_CLASSES``."""

MIN_ARROW_SPEED_M_S = 0.3
_HEAD_M = 0.7
_HEAD_PX = 5.0
_PAINTED_ABOVE = 0.5


@dataclass(frozen=True)
class Detection:
    """One box.

    Attributes:
        class_name: one of ``taxonomy.DETECTION_CLASSES``.
        score: in [0, 1].
        position: (x, y, z) of the centre, metres, base_link.
        orientation: quaternion (x, y, z, w).
        size: (length, width, height) along the box's own x, y, z, metres.
        velocity: (vx, vy) metres a second, base_link's axes; NaN where unknown.
    """

    class_name: str
    score: float
    position: tuple[float, float, float]
    orientation: tuple[float, float, float, float]
    size: tuple[float, float, float]
    velocity: tuple[float, float]


@dataclass(frozen=True)
class Grid:
    """Probabilities of one class over the ground, as nav_msgs/OccupancyGrid has them.

    Attributes:
        width, height: cells along the grid's own x and y.
        resolution_m: side of a cell.
        origin: (x, y, yaw) of the corner of cell (0, 0), base_link.
        cells: (height, width) int8, 0 to 100, row 0 at the origin.
    """

    width: int
    height: int
    resolution_m: float
    origin: tuple[float, float, float]
    cells: NDArray[np.int8]


def boxes_in_base(seen: Perception) -> Boxes3D:
    """The boxes of a perception in the vehicle's frame; float64 values."""
    values = transform_boxes(seen.boxes.values.double(), seen.bev_to_ego)
    return Boxes3D(values, seen.boxes.labels, seen.boxes.scores)


def select(boxes: Boxes3D, threshold: float, classes: Sequence[str] = ()) -> Boxes3D:
    """Boxes with at least a score, of some classes.

    Args:
        boxes: scored.
        threshold: lowest score.
        classes: names; none given means all.
    """
    assert boxes.scores is not None
    keep = boxes.scores >= threshold
    if classes:
        wanted = torch.tensor([DETECTION_CLASSES.index(name) for name in classes])
        keep &= torch.isin(boxes.labels, wanted)
    return boxes[keep]


def detections(boxes: Boxes3D) -> list[Detection]:
    """Boxes as single values.

    Args:
        boxes: base_link, scored.
    """
    assert boxes.scores is not None
    found = []
    rows = zip(boxes.values.tolist(), boxes.labels.tolist(), boxes.scores.tolist(), strict=True)
    for (x, y, z, length, width, height, yaw, vx, vy), label, score in rows:
        found.append(
            Detection(
                class_name=DETECTION_CLASSES[label],
                score=score,
                position=(x, y, z),
                orientation=(0.0, 0.0, math.sin(yaw / 2), math.cos(yaw / 2)),
                size=(length, width, height),
                velocity=(vx, vy),
            )
        )
    return found


def object_rows(boxes: Boxes3D) -> NDArray[np.float32]:
    """Boxes as rows of :data:`OBJECT_FIELDS`.

    Args:
        boxes: base_link, scored.

    Returns:
        (n, 11).
    """
    assert boxes.scores is not None
    columns = (boxes.values.float(), boxes.scores.float()[:, None], boxes.labels.float()[:, None])
    rows: NDArray[np.float32] = torch.cat(columns, dim=1).contiguous().numpy()
    return rows


def boxes_of_rows(rows: NDArray[np.float32]) -> Boxes3D:
    """What :func:`object_rows` made rows of.

    Args:
        rows: (n, 11).
    """
    values = torch.from_numpy(np.array(rows, dtype=np.float32).reshape(-1, len(OBJECT_FIELDS)))
    return Boxes3D(values[:, :9], values[:, 10].round().long(), values[:, 9])


def arrow(found: Detection) -> list[tuple[float, float, float]]:
    """The arrow that a box's velocity is drawn with: as far as it moves in a second.

    Returns:
        pairs of ends, base_link: the shaft from the centre to the tip, then two strokes of the head; nothing
        for objects that stand or whose velocity is unknown.
    """
    vx, vy = found.velocity
    speed = math.hypot(vx, vy)
    if not speed >= MIN_ARROW_SPEED_M_S or not math.isfinite(speed):
        return []
    x, y, z = found.position
    tip = (x + vx, y + vy, z)
    back = min(_HEAD_M / speed, 0.5)
    sides = [
        (tip[0] - back * (vx - side), tip[1] - back * (vy + turn), z) for side, turn in ((vy, vx), (-vy, -vx))
    ]
    return [found.position, tip, sides[0], tip, sides[1], tip]


def heading(found: Detection) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """The line from a box's centre over the middle of its front, a metre beyond it."""
    _, _, qz, qw = found.orientation
    yaw, reach = 2 * math.atan2(qz, qw), found.size[0] / 2 + 1.0
    x, y, z = found.position
    return found.position, (x + reach * math.cos(yaw), y + reach * math.sin(yaw), z)


def colour(class_name: str) -> tuple[float, float, float]:
    """Red, green and blue in [0, 1] of a class."""
    r, g, b = DETECTION_COLOURS[class_name]
    return r / 255, g / 255, b / 255


def arrow_colour() -> tuple[float, float, float]:
    """Red, green and blue in [0, 1] of velocity arrows."""
    r, g, b = VELOCITY
    return r / 255, g / 255, b / 255


def occupancy(probabilities: Tensor, grid: BEVGrid, bev_to_base: Tensor) -> Grid:
    """One class's map as an occupancy grid.

    Args:
        probabilities: (rows, columns) in [0, 1].
        grid: theirs; its cells must be square.
        bev_to_base: (4, 4) float64, upright.

    Raises:
        ValueError: if the cells are not square.
    """
    if abs(grid.cell_x_m - grid.cell_y_m) > 1e-6:
        raise ValueError(f"an occupancy grid has square cells, got {grid.cell_x_m} x {grid.cell_y_m} m")
    corner = bev_to_base @ torch.tensor([grid.x_min_m, grid.y_min_m, 0.0, 1.0], dtype=torch.float64)
    cells: NDArray[np.int8] = (probabilities * 100).round().clamp(0, 100).to(torch.int8).cpu().numpy()
    origin = (float(corner[0]), float(corner[1]), float(yaw_of(bev_to_base)))
    return Grid(grid.columns, grid.rows, grid.cell_x_m, origin, cells)


def bev_picture(seen: Perception, boxes: Boxes3D, head: SegmentationConfig | None, side_px: int) -> Image:
    """The bird's-eye view as a picture, forward up; plainer than stills are, for speed.

    Args:
        seen: segmentation and frames.
        boxes: base_link, those to be drawn.
        head: the model's segmentation settings; None without a head.
        side_px: width and height.

    Returns:
        (side_px, side_px, 3) uint8 RGB.
    """
    view = BEVView(side_px, side_px)
    image: Image = _blank(side_px).copy()
    if seen.segmentation is not None and head is not None:
        _paint_ground(image, view, seen, head)
    draw_rings(image, view)
    draw_ego(image, view)
    _outline(image, view, boxes)
    return image


@lru_cache(maxsize=4)
def _blank(side_px: int) -> Image:
    return np.full((side_px, side_px, 3), PANEL, dtype=np.uint8)


def _paint_ground(image: Image, view: BEVView, seen: Perception, head: SegmentationConfig) -> None:
    """Find the cells' colours first, then sample them once for all classes."""
    assert seen.segmentation is not None
    painted = seen.segmentation.numpy() > _PAINTED_ABOVE
    colours, shown = [PANEL], np.zeros((head.grid.rows, head.grid.columns), dtype=np.uint8)
    for name, colour_of_class in SEGMENTATION_COLOURS.items():
        if name in head.classes:
            shown[painted[head.classes.index(name)]] = len(colours)
            colours.append(colour_of_class)
    cv2.warpAffine(
        np.take(np.array(colours, dtype=np.uint8), shown, axis=0),
        pixels_to_cells(view, head.grid, seen.bev_to_ego),
        (view.width, view.height),
        dst=image,
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_TRANSPARENT,
    )


def _outline(image: Image, view: BEVView, boxes: Boxes3D) -> None:
    """Outlines with a line to the front, and where each box will be in a second; a call a class and kind."""
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
