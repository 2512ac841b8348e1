"""Pictures of samples of a data set, and tools/visualize.py on top of them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from bevperception.checkpoints.weights import Card, save_weights
from bevperception.cli.visualize import main
from bevperception.config import DataConfig
from bevperception.config_io import config_to_dict, load_config
from bevperception.config_model import SegmentationConfig
from bevperception.data.nuscenes import NuScenesReader
from bevperception.errors import BevError, ConfigError, DataError
from bevperception.evaluation.submission import submission_boxes, write_submission
from bevperception.models.bevformer import BEVFormer
from bevperception.structures import Boxes3D
from bevperception.visualization.compose import Opinion, PictureStyle
from bevperception.visualization.samples import SamplePainter, boxes_of_submission
from tests.angles import wrap_angle

STYLE = PictureStyle(width=480, bev_height=200)
SPLIT = "tiny_train"


@pytest.fixture(scope="module")
def reader(tiny_nuscenes: Path) -> NuScenesReader:
    return NuScenesReader(DataConfig(root=str(tiny_nuscenes), version="v1.0-tiny"))


def data_options(root: Path, *more: str) -> list[str]:
    return [
        "--data.root",
        str(root),
        "--data.version",
        "v1.0-tiny",
        "--split",
        SPLIT,
        "--width",
        "480",
        *more,
    ]


@pytest.fixture
def weights(tiny_nuscenes: Path, tmp_path: Path) -> Path:
    config = load_config(
        None,
        {
            "data.root": str(tiny_nuscenes),
            "data.version": "v1.0-tiny",
            "data.image_size": [64, 96],
            "data.workers": 0,
            "model.bev.rows": 10,
            "model.bev.columns": 10,
            "model.bev.channels": 32,
            "model.detection.queries": 12,
        },
    )
    torch.manual_seed(0)
    model = BEVFormer(config.model)
    return save_weights(tmp_path / "run", model.state_dict(), Card(config_to_dict(config)))


def test_truth_has_the_layers_that_have_labels(reader: NuScenesReader) -> None:
    painter = SamplePainter(reader, SegmentationConfig(), STYLE)
    with_map, without_map = (
        painter.truth(reader.sample(scene.sample_tokens[0])).segmentation for scene in reader.scenes(SPLIT)
    )
    assert with_map is not None
    assert with_map.classes == SegmentationConfig().classes
    assert without_map is not None
    assert without_map.classes == ("vehicle",)
    assert len(without_map.probabilities) == 1
    assert (
        SamplePainter(reader, None).truth(reader.sample(reader.nusc.sample[0]["token"])).segmentation is None
    )


@pytest.mark.parametrize("bev_frame", ["ego", "lidar"])
def test_boxes_of_a_submission_are_those_that_were_submitted(tiny_nuscenes: Path, bev_frame: str) -> None:
    config = DataConfig(root=str(tiny_nuscenes), version="v1.0-tiny", bev_frame=bev_frame)  # type: ignore[arg-type]
    reader = NuScenesReader(config)
    sample = reader.sample(reader.nusc.sample[1]["token"])
    truth = reader.annotations(sample).boxes
    scored = Boxes3D(truth.values, truth.labels, torch.linspace(0.9, 0.1, len(truth)))
    entries = submission_boxes(scored, sample.bev_to_global, sample.token)
    back = boxes_of_submission(entries, sample.bev_to_global, "file")
    assert back.labels.tolist() == truth.labels.tolist()
    assert back.scores is not None
    torch.testing.assert_close(back.scores, scored.scores)
    # The submission keeps the yaw alone; the tiny ego is tilted by 0.01 rad, which is lost on the way.
    torch.testing.assert_close(back.values[:, :6].float(), truth.values[:, :6], atol=1e-3, rtol=0)
    turned = wrap_angle(back.values[:, 6].float() - truth.values[:, 6])
    torch.testing.assert_close(turned, torch.zeros_like(turned), atol=1e-3, rtol=0)
    known = truth.values[:, 7:].isfinite()
    torch.testing.assert_close(
        back.values[:, 7:].float()[known], truth.values[:, 7:][known], atol=0.01, rtol=0
    )


@pytest.mark.parametrize(
    "damage",
    [
        {"size": [1, 2]},
        {"detection_name": "horse"},
        {"rotation": [1, 0, 0]},
        {"velocity": None},
        {"translation": "x"},
        {"translation": [math.nan, 2, 3]},
        {"translation": [10**400, 2, 3]},
        {"translation": [1e300, 2, 3]},
        {"translation": [True, 2, 3]},
        {"translation": ["1", 2, 3]},
        {"size": [1, 0, 3]},
        {"size": [1, -2, 3]},
        {"size": [1, math.inf, 3]},
        {"rotation": [0, 0, 0, 0]},
        {"rotation": [math.nan, 0, 0, 0]},
        {"rotation": [1e-200, 0, 0, 0]},
        {"velocity": [0, math.inf]},
        {"detection_score": math.nan},
        {"detection_name": ["car"]},
    ],
)
def test_damaged_submission_entries_are_refused(damage: dict[str, object]) -> None:
    entry = {
        "translation": [1, 2, 3],
        "size": [1, 2, 3],
        "rotation": [1, 0, 0, 0],
        "velocity": [0, 0],
        "detection_name": "car",
        "detection_score": 0.5,
    }
    assert len(boxes_of_submission([entry], torch.eye(4, dtype=torch.float64), "file.json")) == 1
    with pytest.raises(DataError, match=r"file\.json"):
        boxes_of_submission([entry | damage], torch.eye(4, dtype=torch.float64), "file.json")
    for entries in (None, {}, "x", [None], [1]):
        with pytest.raises(DataError, match=r"file\.json: .* must be a(n object| list), got a "):
            boxes_of_submission(entries, torch.eye(4, dtype=torch.float64), "file.json")  # type: ignore[arg-type]
    unknown = entry | {"velocity": [math.nan, math.nan]}
    assert len(boxes_of_submission([unknown], torch.eye(4, dtype=torch.float64), "file.json")) == 1


def test_picture_shows_the_images_and_the_truth_of_its_sample(reader: NuScenesReader) -> None:
    painter = SamplePainter(reader, SegmentationConfig(), STYLE)
    tokens = reader.scenes(SPLIT)[0].sample_tokens
    first, last = painter.paint(tokens[0]), painter.paint(tokens[-1])
    assert first.shape == last.shape
    cameras = slice(60, 200)
    assert (first[cameras] != last[cameras]).any()
    beside = painter.paint(tokens[0], Opinion())
    assert beside.shape == first.shape
    assert (beside != first).any()


def test_lidar_frame_gives_the_same_picture(tiny_nuscenes: Path, reader: NuScenesReader) -> None:
    config = DataConfig(root=str(tiny_nuscenes), version="v1.0-tiny", bev_frame="lidar")
    in_lidar = SamplePainter(NuScenesReader(config), None, STYLE)
    token = reader.nusc.sample[0]["token"]
    difference = in_lidar.paint(token).astype(int) - SamplePainter(reader, None, STYLE).paint(token)
    assert (np.abs(difference).max(axis=-1) > 60).mean() < 0.002


def test_tool_writes_one_sample(tiny_nuscenes: Path, reader: NuScenesReader, tmp_path: Path) -> None:
    token = reader.scenes(SPLIT)[0].sample_tokens[1]
    by_index, by_token = tmp_path / "index.png", tmp_path / "token.png"
    assert main(data_options(tiny_nuscenes, "--sample", "1", "--out", str(by_index))) == 0
    assert main(data_options(tiny_nuscenes, "--sample", token, "--out", str(by_token))) == 0
    assert by_index.read_bytes() == by_token.read_bytes()
    assert cv2.imread(str(by_index)).shape[1] == 480


def test_tool_draws_a_submission_beside_the_truth(
    tiny_nuscenes: Path, reader: NuScenesReader, tmp_path: Path
) -> None:
    results = {}
    for token in reader.scenes(SPLIT)[0].sample_tokens:
        sample = reader.sample(token)
        truth = reader.annotations(sample).boxes
        scored = Boxes3D(truth.values, truth.labels, torch.full((len(truth),), 0.8))
        results[token] = submission_boxes(scored, sample.bev_to_global, token)
    write_submission(tmp_path / "results.json", results)
    out = tmp_path / "scene.mp4"
    predictions = ["--predictions", str(tmp_path / "results.json")]
    main(data_options(tiny_nuscenes, "--scene", "scene-9001", "--out", str(out), *predictions))
    reader_of_video = cv2.VideoCapture(str(out))
    assert int(reader_of_video.get(cv2.CAP_PROP_FRAME_COUNT)) == 4
    with pytest.raises(DataError, match="another split"):
        main(data_options(tiny_nuscenes, "--sample", "7", "--out", str(tmp_path / "x.png"), *predictions))
    assert not (tmp_path / "x.png").exists()


def test_tool_runs_a_model(tiny_nuscenes: Path, weights: Path, tmp_path: Path) -> None:
    common = ["--split", SPLIT, "--width", "480", "--weights", str(weights), "--score", "0"]
    picture = tmp_path / "sample.png"
    main([*common, "--sample", "2", "--out", str(picture)])
    assert picture.is_file()
    truth = tmp_path / "truth.png"
    main(data_options(tiny_nuscenes, "--sample", "2", "--out", str(truth)))
    assert picture.read_bytes() != truth.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either --sample"),
        (["--sample", "0", "--scene", "scene-9001"], "either --sample"),
        (["--sample", "99"], "from 0 to 7"),
        (["--sample", "0", "--split", "nowhere"], "unknown split"),
        (["--sample", "no-such-token"], "no scene or sample 'no-such-token'"),
        (["--scene", "scene-7777"], "scene-9001, scene-9002"),
        (["--sample", "0", "--out", "x.mp4"], "is written as .png"),
        (["--scene", "scene-9001", "--out", "x.png"], "is written as .mp4"),
        (["--sample", "0", "--predictions", "a", "--weights", "b"], "no weights at b"),
        (["--sample", "0", "--predictions", "missing.json"], "missing.json"),
        (["--sample", "0", "--samples", "1"], "unknown option --samples"),
        (["--sample", "\u00b2"], "no scene or sample"),
        (["--sample", "0", "--width", "0"], "--width must be 200 to 10000, got 0"),
        (["--sample", "0", "--width", "1e9"], "--width must be a whole number"),
        (["--sample", "0", "--range", "0"], "--range must be 1 to 1000, got 0"),
        (["--sample", "0", "--range", "1e9"], "--range must be 1 to 1000, got 1000000000.0"),
        (["--sample", "0", "--range", "nan"], "--range must be 1 to 1000, got nan"),
        (["--sample", "0", "--score", "nan"], "--score must be 0 to 1, got nan"),
        (["--scene", "scene-9001", "--fps", "0"], "--fps must be 0.1 to 240, got 0"),
    ],
)
def test_tool_refuses_mistakes(
    tiny_nuscenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BevError) as caught:
        main(data_options(tiny_nuscenes, *options))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert list(tmp_path.rglob("*.png")) + list(tmp_path.rglob("*.mp4")) == []


def test_tool_refuses_more_boxes_than_a_picture_holds(
    tiny_nuscenes: Path, reader: NuScenesReader, tmp_path: Path
) -> None:
    sample = reader.sample(reader.scenes(SPLIT)[0].sample_tokens[0])
    truth = reader.annotations(sample).boxes
    scored = Boxes3D(truth.values[:1], truth.labels[:1], torch.tensor([0.8]))
    (entry,) = submission_boxes(scored, sample.bev_to_global, sample.token)
    low = entry | {"detection_score": 0.4}
    results = {sample.token: [low] * 2000 + [entry]}
    write_submission(tmp_path / "results.json", results)
    options = ["--sample", "0", "--predictions", str(tmp_path / "results.json"), "--out"]
    with pytest.raises(DataError, match="2001 boxes in one picture; at most 2000 are drawn; raise"):
        main(data_options(tiny_nuscenes, *options, str(tmp_path / "x.png")))
    assert not (tmp_path / "x.png").exists()
    assert main(data_options(tiny_nuscenes, *options, str(tmp_path / "y.png"), "--score", "0.5")) == 0


def test_tool_refuses_predictions_beside_weights(weights: Path) -> None:
    with pytest.raises(ConfigError, match="not both"):
        main(["--split", SPLIT, "--sample", "0", "--weights", str(weights), "--predictions", "x.json"])


def test_missing_image_stops_with_its_sample(tiny_nuscenes: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_nuscenes, root)
    records = json.loads((root / "v1.0-tiny" / "sample_data.json").read_text())
    front = next(r for r in records if "CAM_FRONT/" in r["filename"])
    (root / front["filename"]).unlink()
    with pytest.raises(DataError, match=r"CAM_FRONT.*cannot read image"):
        main(data_options(root, "--sample", "0", "--out", str(tmp_path / "x.png")))
