"""nuScenes detection submissions: boxes in the global frame as the evaluation server takes them.

Format: nuScenes devkit, python-sdk/nuscenes/eval/detection/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bevperception.documents import read_json
from bevperception.errors import DataError
from bevperception.files import write_json
from bevperception.geometry import quaternion_of_yaw, transform_boxes
from bevperception.structures import Boxes3D
from bevperception.taxonomy import DEFAULT_ATTRIBUTES, DETECTION_CLASSES

MAX_BOXES = 500
"""The evaluation refuses more boxes a sample."""
MOST_BYTES = 4 * 1024**3
"""Of a submission that is read; 500 boxes in each of the 6019 validation samples take about 1.5 GB."""
MOVING_SPEED_M_S = 0.2
"""Boxes faster than this get the attribute of a moving object (mmdet3d 0.17, nuscenes_dataset.py)."""
SUBMISSION_META = {
    "use_camera": True,
    "use_lidar": False,
    "use_radar": False,
    "use_map": False,
    "use_external": False,
}

SubmissionBox = dict[str, Any]


def devkit_size(boxes: Tensor) -> Tensor:
    """Sizes (n, 3) in nuScenes' order, width, length, height, of box rows (n, 9)."""
    return boxes[:, [4, 3, 5]]


def submission_boxes(boxes: Boxes3D, bev_to_global: Tensor, sample_token: str) -> list[SubmissionBox]:
    """Convert one sample's detections to submission format, at most :data:`MAX_BOXES`, best first.

    Args:
        boxes: BEV frame; scored. An unknown velocity (NaN) is written as zero.
        bev_to_global: (4, 4) float64, a rigid transform.
        sample_token: of the sample.

    Raises:
        ValueError: if the boxes carry no scores.
        DataError: if a box is not finite or has no volume: the weights that predicted it are damaged.
    """
    if boxes.scores is None:
        raise ValueError("a submission needs scored boxes, got ground truth")
    best = boxes.scores.argsort(descending=True, stable=True)[:MAX_BOXES]
    values = boxes.values[best].detach().cpu().double()
    scores, labels = boxes.scores[best].tolist(), boxes.labels[best].tolist()
    placed = transform_boxes(values, bev_to_global.cpu().double())
    velocities = placed[:, 7:9].nan_to_num(0.0, posinf=math.inf, neginf=-math.inf)
    usable = placed[:, :7].isfinite().all(-1) & velocities.isfinite().all(-1) & (placed[:, 3:6] > 0).all(-1)
    if not (bool(usable.all()) and all(math.isfinite(score) for score in scores)):
        raise DataError(
            f"sample {sample_token}: a predicted box is not finite or has no volume\n"
            f"the checkpoint is probably damaged; evaluate an earlier one"
        )
    sizes, turns = devkit_size(placed).tolist(), quaternion_of_yaw(placed[:, 6]).tolist()
    entries: list[SubmissionBox] = []
    for index, label in enumerate(labels):
        name = DETECTION_CLASSES[label]
        velocity = velocities[index].tolist()
        entries.append(
            {
                "sample_token": sample_token,
                "translation": placed[index, :3].tolist(),
                "size": sizes[index],
                "rotation": turns[index],
                "velocity": velocity,
                "detection_name": name,
                "detection_score": float(scores[index]),
                "attribute_name": attribute_of(name, math.hypot(*velocity)),
            }
        )
    return entries


def attribute_of(detection_class: str, speed_m_s: float) -> str:
    """The attribute that a class most often has at a speed; '' for classes without attributes."""
    moving, still = DEFAULT_ATTRIBUTES[detection_class]
    return moving if speed_m_s > MOVING_SPEED_M_S else still


def write_submission(path: Path, results: Mapping[str, Sequence[SubmissionBox]]) -> None:
    """Write a submission file; nothing is left half-written.

    Args:
        path: JSON file; its folder is made.
        results: boxes by sample token, every sample of the split, possibly with none.
    """
    write_json(path, {"meta": SUBMISSION_META, "results": {k: list(v) for k, v in results.items()}})


def read_submission(path: Path) -> dict[str, list[SubmissionBox]]:
    """Read the boxes of a submission file by sample token.

    Raises:
        DataError: if the file is missing or not a submission.
    """
    content = read_json(path, f"submission {path}", DataError, MOST_BYTES)
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise DataError(f"{path} is no nuScenes submission: it has no 'results' by sample token")
    results: dict[str, list[SubmissionBox]] = content["results"]
    return results
