"""nuScenes detection metrics, computed by the unmodified devkit."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.data_classes import DetectionMetrics
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.nuscenes import NuScenes

from bevperception.data.ground_truth import require_ground_truth_to_evaluate
from bevperception.data.nuscenes import REFERENCE_SENSOR, NuScenesReader
from bevperception.data.splits import check_evaluable
from bevperception.errors import DataError
from bevperception.evaluation.submission import SubmissionBox, write_submission
from bevperception.files import write_json
from bevperception.taxonomy import DETECTION_CLASSES

CONFIG_NAME = "detection_cvpr_2019"
RESULTS_FILE = "results_nusc.json"
METRICS_FILE = "metrics_summary.json"
_ERRORS = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")
_OUT_OF_RANGE_M = 1e6
_NO_SCENE = ""


def class_range_by_name() -> dict[str, float]:
    """How far from the vehicle, on the ground, the devkit counts objects of each class, in metres."""
    ranges = config_factory(CONFIG_NAME).class_range
    return {name: float(ranges[name]) for name in DETECTION_CLASSES}


def class_ranges_m() -> list[float]:
    """The values of :func:`class_range_by_name`, by index of DETECTION_CLASSES."""
    return list(class_range_by_name().values())


@dataclass(frozen=True)
class ClassMetrics:
    """One class's metrics; errors are NaN where nuScenes defines none for the class.

    Attributes:
        ap: average precision, mean over the distance thresholds.
        ap_by_distance: by threshold in metres.
        translation_m: average translation error (ATE).
        scale: average scale error (ASE), 1 - IoU of aligned boxes.
        orientation_rad: average orientation error (AOE).
        velocity_m_s: average velocity error (AVE).
        attribute: average attribute error (AAE), 1 - accuracy.
        ground_truth: boxes that count, after the devkit's filters.
    """

    ap: float
    ap_by_distance: dict[str, float]
    translation_m: float
    scale: float
    orientation_rad: float
    velocity_m_s: float
    attribute: float
    ground_truth: int

    @property
    def errors(self) -> tuple[float, float, float, float, float]:
        """ATE, ASE, AOE, AVE, AAE."""
        return self.translation_m, self.scale, self.orientation_rad, self.velocity_m_s, self.attribute


@dataclass(frozen=True)
class DetectionSummary:
    """Means over classes: mAP, the five mean errors (metres, 1 - IoU, radians, m/s, 1 - accuracy), NDS."""

    mAP: float
    mATE: float
    mASE: float
    mAOE: float
    mAVE: float
    mAAE: float
    NDS: float

    @classmethod
    def over(cls, classes: Sequence[ClassMetrics]) -> DetectionSummary:
        """The means over some classes, weighted as the devkit does (mAP 5, each error 1).

        An error that none of the classes defines (NaN) has no part in NDS.

        Args:
            classes: at least one.
        """
        mean_ap = float(np.mean([c.ap for c in classes]))
        ate, ase, aoe, ave, aae = (_mean_defined(e) for e in zip(*(c.errors for c in classes), strict=True))
        scores = [max(0.0, 1.0 - error) for error in (ate, ase, aoe, ave, aae) if not np.isnan(error)]
        return cls(mean_ap, ate, ase, aoe, ave, aae, (5 * mean_ap + sum(scores)) / (5 + len(scores)))


@dataclass(frozen=True)
class DetectionResult:
    """Detection metrics of a split.

    Attributes:
        overall: the devkit's own, where a class without ground truth counts AP 0 and errors 1.
        present: means over the classes with ground truth.
        classes: by name, all ten.
    """

    overall: DetectionSummary
    present: DetectionSummary
    classes: dict[str, ClassMetrics]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a metrics file or a logger."""
        return asdict(self)

    def table(self) -> str:
        """The summary and the per-class table that people know from the devkit."""
        lines = [f"{name}: {value:.4f}" for name, value in asdict(self.overall).items()]
        if self.present != self.overall:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in asdict(self.present).items())
            count = sum(c.ground_truth > 0 for c in self.classes.values())
            lines.append(f"over the {count} classes present: {shown}")
        lines += ["", "Per-class results:"]
        header = ("Object Class", "GT", "AP", "ATE", "ASE", "AOE", "AVE", "AAE")
        lines.append(f"{header[0]:<22}{header[1]:>7}" + "".join(f"{h:>8}" for h in header[2:]))
        for name, metrics in self.classes.items():
            numbers = "".join(f"{value:8.3f}" for value in (metrics.ap, *metrics.errors))
            lines.append(f"{name:<22}{metrics.ground_truth:>7}{numbers}")
        return "\n".join(lines)


