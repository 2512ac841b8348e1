"""Draw samples of a data set with a model's predictions for them."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bevperception.config_model import SegmentationConfig
from bevperception.data.images import read_image
from bevperception.data.map_labels import SegmentationLabels
from bevperception.data.nuscenes import CameraRecord, NuScenesReader, SampleRecord
from bevperception.errors import DataError, SampleError
from bevperception.geometry import (
    MAX_COORDINATE_M,
    invert_rigid,
    rotation_from_quaternion,
    transform_boxes,
    yaw_of,
)
from bevperception.structures import Boxes3D
from bevperception.taxonomy import DETECTION_CLASSES
from bevperception.visualization.bev import SegmentationLayers
from bevperception.visualization.compose import Opinion, PictureStyle, compose_picture
from bevperception.visualization.text import Image


class SamplePainter:
    """Draws samples: their camera images at full size, their ground truth, and a prediction.

    Args:
        reader: open tables; its configuration names the cameras and the BEV frame.
        segmentation: which layers of ground truth to draw, and their grid; None for none.
        style: layout of the pictures.
    """

    def __init__(
        self,
        reader: NuScenesReader,
        segmentation: SegmentationConfig | None,
        style: PictureStyle | None = None,
    ) -> None:
        self.reader = reader
        self.style = style or PictureStyle()
        self._segmentation = segmentation
        self._labels: SegmentationLabels | None = None
        if segmentation is not None:
            width_m = reader.config.divider_width_m
            self._labels = SegmentationLabels(reader.root, segmentation, width_m)

    def paint(self, token: str, prediction: Opinion | None = None) -> Image:
        """The picture of one sample.

        Args:
            token: of the sample.
            prediction: BEV frame of that sample; None shows the ground truth alone.

        Returns:
            (height, style.width, 3) uint8 RGB.

        Raises:
            SampleError: if an image, a calibration or an annotation cannot be used.
        """
        sample = self.reader.sample(token)
        scene = self.reader.nusc.get("scene", sample.scene_token)
        since_start_s = sample.timestamp_s - self._start_s(scene)
        return compose_picture(
            f"{scene['name']}   {since_start_s:.1f} s   {self.reader.location(sample.scene_token)}   {token}",
            {camera.channel: _read_rgb(camera, token) for camera in sample.cameras},
            {c.channel: c.projection(sample.bev_to_global) for c in sample.cameras},
            truth=self.truth(sample),
            prediction=prediction,
            bev_to_ego=invert_rigid(sample.ego_to_global) @ sample.bev_to_global,
            style=self.style,
        )

    def truth(self, sample: SampleRecord) -> Opinion:
        """Annotated boxes and the segmentation layers that have labels.

        Raises:
            SampleError: if an annotation cannot be used.
            DataError: if a map expansion is damaged.
        """
        annotations = self.reader.annotations(sample)
        boxes = annotations.boxes
        if self._labels is None or self._segmentation is None:
            return Opinion(boxes)
        location = self.reader.location(sample.scene_token)
        layers, present = self._labels.draw(location, sample.bev_to_global, annotations.vehicles)
        classes = tuple(
            name for name, known in zip(self._segmentation.classes, present.tolist(), strict=True) if known
        )
        return Opinion(boxes, SegmentationLayers(layers[present], classes, self._segmentation.grid))

    def _start_s(self, scene: dict[str, Any]) -> float:
        return float(self.reader.nusc.get("sample", scene["first_sample_token"])["timestamp"]) * 1e-6


def _read_rgb(camera: CameraRecord, token: str) -> Image:
    try:
        image = read_image(camera.path, camera.size)
    except DataError as error:
        raise SampleError(f"sample {token}, {camera.channel}: {error}", token) from error
    return np.ascontiguousarray(image[..., ::-1])


def boxes_of_submission(entries: Sequence[dict[str, Any]], bev_to_global: Tensor, name: str) -> Boxes3D:
    """Boxes of one sample of a submission file, in the sample's BEV frame.

    Args:
        entries: as ``evaluation.submission.read_submission`` gives them, global frame.
        bev_to_global: (4, 4) float64 of the sample.
        name: what messages call the file.

    Returns:
        scored boxes, in the order of the entries.

    Raises:
        DataError: if the entries are no list, or one is no box: something is missing or of a wrong type, a
            number is not finite or impossibly large, a size is not positive, or the class is unknown.
    """
    if not isinstance(entries, list):
        raise DataError(f"{name}: the boxes of a sample must be a list, got a {type(entries).__name__}")
    rows: list[list[float]] = []
    labels: list[int] = []
    scores: list[float] = []
    for entry in entries:
        try:
            row, label, score = _box_of(entry)
        except ValueError as error:
            raise DataError(
                f"{name}: a box is not in the nuScenes submission format ({error}): {reprlib.repr(entry)}"
            ) from error
        rows.append(row)
        labels.append(label)
        scores.append(score)
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 9)
    in_bev = transform_boxes(values, invert_rigid(bev_to_global))
    return Boxes3D(in_bev, torch.tensor(labels, dtype=torch.int64), torch.tensor(scores))


def _box_of(entry: object) -> tuple[list[float], int, float]:
    """Values in the global frame, label and score of one entry; raises ValueError if it is no box."""
    if not isinstance(entry, dict):
        raise ValueError(f"a box must be an object, got a {type(entry).__name__}")
    width, length, height = size = _numbers(entry, "size", 3)
    if min(size) <= 0.0:
        raise ValueError("size must be positive")
    rotation = _numbers(entry, "rotation", 4)
    if sum(number * number for number in rotation) < 1e-12:
        raise ValueError("rotation must be a quaternion, not zero")
    position, velocity = _numbers(entry, "translation", 3), _numbers(entry, "velocity", 2, unknown=True)
    if entry.get("detection_name") not in DETECTION_CLASSES:
        raise ValueError(f"detection_name must be one of {', '.join(DETECTION_CLASSES)}")
    (score,) = _numbers({"detection_score": [entry.get("detection_score")]}, "detection_score", 1)
    yaw = float(yaw_of(rotation_from_quaternion(torch.tensor(rotation, dtype=torch.float64))))
    row = [*position, length, width, height, yaw, *velocity]
    return row, DETECTION_CLASSES.index(entry["detection_name"]), score


def _numbers(entry: dict[str, Any], name: str, length: int, unknown: bool = False) -> list[float]:
    """The numbers of a field, also NaN if ``unknown``; raises ValueError if it is something else."""
    values = entry.get(name)
    if not isinstance(values, (list, tuple)) or [_is_number(v, unknown) for v in values] != [True] * length:
        count = f"{length} finite number{'s' if length > 1 else ''}"
        raise ValueError(f"{name} must be {count} of at most {MAX_COORDINATE_M:g}")
    return [float(value) for value in values]


def _is_number(value: object, unknown: bool) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= MAX_COORDINATE_M or (unknown and value != value)
