"""Evaluate a recording against the ground truth, with the metrics of offline evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from bevperception.bags.recording import Recording
from bevperception.bags.scene import stamp_ns_of_record
from bevperception.config import ExperimentConfig
from bevperception.data.map_labels import SegmentationLabels
from bevperception.data.nuscenes import REFERENCE_SENSOR, NuScenesReader
from bevperception.errors import DataError
from bevperception.evaluation.detection import evaluate_detection
from bevperception.evaluation.runner import METRICS_NAME, EvaluationResult
from bevperception.evaluation.segmentation import SegmentationMetric
from bevperception.evaluation.submission import SubmissionBox, submission_boxes
from bevperception.files import write_json
from bevperception.geometry import invert_rigid, transform_boxes
from bevperception.structures import BadSample, Boxes3D
from bevperception.visualization.bev import SegmentationLayers
from bevperception.visualization.compose import Opinion, PictureStyle
from bevperception.visualization.samples import SamplePainter
from bevperception.visualization.text import Image

_CERTAIN = 1e-3


def reference_stamp_ns(reader: NuScenesReader, token: str) -> int:
    """The instant of a sample as bags of scenes stamp it: of its LIDAR_TOP record."""
    return stamp_ns_of_record(reader.sensor_data(reader.nusc.get("sample", token), REFERENCE_SENSOR))


def evaluate_recording(
    recording: Recording, config: ExperimentConfig, reader: NuScenesReader, split: str, folder: Path
) -> EvaluationResult:
    """Compute detection and segmentation metrics of published results.

    Samples without a result count as frames without any detection.

    Args:
        recording: results in base_link.
        config: of the model that ran.
        reader: open tables of the scenes that were played.
        split: predefined, or named in splits.json; all of its scenes were to be played.
        folder: for the submission and metrics.json.

    Raises:
        DataError: if the recording has no result of the split at all.
    """
    heads = config.model
    results: dict[str, list[SubmissionBox]] = {}
    missing = []
    metric = SegmentationMetric(heads.segmentation.classes)
    labels = SegmentationLabels(reader.root, heads.segmentation, config.data.divider_width_m)
    for token in (token for scene in reader.scenes(split) for token in scene.sample_tokens):
        stamp_ns = reference_stamp_ns(reader, token)
        boxes = recording.objects.get(stamp_ns)
        results[token] = []
        if boxes is None:
            missing.append(BadSample(token, "nothing was published for it"))
            continue
        sample = reader.sample(token)
        results[token] = submission_boxes(boxes, sample.ego_to_global, token)
        probabilities = recording.probabilities(stamp_ns, heads.segmentation.classes)
        if probabilities is not None and heads.segmentation.enabled:
            vehicles = reader.annotations(sample).vehicles
            drawn, present = labels.draw(reader.location(sample.scene_token), sample.bev_to_global, vehicles)
            logits = probabilities.clamp(_CERTAIN, 1 - _CERTAIN).logit()
            metric.update(logits[None], drawn[None], present[None])
    if len(missing) == len(results):
        raise DataError(f"the recording has no result of split {split!r}: was another scene played?")
    result = EvaluationResult(
        detection=evaluate_detection(reader, split, results, folder) if heads.detection.enabled else None,
        segmentation=metric.result() if heads.segmentation.enabled else None,
        skipped=missing,
        samples=len(results),
    )
    write_json(folder / METRICS_NAME, result.as_dict())
    return result


def pictures_of(
    recording: Recording, config: ExperimentConfig, reader: NuScenesReader, split: str, threshold: float = 0.3
) -> Iterator[Image]:
    """Draw every sample with a result: its cameras, the published boxes and maps, the ground truth.

    Args:
        recording, config, reader, split: as for :func:`evaluate_recording`.
        threshold: boxes with lower scores are left out.
    """
    heads = config.model
    segmentation = heads.segmentation if heads.segmentation.enabled else None
    painter = SamplePainter(reader, segmentation, PictureStyle(score_threshold=threshold))
    for token in (token for scene in reader.scenes(split) for token in scene.sample_tokens):
        stamp_ns = reference_stamp_ns(reader, token)
        boxes = recording.objects.get(stamp_ns)
        if boxes is None:
            continue
        sample = reader.sample(token)
        layers = None
        probabilities = recording.probabilities(stamp_ns, heads.segmentation.classes)
        if probabilities is not None and segmentation is not None:
            layers = SegmentationLayers(probabilities, segmentation.classes, segmentation.grid)
        in_bev = _boxes_in_bev(boxes, invert_rigid(sample.bev_to_global) @ sample.ego_to_global)
        yield painter.paint(token, Opinion(in_bev, layers))


def _boxes_in_bev(boxes: Boxes3D, ego_to_bev: Tensor) -> Boxes3D:
    return Boxes3D(transform_boxes(boxes.values.double(), ego_to_bev), boxes.labels, boxes.scores)
