"""Draw 3D boxes into camera images, and lay the six images out as one picture.

Lines and faces are clipped in homogeneous coordinates, where the near plane and the four sides of the
image are all linear: a box that reaches behind the camera is cut exactly, never smeared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bevperception.geometry import box_corners, transform_points
from bevperception.structures import Boxes3D
from bevperception.taxonomy import DETECTION_CLASSES
from bevperception.visualization.drawing import FloatArray, draw_line, fill_polygon
from bevperception.visualization.palette import BACKGROUND, DETECTION_COLOURS, INK, MUTED, PANEL
from bevperception.visualization.text import Image, draw_text, text_size

NEAR_M: Final = 0.1
"""Parts of boxes nearer to the camera's plane than this are not drawn."""

BOX_EDGES: Final = (
    *((0, 3), (3, 7), (7, 4), (4, 0)),  # the front face comes first
    *((1, 2), (2, 6), (6, 5), (5, 1)),
    *((0, 1), (3, 2), (7, 6), (4, 5)),
)
"""Pairs of corners of ``geometry.box_corners``; the first four edges are the front face."""

FRONT_FACE: Final = (0, 3, 7, 4)

CAMERA_ROWS: Final = (
    ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"),
    ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"),
)
"""Where each camera stands in the picture; what is left of the car is on the left in both rows."""

MIRRORED_CAMERAS: Final = frozenset(CAMERA_ROWS[1])
"""Cameras that look backwards are shown as in a mirror, so that the car's left stays on the left."""

_PIXELS_PER_LINE_WIDTH: Final = 24.0
"""Small boxes get thinner lines: one pixel of width for so many pixels of drawn height."""

_SUPERSAMPLING: Final = 2
_GAP_PX: Final = 4
"""Between the cells of :func:`camera_grid`."""


def _frustum_planes(width: int, height: int, margin_px: float) -> tuple[FloatArray, FloatArray]:
    """Half spaces (5, 3) and offsets (5,) over (u * depth, v * depth, depth): inside is >= 0."""
    low, right, bottom = -margin_px, width - 1 + margin_px, height - 1 + margin_px
    planes = np.array(
        [[0, 0, 1], [1, 0, -low], [-1, 0, right], [0, 1, -low], [0, -1, bottom]], dtype=np.float64
    )
    return planes, np.array([-NEAR_M, 0, 0, 0, 0], dtype=np.float64)


