"""Pictures of the samples of an open data set, with what a model said about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bevperception.config_model import SegmentationConfig
from bevperception.data.images import read_image
from bevperception.data.map_labels import SegmentationLabels
from bevperception.data.nuscenes import CameraRecord, NuScenesReader, SampleRecord, projection_matrix
from bevperception.errors import DataError, SampleError
from bevperception.geometry import invert_rigid, pose_matrix, transform_boxes, yaw_of
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
            {c.channel: projection_matrix(c, sample.bev_to_global) for c in sample.cameras},
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
        image = read_image(camera.path, (camera.width, camera.height))
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
        DataError: if an entry lacks something or names an unknown class.
    """
    rows: list[list[float]] = []
    labels: list[int] = []
    scores: list[float] = []
    for entry in entries:
        try:
            width, length, height = entry["size"]
            pose = pose_matrix(_vector(entry["translation"], 3), _vector(entry["rotation"], 4))
            velocity = _vector(entry["velocity"], 2).tolist()
            labels.append(DETECTION_CLASSES.index(entry["detection_name"]))
            scores.append(float(entry["detection_score"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{name}: a box is not in the nuScenes submission format ({error}): {entry}"
            ) from error
        rows.append([*pose[:3, 3].tolist(), length, width, height, float(yaw_of(pose)), *velocity])
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 9)
    in_bev = transform_boxes(values, invert_rigid(bev_to_global))
    return Boxes3D(in_bev, torch.tensor(labels, dtype=torch.int64), torch.tensor(scores))


def _vector(values: Sequence[float], length: int) -> Tensor:
    vector = torch.tensor([float(v) for v in values], dtype=torch.float64)
    if len(vector) != length:
        raise ValueError(f"{length} numbers wanted, got {len(vector)}")
    return vector
