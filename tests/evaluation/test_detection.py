"""Detection evaluation on the tiny data set and on a real key frame."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nuscenes.nuscenes import NuScenes
from pyquaternion import Quaternion

from bevperception.config import DataConfig
from bevperception.data.nuscenes import NuScenesReader
from bevperception.errors import ConfigError, DataError
from bevperception.evaluation.detection import METRICS_FILE, RESULTS_FILE, evaluate_detection
from bevperception.evaluation.submission import (
    MAX_BOXES,
    SubmissionBox,
    attribute_of,
    read_submission,
    submission_boxes,
)
from bevperception.structures import Boxes3D
from bevperception.taxonomy import DETECTION_CLASSES
from tests.fixtures.tiny_nuscenes import VAL_SPLIT, VERSION

ALL_CLASSES = set(DETECTION_CLASSES)


@pytest.fixture(scope="module", params=["ego", "lidar"])
def tiny_reader(request: pytest.FixtureRequest, tiny_nuscenes: Path) -> NuScenesReader:
    return NuScenesReader(DataConfig(root=str(tiny_nuscenes), version=VERSION, bev_frame=request.param))


def scored(boxes: Boxes3D) -> Boxes3D:
    """Ground truth with a score of 1."""
    return Boxes3D(boxes.values, boxes.labels, torch.ones(len(boxes)))


def perfect_results(reader: NuScenesReader, split: str) -> dict[str, list[SubmissionBox]]:
    results = {}
    for scene in reader.scenes(split):
        for token in scene.sample_tokens:
            sample = reader.sample(token)
            boxes = scored(reader.annotations(sample).boxes)
            results[token] = submission_boxes(boxes, sample.bev_to_global, token)
    return results


def test_perfect_boxes_score_one(tiny_reader: NuScenesReader, tmp_path: Path) -> None:
    result = evaluate_detection(tiny_reader, VAL_SPLIT, perfect_results(tiny_reader, VAL_SPLIT), tmp_path)
    assert result.overall.mAP == pytest.approx(1.0)
    assert result.overall.mATE < 1e-4
    assert result.overall.mASE < 1e-5
    assert result.overall.mAOE < 1e-3
    assert result.overall.mAVE < 1e-3
    assert vars(result.present) == pytest.approx(vars(result.overall))
    assert {name for name, c in result.classes.items() if c.ground_truth > 0} == ALL_CLASSES
    assert result.classes["car"].ground_truth == 8, "two measured cars in four key frames"
    assert math.isnan(result.classes["traffic_cone"].orientation_rad)


def test_files_are_the_devkits(tiny_reader: NuScenesReader, tmp_path: Path) -> None:
    results = perfect_results(tiny_reader, VAL_SPLIT)
    result = evaluate_detection(tiny_reader, VAL_SPLIT, results, tmp_path)
    assert read_submission(tmp_path / RESULTS_FILE) == results
    written = json.loads((tmp_path / METRICS_FILE).read_text())
    assert written["nd_score"] == pytest.approx(result.overall.NDS)
    assert written["mean_ap"] == pytest.approx(result.overall.mAP)
    assert sorted(p.name for p in tmp_path.iterdir()) == [METRICS_FILE, RESULTS_FILE]


def test_table_shows_what_people_know(tiny_reader: NuScenesReader, tmp_path: Path) -> None:
    table = evaluate_detection(
        tiny_reader, VAL_SPLIT, perfect_results(tiny_reader, VAL_SPLIT), tmp_path
    ).table()
    for word in ("mAP: 1.0000", "mATE", "mASE", "mAOE", "mAVE", "mAAE", "NDS", *DETECTION_CLASSES):
        assert word in table


def test_no_predictions_score_zero(tiny_reader: NuScenesReader, tmp_path: Path) -> None:
    nothing: dict[str, list[SubmissionBox]] = {token: [] for token in perfect_results(tiny_reader, VAL_SPLIT)}
    result = evaluate_detection(tiny_reader, VAL_SPLIT, nothing, tmp_path)
    assert result.overall.mAP == 0.0
    assert result.overall.NDS == 0.0
    assert result.overall.mATE == 1.0
    assert all(c.ap == 0.0 for c in result.classes.values())
    assert all(c.ground_truth > 0 for c in result.classes.values())
    assert read_submission(tmp_path / RESULTS_FILE) == nothing, "no stand-in box in what is submitted"


def test_large_errors_score_zero_and_not_less(tiny_reader: NuScenesReader, tmp_path: Path) -> None:
    """Where all classes are present, the score over those present is the devkit's own."""
    results = perfect_results(tiny_reader, VAL_SPLIT)
    for box in (box for boxes in results.values() for box in boxes):
        x, y, z = box["translation"]
        box["translation"] = [x + 1.5, y, z]
        box["velocity"] = [box["velocity"][0] + 7.0, box["velocity"][1]]
        box["rotation"] = list(
            (Quaternion(axis=[0, 0, 1], degrees=140) * Quaternion(box["rotation"])).elements
        )
    result = evaluate_detection(tiny_reader, VAL_SPLIT, results, tmp_path)
    assert result.present is not None
    assert min(result.overall.mATE, result.overall.mAOE, result.overall.mAVE) > 1.0
    assert 0.0 < result.overall.mAP < 1.0
    assert vars(result.present) == pytest.approx(vars(result.overall))


