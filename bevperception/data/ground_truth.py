"""Check that the samples of a split have ground truth to train on or to evaluate with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from nuscenes.eval.detection.utils import category_to_detection_name

from bevperception.config_model import ModelConfig
from bevperception.data.nuscenes import REFERENCE_SENSOR, NuScenesReader
from bevperception.errors import DataError


def needs_annotations(model: ModelConfig) -> bool:
    """Whether a part of the model is taught and measured by annotated boxes."""
    parts = (model.detection.enabled, model.centres.enabled, model.perspective.enabled)
    return any(parts) or (model.segmentation.enabled and "vehicle" in model.segmentation.classes)


def has_ground_truth(
    reader: NuScenesReader, tokens: Iterable[str], min_points: int, ranges_m: Mapping[str, float] | None
) -> bool:
    """Whether some sample has a box of the ten detection classes.

    Args:
        reader: open tables.
        tokens: samples.
        min_points: fewest lidar and radar points of a box that counts.
        ranges_m: how far from the vehicle boxes count, by detection class; None for any distance.
    """
    nusc = reader.nusc
    for token in tokens:
        sample = nusc.get("sample", token)
        for annotation in sample["anns"]:
            record = nusc.get("sample_annotation", annotation)
            name = category_to_detection_name(record["category_name"])
            if name is None or record["num_lidar_pts"] + record["num_radar_pts"] < min_points:
                continue
            if ranges_m is None:
                return True
            if REFERENCE_SENSOR not in sample["data"]:
                break
            data = nusc.get("sample_data", sample["data"][REFERENCE_SENSOR])
            ego = nusc.get("ego_pose", data["ego_pose_token"])["translation"]
            place = record["translation"]
            if math.hypot(place[0] - ego[0], place[1] - ego[1]) < ranges_m[name]:
                return True
    return False


def require_ground_truth_to_train(reader: NuScenesReader, split: str, tokens: Sequence[str]) -> None:
    """Refuse to train on samples without any box: the model would learn that nothing is there.

    Args:
        reader: open tables; its ``min_points`` counts.
        split: for the message.
        tokens: samples to train on.

    Raises:
        DataError: if there is none.
    """
    if not has_ground_truth(reader, tokens, reader.config.min_points, None):
        raise DataError(
            f"split {split!r} has no annotation of the ten detection classes with at least "
            f"{reader.config.min_points} points (data.min_points) in its {len(tokens)} samples\n"
            "training on it would teach that nothing is there: choose another data.train_split"
        )


def require_ground_truth_to_evaluate(
    reader: NuScenesReader, split: str, tokens: Sequence[str], ranges_m: Mapping[str, float]
) -> None:
    """Refuse to evaluate on samples without any box that counts: every metric would be 0 or undefined.

    Args:
        reader: open tables.
        split: for the message.
        tokens: samples to evaluate on.
        ranges_m: how far from the vehicle the devkit counts objects, by detection class.

    Raises:
        DataError: if there is none; it names the command that works without.
    """
    if not has_ground_truth(reader, tokens, 1, ranges_m):
        raise DataError(
            f"split {split!r} has no annotation that the evaluation counts (ten detection classes, points "
            f"inside, in range) in its {len(tokens)} samples, as in nuScenes' test set\npredict instead: "
            f"bevperception predict --weights PATH --split {split} --data.root {reader.root} --out FOLDER"
        )
