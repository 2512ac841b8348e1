"""Convert one perception to the plain values that ROS messages carry, in the vehicle's frame (base_link).

:func:`convert` computes everything that is published of a perception; the node's ``messages`` only copy it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bevperception.config_model import SegmentationConfig
from bevperception.geometry import BEVGrid, transform_boxes, yaw_of
from bevperception.inference import Perception
from bevperception.streaming.picture import MIN_ARROW_SPEED_M_S, bev_picture
from bevperception.streaming.settings import NodeSettings
from bevperception.structures import Boxes3D
from bevperception.taxonomy import DETECTION_CLASSES
from bevperception.visualization.palette import DETECTION_COLOURS, RGB, VELOCITY
from bevperception.visualization.text import Image

Point = tuple[float, float, float]

OBJECT_FIELDS: Final = (*("x", "y", "z", "length", "width", "height", "yaw", "vx", "vy", "score", "label"),)
"""Fields of an object, float32 each: base_link, metres, radians, metres a second, and the class as its index
in ``taxonomy.DETECTION_CLASSES``."""

_HEAD_M = 0.7
_LABEL_ABOVE_M = 0.5


def _unit_rgb(colour: RGB) -> Point:
    r, g, b = colour
    return r / 255, g / 255, b / 255


ARROW_COLOUR: Final = _unit_rgb(VELOCITY)
"""Red, green and blue in [0, 1] of velocity arrows."""

_CLASS_COLOURS: Final = {name: _unit_rgb(colour) for name, colour in DETECTION_COLOURS.items()}


@dataclass(frozen=True)
class Detection:
    """One box with what is drawn of it; positions are metres in base_link.

    Attributes:
        class_name: one of ``taxonomy.DETECTION_CLASSES``.
        score: in [0, 1].
        position: (x, y, z) of the centre.
        orientation: quaternion (x, y, z, w).
        size: (length, width, height) along the box's own x, y, z, metres.
        velocity: (vx, vy) metres a second, base_link's axes; NaN where unknown.
        colour: red, green and blue in [0, 1] of the class.
        heading: both ends of a line from the centre over the middle of the front, a metre beyond it.
        arrow: pairs of ends of the velocity arrow, as long as the box moves in a second: the shaft, then
            two strokes of the head; empty if the box stands or its velocity is unknown.
        label: class and score.
        label_position: above the box.
    """

    class_name: str
    score: float
    position: Point
    orientation: tuple[float, float, float, float]
    size: Point
    velocity: tuple[float, float]
    colour: Point
    heading: tuple[Point, Point]
    arrow: tuple[Point, ...]
    label: str
    label_position: Point


@dataclass(frozen=True)
class Grid:
    """Probabilities of one class over the ground, as nav_msgs/OccupancyGrid has them.

    Attributes:
        width, height: cells along the grid's own x and y.
        resolution_m: side of a cell.
        position: (x, y, z) of the corner of cell (0, 0), base_link.
        orientation: quaternion (x, y, z, w) of the grid's axes in base_link.
        cells: (height, width) int8, 0 to 100, row 0 at the corner.
    """

    width: int
    height: int
    resolution_m: float
    position: Point
    orientation: tuple[float, float, float, float]
    cells: NDArray[np.int8]


@dataclass(frozen=True)
class Wanted:
    """The outputs to compute, since somebody listens to them.

    Attributes:
        objects, detections, markers, picture: see :class:`Output`.
        grids: classes of the segmentation head; None for all.
    """

    objects: bool = True
    detections: bool = True
    markers: bool = True
    picture: bool = True
    grids: Collection[str] | None = None


@dataclass(frozen=True)
class Output:
    """Everything that is published of one perception; None (grids: no entry) where it was not wanted.

    Attributes:
        objects: (n, 11) float32 rows of :data:`OBJECT_FIELDS`, all boxes above the score threshold.
        detections: the same boxes as single values.
        markers: those of them above the marker threshold.
        grids: by class of the segmentation head.
        picture: (side, side, 3) uint8 RGB bird's-eye view with the boxes above the marker threshold.
    """

    objects: NDArray[np.float32] | None = None
    detections: Sequence[Detection] | None = None
    markers: Sequence[Detection] | None = None
    grids: Mapping[str, Grid] = field(default_factory=dict)
    picture: Image | None = None


def convert(
    perception: Perception,
    head: SegmentationConfig | None,
    settings: NodeSettings,
    wanted: Wanted | None = None,
) -> Output:
    """Compute what is published of one perception.

    Args:
        perception: of the predictor.
        head: the model's segmentation settings; None without a segmentation head.
        settings: thresholds, classes and the picture's size.
        wanted: what to compute; None for all.
    """
    wanted = wanted or Wanted()
    boxes = select(boxes_in_base(perception), settings.score_threshold, settings.classes)
    shown = select(boxes, settings.marker_threshold)
    listed = detections(boxes) if wanted.detections else None
    markers = None
    if wanted.markers and listed is not None:
        assert boxes.scores is not None
        above = (boxes.scores >= settings.marker_threshold).tolist()
        markers = [box for box, is_above in zip(listed, above, strict=True) if is_above]
    elif wanted.markers:
        markers = detections(shown)
    return Output(
        objects=object_rows(boxes) if wanted.objects else None,
        detections=listed,
        markers=markers,
        grids=_grids(perception, head, wanted.grids),
        picture=bev_picture(perception, shown, head, settings.bev_image_size) if wanted.picture else None,
    )


def boxes_in_base(perception: Perception) -> Boxes3D:
    """Transform the boxes of a perception to the vehicle's frame; float64 values."""
    values = transform_boxes(perception.boxes.values.double(), perception.bev_to_ego)
    return Boxes3D(values, perception.boxes.labels, perception.boxes.scores)