def test_one_empty_sample_costs_its_boxes(tiny_reader: NuScenesReader, tmp_path: Path) -> None:
    results = perfect_results(tiny_reader, VAL_SPLIT)
    results[next(iter(results))] = []
    result = evaluate_detection(tiny_reader, VAL_SPLIT, results, tmp_path)
    # Recall ends at 3/4: of the 90 points above a recall of 0.1, those up to 0.75 have precision 1.
    assert result.classes["bus"].ap == pytest.approx(65 / 90, abs=0.02)
    assert 0 < result.overall.NDS < 1


def test_wrong_class_scores_only_where_right(tiny_reader: NuScenesReader, tmp_path: Path) -> None:
    results = {
        token: [box for box in boxes if box["detection_name"] == "bus"]
        for token, boxes in perfect_results(tiny_reader, VAL_SPLIT).items()
    }
    result = evaluate_detection(tiny_reader, VAL_SPLIT, results, tmp_path)
    assert result.overall.mAP == pytest.approx(0.1)
    assert result.classes["bus"].ap == pytest.approx(1.0)
    assert result.classes["car"].ap == 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"num_lidar_pts": 0},  # the devkit leaves boxes out that nothing was measured on
        {"translation": [9e3, 9e3, 0.0]},  # and those out of its range
        {"category_name": "static_object.bicycle_rack"},
    ],
)
def test_split_without_ground_truth_is_refused(
    tiny_nuscenes: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    reader = NuScenesReader(DataConfig(root=str(tiny_nuscenes), version=VERSION))
    results = perfect_results(reader, VAL_SPLIT)
    for record in reader.nusc.sample_annotation:
        record.update(change)
    with pytest.raises(
        DataError, match=r"no annotation that the evaluation counts .*\npredict instead: .*predict"
    ):
        evaluate_detection(reader, VAL_SPLIT, results, tmp_path)
    for token in results:
        reader.nusc.get("sample", token)["anns"] = []
    with pytest.raises(DataError, match="in its 4 samples"):
        evaluate_detection(reader, VAL_SPLIT, results, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ground_truth_that_lies_in_racks_is_none(tiny_nuscenes: Path, tmp_path: Path) -> None:
    reader = NuScenesReader(DataConfig(root=str(tiny_nuscenes), version=VERSION))
    results = perfect_results(reader, VAL_SPLIT)
    for token in results:
        sample = reader.nusc.get("sample", token)
        records = [reader.nusc.get("sample_annotation", annotation) for annotation in sample["anns"]]
        bicycle, rack = (
            next(r for r in records if r["category_name"] == name)
            for name in ("vehicle.bicycle", "static_object.bicycle_rack")
        )
        rack.update(translation=bicycle["translation"], size=[9.0, 9.0, 9.0])
        sample["anns"] = [bicycle["token"], rack["token"]]
    with pytest.raises(DataError, match="bicycle racks"):
        evaluate_detection(reader, VAL_SPLIT, results, tmp_path)


def test_a_sample_without_a_reference_pose_takes_no_part(tiny_nuscenes: Path, tmp_path: Path) -> None:
    reader = NuScenesReader(DataConfig(root=str(tiny_nuscenes), version=VERSION))
    results = perfect_results(reader, VAL_SPLIT)
    first = next(iter(results))
    del reader.nusc.get("sample", first)["data"]["LIDAR_TOP"]
    result = evaluate_detection(reader, VAL_SPLIT, results | {first: []}, tmp_path)
    assert result.overall.mAP == pytest.approx(1.0)
    assert result.classes["car"].ground_truth == 6, "two cars in three of the four key frames"
    assert len(reader.nusc.sample) == 12, "the tables stay whole"
    assert len(read_submission(tmp_path / RESULTS_FILE)) == 4


def test_missing_sample_is_named(tiny_reader: NuScenesReader, tmp_path: Path) -> None:
    results = perfect_results(tiny_reader, VAL_SPLIT)
    first = next(iter(results))
    del results[first]
    with pytest.raises(DataError, match=f"1 of the 4 samples .* {first}"):
        evaluate_detection(tiny_reader, VAL_SPLIT, results, tmp_path)


def test_split_of_another_version_is_refused(tiny_reader: NuScenesReader, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'val' .*trainval"):
        evaluate_detection(tiny_reader, "val", {}, tmp_path)
    with pytest.raises(ConfigError, match="unknown split 'evening'"):
        evaluate_detection(tiny_reader, "evening", {}, tmp_path)


def test_submission_matches_the_annotations(tiny_nuscenes: Path, tiny_reader: NuScenesReader) -> None:
    nusc = NuScenes(VERSION, str(tiny_nuscenes), verbose=False)
    token = tiny_reader.scenes(VAL_SPLIT)[0].sample_tokens[1]
    sample = tiny_reader.sample(token)
    annotations = tiny_reader.annotations(sample)
    entries = submission_boxes(scored(annotations.boxes), sample.bev_to_global, token)
    assert len(entries) == 11
    for entry, annotation in zip(entries, annotations.tokens, strict=True):
        record = nusc.get("sample_annotation", annotation)
        np.testing.assert_allclose(entry["translation"], record["translation"], atol=1e-4)
        np.testing.assert_allclose(entry["size"], record["size"], rtol=1e-6)
        turned = Quaternion(entry["rotation"]).inverse * Quaternion(record["rotation"])
        assert turned.degrees == pytest.approx(0.0, abs=0.02)
        np.testing.assert_allclose(entry["velocity"], nusc.box_velocity(annotation)[:2], atol=1e-3)
        assert isinstance(entry["detection_score"], float)


def random_boxes(count: int) -> Boxes3D:
    generator = torch.Generator().manual_seed(3)
    values = torch.rand((count, 9), generator=generator) + 0.5
    return Boxes3D(
        values, torch.randint(10, (count,), generator=generator), torch.rand(count, generator=generator)
    )


def test_at_most_500_boxes_and_the_best() -> None:
    boxes = random_boxes(MAX_BOXES + 40)
    assert boxes.scores is not None
    entries = submission_boxes(boxes, torch.eye(4, dtype=torch.float64), "token")
    assert len(entries) == MAX_BOXES
    scores = [entry["detection_score"] for entry in entries]
    assert scores == sorted(boxes.scores.tolist(), reverse=True)[:MAX_BOXES]


def test_unknown_velocity_becomes_zero_and_damage_is_refused() -> None:
    boxes = random_boxes(2)
    boxes.values[0, 7:9] = torch.nan
    entries = submission_boxes(boxes, torch.eye(4, dtype=torch.float64), "token")
    assert [0.0, 0.0] in [entry["velocity"] for entry in entries]
    for column in (0, 4, 6):
        bad = random_boxes(2)
        bad.values[1, column] = torch.nan
        with pytest.raises(DataError, match="sample token"):
            submission_boxes(bad, torch.eye(4, dtype=torch.float64), "token")
    with pytest.raises(ValueError, match="scored"):
        submission_boxes(Boxes3D(boxes.values, boxes.labels), torch.eye(4, dtype=torch.float64), "token")


@pytest.mark.parametrize(
    ("name", "speed", "attribute"),
    [
        ("car", 3.0, "vehicle.moving"),
        ("car", 0.2, "vehicle.parked"),
        ("bus", 0.0, "vehicle.stopped"),
        ("pedestrian", 1.0, "pedestrian.moving"),
        ("pedestrian", 0.1, "pedestrian.standing"),
        ("bicycle", 0.0, "cycle.without_rider"),
        ("barrier", 9.0, ""),
    ],
)
def test_attributes(name: str, speed: float, attribute: str) -> None:
    assert attribute_of(name, speed) == attribute


@pytest.mark.parametrize("content", ["{", "[]", '{"meta": {}}'])
def test_damaged_submission_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError, match="submission"):
        read_submission(path)
    with pytest.raises(DataError, match="cannot read"):
        read_submission(tmp_path / "absent.json")


def test_perfect_boxes_on_the_real_keyframe(real_keyframe: Path, tmp_path: Path) -> None:
    reader = NuScenesReader(DataConfig(root=str(real_keyframe), version="v1.0-mini"))
    result = evaluate_detection(reader, "mini_train", perfect_results(reader, "mini_train"), tmp_path)
    assert result.present.mAP == pytest.approx(1.0)
    assert result.present.mATE < 1e-3
    assert result.present.mAOE < 1e-3
    absent = [name for name, c in result.classes.items() if c.ground_truth == 0]
    assert absent
    assert result.overall.mAP == pytest.approx(1 - len(absent) / 10)
