"""Draw the bird's-eye view: segmentation, range rings, boxes with heading and velocity, the car.

Forward (ego x) is up and left (ego y) is left. Everything is drawn in the ego frame; models that
reason in another BEV frame hand over ``bev_to_ego``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bevperception.geometry import BEVGrid, box_corners, invert_rigid, transform_boxes
from bevperception.structures import Boxes3D
from bevperception.taxonomy import DETECTION_CLASSES
from bevperception.visualization.drawing import (
    SUBPIXEL_BITS,
    FloatArray,
    draw_arrow,
    draw_line,
    fill_polygon,
    fixed_point,
)
from bevperception.visualization.palette import (
    BACKGROUND,
    DETECTION_COLOURS,
    EGO,
    MUTED,
    PANEL,
    RGB,
    RING,
    SEGMENTATION_COLOURS,
    VELOCITY,
    mix,
)
from bevperception.visualization.text import Image, draw_text

EGO_FOOTPRINT_M: Final = (-0.7, 3.4, 0.87)
"""Rear end, front end and half width of the car that is drawn, ego frame (the nuScenes Renault Zoe,
4.08 x 1.73 m, whose ego frame starts at the middle of the rear axle)."""

RING_STEP_M: Final = 10.0
VELOCITY_SECONDS: Final = 1.0
"""A velocity arrow reaches as far as the object moves in this time."""
MIN_SPEED_MPS: Final = 0.3
MAX_SPEED_MPS: Final = 100.0
"""Objects outside these speeds have no velocity arrow."""

_SUPERSAMPLING: Final = 2


@dataclass(frozen=True)
class BEVView:
    """The part of the ground that a picture shows, forward up.

    Args:
        width, height: of the picture in pixels.
        range_m: the picture reaches this far ahead of and behind its centre; how far it reaches to the
            sides follows from its width.
        centre_x_m, centre_y_m: the point at the picture's centre, ego frame.
    """

    width: int
    height: int
    range_m: float = 52.0
    centre_x_m: float = 0.0
    centre_y_m: float = 0.0

    @property
    def pixels_per_m(self) -> float:
        """Scale of the picture."""
        return self.height / (2 * self.range_m)

    def to_pixels(self, points_m: FloatArray) -> FloatArray:
        """Pixels (column, row) of points on the ground; pixel centres lie at whole numbers.

        Args:
            points_m: (..., 2 or more) x, y, ego frame.

        Returns:
            (..., 2).
        """
        column = self.width / 2 - (points_m[..., 1] - self.centre_y_m) * self.pixels_per_m - 0.5
        row = self.height / 2 - (points_m[..., 0] - self.centre_x_m) * self.pixels_per_m - 0.5
        return np.stack((column, row), axis=-1)

    def pixel_to_ego(self) -> FloatArray:
        """(3, 3) homogeneous pixels (column, row, 1) to homogeneous ground points (x, y, 1), ego frame."""
        scale = 1 / self.pixels_per_m
        return np.array(
            [
                [0.0, -scale, self.centre_x_m + (self.height / 2 - 0.5) * scale],
                [-scale, 0.0, self.centre_y_m + (self.width / 2 - 0.5) * scale],
                [0.0, 0.0, 1.0],
            ]
        )

    def scaled(self, factor: int) -> BEVView:
        """The same ground in a picture of ``factor`` times the pixels along each side."""
        return BEVView(
            self.width * factor, self.height * factor, self.range_m, self.centre_x_m, self.centre_y_m
        )


@dataclass
class SegmentationLayers:
    """Segmentation of the ground, predicted or labelled.

    Attributes:
        probabilities: (classes, rows, columns) in [0, 1] over ``grid``.
        classes: names out of ``taxonomy.SEGMENTATION_CLASSES``; leave out those without a label.
        grid: in the BEV frame.
    """

    probabilities: Tensor
    classes: tuple[str, ...]
    grid: BEVGrid


def pixels_to_cells(view: BEVView, grid: BEVGrid, bev_to_ego: Tensor | None = None) -> FloatArray:
    """(2, 3) pixels (column, row, 1) of a view to cells (column, row) of a grid in the BEV frame.

    Args:
        view: the picture.
        grid: the map.
        bev_to_ego: (4, 4) rigid; None where the BEV frame is the ego frame.
    """
    ego_to_bev = torch.eye(4, dtype=torch.float64)
    if bev_to_ego is not None:
        ego_to_bev = invert_rigid(bev_to_ego.detach().double().cpu())
    planar = np.eye(3)
    planar[:2] = ego_to_bev[:2][:, [0, 1, 3]].numpy()
    to_cell = np.array(
        [
            [1 / grid.cell_x_m, 0.0, -grid.x_min_m / grid.cell_x_m - 0.5],
            [0.0, 1 / grid.cell_y_m, -grid.y_min_m / grid.cell_y_m - 0.5],
            [0.0, 0.0, 1.0],
        ]
    )
    matrix: FloatArray = (to_cell @ planar @ view.pixel_to_ego())[:2]
    return matrix


def draw_segmentation(
    image: Image,
    view: BEVView,
    layers: SegmentationLayers,
    bev_to_ego: Tensor | None = None,
    threshold: float = 0.5,
) -> None:
    """Paint the layers in the order of ``SEGMENTATION_COLOURS``, ground first, vehicles last.

    Probabilities are interpolated between cell centres before the threshold, which smooths outlines and
    keeps the class of every cell centre.

    Args:
        image: (height, width, 3) uint8 RGB of the view's size, changed in place.
        view: what the image shows.
        layers: what to paint.
        bev_to_ego: (4, 4) rigid; None where the BEV frame is the ego frame.
        threshold: a class is painted where its probability is above.
    """
    pixel_to_cell = pixels_to_cells(view, layers.grid, bev_to_ego)
    maps: npt.NDArray[np.float32] = layers.probabilities.detach().float().cpu().numpy()
    for name in SEGMENTATION_COLOURS:
        if name not in layers.classes:
            continue
        shown = cv2.warpAffine(
            np.ascontiguousarray(maps[layers.classes.index(name)]),
            pixel_to_cell,
            (view.width, view.height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
        )
        image[shown > threshold] = SEGMENTATION_COLOURS[name]


def draw_rings(image: Image, view: BEVView, thickness_px: int = 1) -> None:
    """Circles around the car every :data:`RING_STEP_M`, as far as the view reaches ahead, and its axes.

    Args:
        image: (height, width, 3) uint8 RGB of the view's size, changed in place.
        view: what the image shows.
        thickness_px: width of the lines.
    """
    u, v = fixed_point(view.to_pixels(np.zeros(2))).tolist()
    for ring in range(1, _ring_count(view) + 1):
        radius = round(ring * RING_STEP_M * view.pixels_per_m * (1 << SUBPIXEL_BITS))
        cv2.circle(image, (u, v), radius, RING, thickness_px, cv2.LINE_AA, SUBPIXEL_BITS)
    reach = _ring_count(view) * RING_STEP_M
    axes = np.array([[[reach, 0], [-reach, 0]], [[0, reach], [0, -reach]]], dtype=np.float64)
    for start, end in view.to_pixels(axes):
        draw_line(image, start, end, mix(RING, PANEL, 0.5), thickness_px)


def _ring_count(view: BEVView) -> int:
    return int(view.range_m // RING_STEP_M)


def draw_ring_labels(image: Image, view: BEVView) -> None:
    """Write each ring's distance beside its crossing with the forward axis.

    Args:
        image: (height, width, 3) uint8 RGB of the view's size, changed in place.
        view: what the image shows.
    """
    for ring in range(1, _ring_count(view) + 1):
        distance = ring * RING_STEP_M
        column, row = view.to_pixels(np.array([distance, 0.0]))
        draw_text(image, f"{distance:.0f} m", (column + 5, row + 2), 14, MUTED)


def draw_ego(image: Image, view: BEVView) -> None:
    """Draw the car itself, with a windscreen that shows where its front is.

    Args:
        image: (height, width, 3) uint8 RGB of the view's size, changed in place.
        view: what the image shows.
    """
    rear, front, half = EGO_FOOTPRINT_M
    bevel = 0.45
    body = np.array(
        [
            [rear, half - bevel / 2],
            [rear + bevel / 2, half],
            [front - bevel, half],
            [front, half - bevel],
            [front, bevel - half],
            [front - bevel, -half],
            [rear + bevel / 2, -half],
            [rear, bevel / 2 - half],
        ]
    )
    screen = np.array([[2.35, 0.55], [1.75, 0.68], [1.75, -0.68], [2.35, -0.55]])
    fill_polygon(image, view.to_pixels(body), EGO)
    fill_polygon(image, view.to_pixels(screen), mix(EGO, BACKGROUND, 0.75))


def draw_boxes(image: Image, view: BEVView, boxes: Boxes3D, thickness_px: int = 2) -> None:
    """Draw the outlines of boxes seen from above, with a line along the heading and a velocity arrow.

    Args:
        image: (height, width, 3) uint8 RGB of the view's size, changed in place.
        view: what the image shows.
        boxes: ego frame; higher scores are drawn later. Non-finite boxes draw nothing, a non-finite
            velocity draws no arrow.
        thickness_px: width of the lines.
    """
    values = boxes.values.detach().double().cpu()
    order = torch.arange(len(boxes)) if boxes.scores is None else boxes.scores.detach().cpu().argsort()
    corners: FloatArray = box_corners(values)[:, :4, :2].numpy()
    reach = max(view.width, view.height) / view.pixels_per_m + 1e3
    for i in order.tolist():
        row = values[i, :7]
        if not bool(row.isfinite().all()) or float(row[:6].abs().max()) > reach:
            continue
        colour = DETECTION_COLOURS[DETECTION_CLASSES[int(boxes.labels[i])]]
        _draw_footprint(image, view.to_pixels(corners[i]), colour, thickness_px)
        _draw_velocity(image, view, values[i].numpy(), thickness_px)


def _draw_footprint(image: Image, outline: FloatArray, colour: RGB, thickness_px: int) -> None:
    """Outline (4, 2) from the front left, counter-clockwise: filled faintly, front edge doubled."""
    fill_polygon(image, outline, colour, opacity=0.3)
    front_left, back_left, back_right, front_right = outline
    for start, end in ((front_left, back_left), (back_left, back_right), (back_right, front_right)):
        draw_line(image, start, end, colour, thickness_px)
    draw_line(image, front_left, front_right, colour, 2 * thickness_px)
    draw_line(image, outline.mean(axis=0), (front_left + front_right) / 2, colour, thickness_px)


def _draw_velocity(image: Image, view: BEVView, row: FloatArray, thickness_px: int) -> None:
    speed = math.hypot(row[7], row[8])
    if not MIN_SPEED_MPS <= speed <= MAX_SPEED_MPS:  # also refuses NaN
        return
    start, end = view.to_pixels(np.stack((row[:2], row[:2] + row[7:9] * VELOCITY_SECONDS)))
    draw_arrow(image, start, end, VELOCITY, thickness_px)


def render_bev(
    view: BEVView,
    boxes: Boxes3D | None = None,
    segmentation: SegmentationLayers | None = None,
    *,
    bev_to_ego: Tensor | None = None,
    threshold: float = 0.5,
) -> Image:
    """The bird's-eye view of one instant.

    Args:
        view: size and extent of the picture.
        boxes: BEV frame; None for none.
        segmentation: BEV frame; None for none.
        bev_to_ego: (4, 4) rigid; None where the BEV frame is the ego frame.
        threshold: a segmentation class is painted where its probability is above.

    Returns:
        (view.height, view.width, 3) uint8 RGB.
    """
    large = view.scaled(_SUPERSAMPLING)
    image = np.full((large.height, large.width, 3), PANEL, dtype=np.uint8)
    if segmentation is not None:
        draw_segmentation(image, large, segmentation, bev_to_ego, threshold)
    draw_rings(image, large, thickness_px=_SUPERSAMPLING)
    draw_ego(image, large)
    if boxes is not None and len(boxes):
        values = boxes.values.detach().double().cpu()
        if bev_to_ego is not None:
            values = transform_boxes(values, bev_to_ego.detach().double().cpu())
        draw_boxes(image, large, Boxes3D(values, boxes.labels, boxes.scores), thickness_px=_SUPERSAMPLING + 1)
    small = cv2.resize(image, (view.width, view.height), interpolation=cv2.INTER_AREA)
    picture: Image = np.asarray(small, dtype=np.uint8)
    draw_ring_labels(picture, view)
    return picture