def select(boxes: Boxes3D, threshold: float, classes: Sequence[str] = ()) -> Boxes3D:
    """Keep the boxes of some classes with at least a score.

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
    """Convert boxes to single values with what is drawn of them.

    Args:
        boxes: base_link, scored.
    """
    assert boxes.scores is not None
    rows = zip(boxes.values.tolist(), boxes.labels.tolist(), boxes.scores.tolist(), strict=True)
    return [_detection(row, DETECTION_CLASSES[label], score) for row, label, score in rows]


def _detection(row: Sequence[float], class_name: str, score: float) -> Detection:
    x, y, z, length, width, height, yaw, vx, vy = row
    orientation, position = _quaternion(yaw), (x, y, z)
    return Detection(
        class_name=class_name,
        score=score,
        position=position,
        orientation=orientation,
        size=(length, width, height),
        velocity=(vx, vy),
        colour=_CLASS_COLOURS[class_name],
        heading=(position, _beyond_front(position, orientation, length)),
        arrow=_arrow(position, vx, vy),
        label=f"{class_name} {score:.2f}",
        label_position=(x, y, z + height / 2 + _LABEL_ABOVE_M),
    )


def _quaternion(yaw: float) -> tuple[float, float, float, float]:
    return 0.0, 0.0, math.sin(yaw / 2), math.cos(yaw / 2)


def object_rows(boxes: Boxes3D) -> NDArray[np.float32]:
    """Convert boxes to rows of :data:`OBJECT_FIELDS`.

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
    """Convert rows of :data:`OBJECT_FIELDS` back to boxes.

    Args:
        rows: (n, 11).
    """
    values = torch.from_numpy(np.array(rows, dtype=np.float32).reshape(-1, len(OBJECT_FIELDS)))
    return Boxes3D(values[:, :9], values[:, 10].round().long(), values[:, 9])


def _arrow(position: Point, vx: float, vy: float) -> tuple[Point, ...]:
    """Pairs of ends of a velocity arrow, see :class:`Detection`."""
    speed = math.hypot(vx, vy)
    if not speed >= MIN_ARROW_SPEED_M_S or not math.isfinite(speed):
        return ()
    x, y, z = position
    tip = (x + vx, y + vy, z)
    back = min(_HEAD_M / speed, 0.5)
    left, right = (
        (tip[0] - back * (vx - side), tip[1] - back * (vy + turn), z) for side, turn in ((vy, vx), (-vy, -vx))
    )
    return position, tip, left, tip, right, tip


def _beyond_front(position: Point, orientation: tuple[float, float, float, float], length: float) -> Point:
    """A metre beyond the middle of a box's front."""
    x, y, z = position
    _, _, qz, qw = orientation
    yaw, reach = 2 * math.atan2(qz, qw), length / 2 + 1.0
    return x + reach * math.cos(yaw), y + reach * math.sin(yaw), z


def _grids(
    perception: Perception, head: SegmentationConfig | None, classes: Collection[str] | None
) -> dict[str, Grid]:
    if perception.segmentation is None or head is None:
        return {}
    layers = zip(head.classes, perception.segmentation, strict=True)
    return {
        name: occupancy(layer, head.grid, perception.bev_to_ego)
        for name, layer in layers
        if classes is None or name in classes
    }


def occupancy(probabilities: Tensor, grid: BEVGrid, bev_to_base: Tensor) -> Grid:
    """Convert one class's map to an occupancy grid.

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
    return Grid(
        width=grid.columns,
        height=grid.rows,
        resolution_m=grid.cell_x_m,
        position=(float(corner[0]), float(corner[1]), 0.0),
        orientation=_quaternion(float(yaw_of(bev_to_base))),
        cells=cells,
    )
