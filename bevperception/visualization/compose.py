"""Compose a picture of one instant: the cameras above, bird's-eye views of prediction and truth below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final

import cv2
import numpy as np
from torch import Tensor

from bevperception.errors import DataError
from bevperception.ranges import Range, Share, check_settings
from bevperception.structures import Boxes3D
from bevperception.visualization.bev import BEVView, SegmentationLayers, render_bev
from bevperception.visualization.cameras import camera_grid
from bevperception.visualization.palette import (
    BACKGROUND,
    DETECTION_COLOURS,
    INK,
    MUTED,
    RGB,
    SEGMENTATION_COLOURS,
    mix,
)
from bevperception.visualization.text import Image, draw_text, text_size

_TITLE_PX: Final = 26
_TEXT_PX: Final = 18
_GAP_PX: Final = 8
_MARGIN_PX: Final = 12

WIDTH_PX: Final = Range(200, 10_000)
RANGE_M: Final = Range(1.0, 1000.0)
MOST_BOXES: Final = 2000
"""More boxes would hide each other, and take minutes to draw."""


@dataclass
class Opinion:
    """Boxes and segmentation of an instant, from the annotators or from a model.

    Attributes:
        boxes: BEV frame; None where this side has no boxes at all (a model without a detection head).
        segmentation: BEV frame, or None.
    """

    boxes: Boxes3D | None = None
    segmentation: SegmentationLayers | None = None


@dataclass
class PictureStyle:
    """Size, threshold and layout of a picture.

    Args:
        width: of the picture in pixels.
        bev_height: of the bird's-eye views in pixels.
        range_m: how far the bird's-eye views reach ahead and behind.
        score_threshold: predicted boxes with lower scores are left out.
        segmentation_threshold: predicted layers are painted where their probability is above.

    Raises:
        ConfigError: a value is out of its range.
    """

    width: Annotated[int, WIDTH_PX] = 1600
    bev_height: Annotated[int, Range(100, 10_000)] = 780
    range_m: Annotated[float, RANGE_M] = 52.0
    score_threshold: Share = 0.3
    segmentation_threshold: Share = 0.5

    def __post_init__(self) -> None:
        check_settings(self, "")


def compose_picture(
    title: str,
    images: Mapping[str, Image],
    bev_to_image: Mapping[str, Tensor],
    *,
    truth: Opinion | None = None,
    prediction: Opinion | None = None,
    bev_to_ego: Tensor | None = None,
    style: PictureStyle | None = None,
) -> Image:
    """Cameras with boxes, bird's-eye views beside each other, and the legend.

    The cameras show the predicted boxes; where there is no prediction, those of the ground truth.

    Args:
        title: one line, ASCII.
        images: (height, width, 3) uint8 RGB by camera name.
        bev_to_image: (4, 4) by camera name: BEV frame to homogeneous pixels of that image.
        truth: ground truth, or None.
        prediction: the model's, or None.
        bev_to_ego: (4, 4) rigid; None where the BEV frame is the ego frame.
        style: layout; None for the default.

    Returns:
        (height, style.width, 3) uint8 RGB; the height depends on the style and the cameras' aspect only,
        so the pictures of a scene make a video.

    Raises:
        DataError: there are more than :data:`MOST_BOXES` boxes to draw.
    """
    style = style or PictureStyle()
    shown = None if prediction is None else _above(prediction, style.score_threshold)
    for opinion, hint in ((shown, "; raise the lowest score that is drawn"), (truth, "")):
        count = 0 if opinion is None or opinion.boxes is None else len(opinion.boxes)
        if count > MOST_BOXES:
            raise DataError(f"{count} boxes in one picture; at most {MOST_BOXES} are drawn{hint}")
    in_cameras = shown if shown is not None and shown.boxes is not None else truth
    parts = [
        _title_bar(title, "boxes: " + ("ground truth" if in_cameras is truth else "prediction"), style.width),
        camera_grid(
            images, bev_to_image, None if in_cameras is None else in_cameras.boxes, width=style.width
        ),
        _bev_row(shown, truth, bev_to_ego, style),
        legend(style.width, style.score_threshold if shown is not None else None),
    ]
    return np.concatenate(parts, axis=0)


def _above(opinion: Opinion, score: float) -> Opinion:
    boxes = opinion.boxes
    if boxes is not None and boxes.scores is not None:
        boxes = boxes[boxes.scores >= score]
    return Opinion(boxes, opinion.segmentation)


def _title_bar(title: str, note: str, width: int) -> Image:
    bar = np.full((_TITLE_PX * 2, width, 3), BACKGROUND, dtype=np.uint8)
    top = _TITLE_PX // 2 - 2
    room = width - 3 * _MARGIN_PX - text_size(note, _TEXT_PX)[0]
    while text_size(title, _TITLE_PX)[0] > room and len(title) > 4:
        title = title[:-4] + "..."
    draw_text(bar, title, (_MARGIN_PX, top), _TITLE_PX, INK)
    draw_text(bar, note, (width - _MARGIN_PX, top + 6), _TEXT_PX, MUTED, align="right")
    return bar


def _bev_row(
    prediction: Opinion | None, truth: Opinion | None, bev_to_ego: Tensor | None, style: PictureStyle
) -> Image:
    """Prediction left and ground truth right; one alone takes the whole width."""
    named = [(n, o) for n, o in (("PREDICTION", prediction), ("GROUND TRUTH", truth)) if o is not None]
    if not named:
        named = [("NO BOXES GIVEN", Opinion())]
    row = np.full((style.bev_height + 2 * _GAP_PX, style.width, 3), BACKGROUND, dtype=np.uint8)
    panel_width = (style.width - _GAP_PX * (len(named) - 1)) // len(named)
    for k, (name, opinion) in enumerate(named):
        view = BEVView(panel_width, style.bev_height, style.range_m)
        panel = render_bev(
            view,
            opinion.boxes,
            opinion.segmentation,
            bev_to_ego=bev_to_ego,
            threshold=style.segmentation_threshold,
        )
        draw_text(panel, name, (_MARGIN_PX, _MARGIN_PX), _TEXT_PX + 2, INK)
        draw_text(panel, _summary(opinion), (_MARGIN_PX, _MARGIN_PX + 26), _TEXT_PX - 2, MUTED)
        left = k * (panel_width + _GAP_PX)
        row[_GAP_PX : _GAP_PX + style.bev_height, left : left + panel_width] = panel
    return row


def _summary(opinion: Opinion) -> str:
    boxes = "no boxes" if opinion.boxes is None else f"{len(opinion.boxes)} boxes"
    layers = opinion.segmentation
    if layers is None:
        return f"{boxes}, no segmentation"
    count = len(layers.classes)
    return f"{boxes}, {count} segmentation layer{'s' if count != 1 else ''}"


def legend(width: int, score_threshold: float | None = None) -> Image:
    """The colours of all classes, and how velocities and scores are shown.

    Args:
        width: in pixels.
        score_threshold: the lowest score that is drawn; None where no scores are.

    Returns:
        (height, width, 3) uint8 RGB, the same height whatever is shown.
    """
    line_px = _TEXT_PX + 14
    strip = np.full((2 * line_px + _MARGIN_PX, width, 3), BACKGROUND, dtype=np.uint8)
    note = "arrow: 1 s of motion"
    if score_threshold is not None:
        note += f"    scores from {score_threshold:.2f}"
    _legend_row(strip, 0, "boxes", DETECTION_COLOURS, filled=False)
    _legend_row(strip, line_px, "ground", SEGMENTATION_COLOURS, filled=True)
    draw_text(strip, note, (width - _MARGIN_PX, line_px + 5), _TEXT_PX - 2, MUTED, align="right")
    return strip


def _legend_row(strip: Image, top: int, heading: str, colours: Mapping[str, RGB], filled: bool) -> None:
    size = _TEXT_PX - 2
    draw_text(strip, heading, (_MARGIN_PX, top + 5), size, MUTED)
    x = _MARGIN_PX + 72
    for name, colour in colours.items():
        corner, opposite = (x, top + 6), (x + 18, top + 22)
        fill = colour if filled else mix(BACKGROUND, colour, 0.3)
        cv2.rectangle(strip, corner, opposite, fill, -1)
        cv2.rectangle(
            strip, corner, opposite, mix(colour, INK, 0.25) if filled else colour, 1 if filled else 2
        )
        label = name.replace("_", " ")
        draw_text(strip, label, (x + 26, top + 5), size, INK)
        x += 26 + text_size(label, size)[0] + 22