def evaluate_detection(
    reader: NuScenesReader, split: str, results: Mapping[str, Sequence[SubmissionBox]], output_folder: Path
) -> DetectionResult:
    """Evaluate a split with the devkit; writes the submission and the metrics.

    Args:
        reader: open tables.
        split: predefined for the tables' version, or named in splits.json.
        results: boxes by sample token (see :func:`~bevperception.evaluation.submission.submission_boxes`);
            samples of other splits are left out.
        output_folder: :data:`RESULTS_FILE` and :data:`METRICS_FILE` are written here.

    Raises:
        ConfigError: if the split does not exist or belongs to another version.
        DataError: if results of some samples are missing, or no annotation of the split counts.
    """
    names = [scene["name"] for scene in reader.nusc.scene]
    check_evaluable(split, reader.root / reader.nusc.version, names)
    tokens = [token for scene in reader.scenes(split) for token in scene.sample_tokens]
    require_ground_truth_to_evaluate(reader, split, tokens, class_range_by_name())
    missing = [token for token in tokens if token not in results]
    if missing:
        raise DataError(
            f"results for {len(missing)} of the {len(tokens)} samples of split {split!r} are missing, first "
            f"{missing[0]}\npredict the whole split"
        )
    of_split = {token: results[token] for token in tokens}
    write_submission(output_folder / RESULTS_FILE, of_split)
    metrics, counts = _run_devkit(reader, split, of_split)
    if not any(counts.values()):
        raise DataError(f"split {split!r}: all ground truth lies in bicycle racks and does not count")
    result = _result(metrics, counts)
    write_json(output_folder / METRICS_FILE, metrics.serialize() | {"present_classes": result.as_dict()})
    return result


def _run_devkit(
    reader: NuScenesReader, split: str, results: Mapping[str, Sequence[SubmissionBox]]
) -> tuple[DetectionMetrics, dict[str, int]]:
    """Compute the devkit's metrics, and count the ground-truth boxes of each class that it uses.

    The devkit raises when there is no prediction at all: a single one too far away to count stands in. It
    looks at the reference pose of every sample, so samples without one take no part.
    """
    config = config_factory(CONFIG_NAME)
    nusc = _with_reference_poses(reader.nusc)
    results = {t: boxes for t, boxes in results.items() if nusc.get("sample", t)["scene_token"] != _NO_SCENE}
    if not any(results.values()):
        first = next(iter(results))
        results = {**results, first: [_far_away(first)]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / RESULTS_FILE
        write_submission(path, results)
        evaluation = DetectionEval(nusc, config, str(path), eval_set=split, output_dir=folder, verbose=False)
        metrics, _ = evaluation.evaluate()
    counts = dict.fromkeys(DETECTION_CLASSES, 0)
    for box in evaluation.gt_boxes.all:
        counts[box.detection_name] += 1
    return metrics, counts


def _with_reference_poses(nusc: NuScenes) -> NuScenes:
    """The tables; samples without a key frame of the reference sensor are in a scene outside all splits."""
    absent = {sample["token"] for sample in nusc.sample if REFERENCE_SENSOR not in sample["data"]}
    if not absent:
        return nusc
    part = copy.copy(nusc)
    part.scene = [*nusc.scene, {"token": _NO_SCENE, "name": None}]
    part.sample = [s | {"scene_token": _NO_SCENE} if s["token"] in absent else s for s in nusc.sample]
    part._token2ind = nusc._token2ind | {"scene": nusc._token2ind["scene"] | {_NO_SCENE: len(nusc.scene)}}
    return part


def _far_away(sample_token: str) -> SubmissionBox:
    return {
        "sample_token": sample_token,
        "translation": [_OUT_OF_RANGE_M, _OUT_OF_RANGE_M, 0.0],
        "size": [1.0, 1.0, 1.0],
        "rotation": [1.0, 0.0, 0.0, 0.0],
        "velocity": [0.0, 0.0],
        "detection_name": DETECTION_CLASSES[0],
        "detection_score": 0.0,
        "attribute_name": "",
    }


def _result(metrics: DetectionMetrics, counts: Mapping[str, int]) -> DetectionResult:
    classes = {}
    for name in DETECTION_CLASSES:
        by_distance = {str(d): float(metrics.get_label_ap(name, d)) for d in metrics.cfg.dist_ths}
        ate, ase, aoe, ave, aae = (float(metrics.get_label_tp(name, error)) for error in _ERRORS)
        ap = float(metrics.mean_dist_aps[name])
        classes[name] = ClassMetrics(ap, by_distance, ate, ase, aoe, ave, aae, counts[name])
    ate, ase, aoe, ave, aae = (float(metrics.tp_errors[error]) for error in _ERRORS)
    overall = DetectionSummary(metrics.mean_ap, ate, ase, aoe, ave, aae, metrics.nd_score)
    present = [c for c in classes.values() if c.ground_truth > 0]
    return DetectionResult(overall, DetectionSummary.over(present), classes)


def _mean_defined(values: Sequence[float]) -> float:
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")