def clip_segments(
    starts: FloatArray, ends: FloatArray, width: int, height: int, margin_px: float = 8.0
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Clip 3D segments to a camera's view (Cyrus and Beck, in homogeneous coordinates).

    Args:
        starts, ends: (..., 3) finite, as (u * depth, v * depth, depth), pixels times metres and metres.
        width, height: of the image in pixels.
        margin_px: the image is taken to be this much larger on all sides.

    Returns:
        segments (..., 2, 2) start and end as (u, v) in pixels, zeros where nothing is seen;
        seen (...) bool.
    """
    planes, offsets = _frustum_planes(width, height, margin_px)
    a = starts @ planes.T + offsets
    b = ends @ planes.T + offsets
    span = np.where(a == b, 1.0, a - b)
    crossing = a / span
    enter = np.where((a < 0) & (b >= 0), crossing, 0.0).max(axis=-1)
    leave = np.where((a >= 0) & (b < 0), crossing, 1.0).min(axis=-1)
    visible = ~((a < 0) & (b < 0)).any(axis=-1) & (enter <= leave)
    step = ends - starts
    points = np.stack((starts + enter[..., None] * step, starts + leave[..., None] * step), axis=-2)
    points = np.where(visible[..., None, None], points, 1.0)
    pixels = points[..., :2] / points[..., 2:]
    return np.where(visible[..., None, None], pixels, 0.0), visible


def clip_polygon(corners: FloatArray, width: int, height: int, margin_px: float = 8.0) -> FloatArray:
    """Clip a convex 3D polygon to a camera's view (Sutherland and Hodgman).

    Args:
        corners: (k, 3) finite, as (u * depth, v * depth, depth), in order around the polygon.
        width, height: of the image in pixels.
        margin_px: the image is taken to be this much larger on all sides.

    Returns:
        (m, 2) corners as (u, v) in pixels; (0, 2) where nothing is seen.
    """
    points = corners
    for plane, offset in zip(*_frustum_planes(width, height, margin_px), strict=True):
        value = points @ plane + offset
        kept: list[FloatArray] = []
        for i in range(len(points)):
            start, end = value[i - 1], value[i]
            if (start >= 0) != (end >= 0):
                kept.append(points[i - 1] + (points[i] - points[i - 1]) * (start / (start - end)))
            if end >= 0:
                kept.append(points[i])
        if not kept:
            return np.zeros((0, 2))
        points = np.stack(kept)
    return points[:, :2] / points[:, 2:]


def draw_boxes(
    image: Image,
    boxes: Boxes3D,
    frame_to_image: Tensor,
    *,
    thickness_px: int = 2,
    show_scores: bool = True,
    text_px: int = 14,
) -> None:
    """Draw 3D boxes into a camera image, far ones first; the front face is filled and its edges thicker.

    Args:
        image: (height, width, 3) uint8 RGB, changed in place.
        boxes: in any frame; non-finite ones and those the camera does not see draw nothing.
        frame_to_image: (4, 4) that frame to homogeneous pixels of ``image``.
        thickness_px: width of the lines of large boxes; small ones have thinner lines.
        show_scores: write the score above a box, if it has one.
        text_px: size of the scores.
    """
    boxes = boxes[boxes.values[:, :7].isfinite().all(dim=1)]
    if len(boxes) == 0:
        return
    height, width = image.shape[:2]
    corners = box_corners(boxes.values.detach().double().cpu())
    homogeneous: FloatArray = transform_points(corners, frame_to_image.detach().double().cpu())[
        ..., :3
    ].numpy()
    edges = np.array(BOX_EDGES)
    segments, visible = clip_segments(homogeneous[:, edges[:, 0]], homogeneous[:, edges[:, 1]], width, height)
    depth = homogeneous[..., 2].mean(axis=-1)
    for i in np.argsort(-depth, kind="stable"):
        if not visible[i].any():
            continue
        colour = DETECTION_COLOURS[DETECTION_CLASSES[int(boxes.labels[i])]]
        front = clip_polygon(homogeneous[i, list(FRONT_FACE)], width, height)
        fill_polygon(image, front, colour, opacity=0.28)
        drawn_height = float(np.ptp(segments[i][visible[i]][..., 1]))
        line_px = int(np.clip(drawn_height / _PIXELS_PER_LINE_WIDTH, 1, thickness_px))
        for k in np.flatnonzero(visible[i])[::-1]:
            start, end = segments[i, k]
            draw_line(image, start, end, colour, line_px + (1 if k < 4 else 0))
    if show_scores and boxes.scores is not None:
        _write_scores(image, boxes.scores.tolist(), boxes.labels.tolist(), segments, visible, depth, text_px)


def _write_scores(
    image: Image,
    scores: list[float],
    labels: list[int],
    segments: FloatArray,
    visible: npt.NDArray[np.bool_],
    depth: FloatArray,
    text_px: int,
) -> None:
    """Scores above their boxes, near ones first; where one would cover another, the farther is left out.

    Boxes that are drawn less high than their score get none either.
    """
    taken: list[tuple[float, float, float, float]] = []
    for i in np.argsort(depth, kind="stable"):
        points = segments[i][visible[i]].reshape(-1, 2)
        if len(points) == 0 or np.ptp(points[:, 1]) < text_px:
            continue
        text = f"{scores[i]:.2f}"
        width, height = text_size(text, text_px)
        x = float(np.clip(points[:, 0].mean(), width / 2 + 4, image.shape[1] - width / 2 - 4))
        y = float(np.clip(points[:, 1].min() - height - 2, 1, image.shape[0] - height))
        box = (x - width / 2, y, x + width / 2, y + height)
        if any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
            continue
        taken.append(box)
        colour = DETECTION_COLOURS[DETECTION_CLASSES[labels[i]]]
        draw_text(image, text, (x, y), text_px, colour, align="centre", plate=BACKGROUND)


def _scaling(scale_x: float, scale_y: float) -> Tensor:
    """Pixels of an image to pixels of the resized image; pixel centres lie at whole numbers."""
    matrix = torch.diag(torch.tensor([scale_x, scale_y, 1.0, 1.0], dtype=torch.float64))
    matrix[0, 2] = (scale_x - 1) / 2
    matrix[1, 2] = (scale_y - 1) / 2
    return matrix


def _mirroring(width: int) -> Tensor:
    """Pixels of an image to pixels of the same image mirrored left to right."""
    matrix = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    matrix[0, 2] = width - 1
    return matrix


def _camera_cell(
    name: str,
    image: Image | None,
    frame_to_image: Tensor | None,
    boxes: Boxes3D | None,
    size: tuple[int, int],
) -> Image:
    """One camera of the grid, (height, width, 3): resized, mirrored if it looks back, with its boxes."""
    width, height = size
    caption = name.removeprefix("CAM_").replace("_", " ")
    cell = np.full((height, width, 3), PANEL, dtype=np.uint8)
    if image is None:
        draw_text(cell, f"{caption}: no image", (width / 2, height / 2 - 10), 18, MUTED, align="centre")
        return cell
    fit = min(width / image.shape[1], height / image.shape[0])
    inner_width, inner_height = round(image.shape[1] * fit), round(image.shape[0] * fit)
    large = (inner_width * _SUPERSAMPLING, inner_height * _SUPERSAMPLING)
    shrinks = large[0] < image.shape[1]
    drawn = cv2.resize(image, large, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    to_drawn = _scaling(large[0] / image.shape[1], large[1] / image.shape[0])
    if name in MIRRORED_CAMERAS:
        drawn = drawn[:, ::-1]
        to_drawn = _mirroring(large[0]) @ to_drawn
        caption += " (mirrored)"
    canvas: Image = np.ascontiguousarray(drawn, dtype=np.uint8)
    if boxes is not None and frame_to_image is not None:
        projection = to_drawn @ frame_to_image.detach().double().cpu()
        draw_boxes(canvas, boxes, projection, thickness_px=3, text_px=28)
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    cell[top : top + inner_height, left : left + inner_width] = cv2.resize(
        canvas, (inner_width, inner_height), interpolation=cv2.INTER_AREA
    )
    draw_text(cell, caption, (10, 7), 16, INK, plate=BACKGROUND)
    return cell


def camera_grid(
    images: Mapping[str, Image],
    frame_to_image: Mapping[str, Tensor],
    boxes: Boxes3D | None = None,
    *,
    width: int = 1600,
) -> Image:
    """The cameras as one picture: front left, front, front right over back left, back, back right.

    Cameras that look backwards are mirrored (:data:`MIRRORED_CAMERAS`). A camera of the six without an
    image leaves a marked empty cell; cameras of other names are laid out three to a row, as they come.

    Args:
        images: (height, width, 3) uint8 RGB by camera name; sizes may differ.
        frame_to_image: (4, 4) by camera name: the boxes' frame to homogeneous pixels of that image; a
            camera without one gets no boxes.
        boxes: drawn into every image that sees them; None for none.
        width: of the picture in pixels.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    rows: tuple[tuple[str, ...], ...] = CAMERA_ROWS
    if any(name not in CAMERA_ROWS[0] + CAMERA_ROWS[1] for name in images):
        names = tuple(images)
        rows = tuple(names[i : i + 3] for i in range(0, len(names), 3))
    columns = 3
    cell_width = (width - _GAP_PX * (columns - 1)) // columns
    first = next(iter(images.values()), None)
    aspect = 9 / 16 if first is None else first.shape[0] / first.shape[1]
    cell_height = round(cell_width * aspect)
    picture = np.full(((cell_height + _GAP_PX) * len(rows) - _GAP_PX, width, 3), BACKGROUND, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, name in enumerate(row):
            size = (cell_width, cell_height)
            cell = _camera_cell(name, images.get(name), frame_to_image.get(name), boxes, size)
            top, left = r * (cell_height + _GAP_PX), c * (cell_width + _GAP_PX)
            picture[top : top + cell_height, left : left + cell_width] = cell
    return picture
