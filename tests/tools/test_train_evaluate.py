"""The programs on a tiny data set: train, stop, resume, evaluate, predict; and what bad input gets."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bevperception.checkpoints.weights import read_weights
from tests.fixtures.damage import DamagedRoot
from tests.fixtures.tiny_nuscenes import IMAGE_SIZE, KEY_FRAMES, TRAIN_SPLIT, VAL_SPLIT, VERSION
from tests.tools import several

REPOSITORY = Path(__file__).parents[2]
WIDTH, HEIGHT = IMAGE_SIZE


@dataclass
class Finished:
    """What a program left: its exit code and what it printed."""

    code: int
    stdout: str
    stderr: str


def run(program: str, *arguments: object) -> Finished:
    """Run a program in this process, which saves the imports."""
    argv, out, err = sys.argv, io.StringIO(), io.StringIO()
    path = str(REPOSITORY / "tools" / f"{program}.py")
    sys.argv = [path, *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as left:
            runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv = argv
    return Finished(int(left.value.code or 0), out.getvalue(), err.getvalue())


def run_several(*programs: tuple[object, ...]) -> list[str]:
    """Run programs in a process of its own, or as many as the first one starts; what each of them prints."""
    plan = json.dumps([[str(part) for part in program] for program in programs])
    finished = subprocess.run(
        [sys.executable, "-m", several.__name__],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", several.PLAN: plan},
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    nothing, *printed = re.split(rf"^{several.START}\w+\n", finished.stdout, flags=re.MULTILINE)
    assert (nothing, len(printed)) == ("", len(programs))
    return printed


def succeed(program: str, *arguments: object) -> str:
    finished = run(program, *arguments)
    assert finished.code == 0, finished.stdout + finished.stderr
    return finished.stdout


def fail(program: str, *arguments: object) -> str:
    finished = run(program, *arguments)
    assert finished.code == 2, finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr
    assert 1 <= len(finished.stderr.strip().splitlines()) <= 3, finished.stderr
    return finished.stderr


@pytest.fixture(scope="module")
def config(tiny_nuscenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values: dict[str, Any] = {
        "data": {
            "root": str(tiny_nuscenes),
            "version": VERSION,
            "train_split": TRAIN_SPLIT,
            "val_split": VAL_SPLIT,
            "image_size": [64, 96],
            "history": 2,
            "workers": 1,
        },
        "model": {
            "bev": {"channels": 16, "rows": 8, "columns": 8, "layers": 1, "feedforward_channels": 32},
            "detection": {"queries": 12, "layers": 2, "max_boxes": 12},
            "segmentation": {"cell_m": 5.0, "channels": 8, "blocks": 1},
        },
        "augmentation": {"image_flip": 0.5, "bev_rotation_deg": 10.0, "colour": 0.1},
        "training": {
            "steps": 3,
            "batch_size": 2,
            "warmup_steps": 1,
            "ema_decay": 0.9,
            "accelerator": "cpu",
            "checkpoint_every": 2,
            "log_every": 1,
            "tensorboard": False,
        },
    }
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    text = succeed("train", "--config", config, "--out", out)
    assert "step 3/3" in text
    assert "NDS:" in text
    assert "drivable_area" in text
    return out


def test_a_run_leaves_what_it_should(trained: Path) -> None:
    names = {p.relative_to(trained).as_posix() for p in trained.rglob("*") if p.is_file()}
    evaluation = "evaluation/step-00000003"
    assert names == {
        "config.yaml",
        "weights.safetensors",
        "card.json",
        "checkpoints/step-00000002.ckpt",
        "checkpoints/step-00000003.ckpt",
        "logs/version_0/metrics.csv",
        f"{evaluation}/results_nusc.json",
        f"{evaluation}/metrics.json",
        f"{evaluation}/metrics_summary.json",
    }
    results = json.loads((trained / evaluation / "results_nusc.json").read_text())["results"]
    assert len(results) == KEY_FRAMES
    card = json.loads((trained / "card.json").read_text())
    assert card["metrics"] == json.loads((trained / evaluation / "metrics.json").read_text())


def test_a_resumed_run_ends_with_the_same_weights(trained: Path, config: Path, tmp_path: Path) -> None:
    middle = trained / "checkpoints" / "step-00000002.ckpt"
    text = succeed("train", "--config", config, "--out", tmp_path, "--resume", middle)
    first, second, third = text.splitlines()[:3]
    assert first.startswith("training ")
    assert first.endswith(f"results go to {tmp_path}")
    assert second.startswith(f"resuming {middle} at step 2 of ")
    assert third.endswith("1 process; the first step takes longest")
    whole, rest = (read_weights(out).state for out in (trained, tmp_path))
    for name, value in whole.items():
        np.testing.assert_allclose(rest[name].numpy(), value.numpy(), atol=1e-6, err_msg=name)


def losses(out: Path) -> list[float]:
    with (out / "logs" / "version_0" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@dataclass
class Shared:
    """What two processes together made: the folders of an evaluation and of a run, and what was printed."""

    evaluation: Path
    told: str
    run: Path


@pytest.fixture(scope="module")
def shared(trained: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Two processes evaluate, then train with the same global batch of two: the real model and losses."""
    out = tmp_path_factory.mktemp("shared")
    devices = ("--training.devices", 2)
    evaluation = ("evaluate", *on_train_split(trained), "--out", out / "evaluation", *devices)
    training = ("train", "--config", config, "--out", out / "run", *devices, "--training.batch_size", 1)
    told, _ = run_several(evaluation, training)
    return Shared(out / "evaluation", told, out / "run")


def on_train_split(trained: Path) -> tuple[object, ...]:
    """Arguments for the evaluation of two scenes."""
    return ("--weights", trained, "--split", TRAIN_SPLIT, "--data.workers", 0)


def test_two_processes_train_as_one_does(trained: Path, shared: Shared) -> None:
    assert losses(shared.run) == pytest.approx(losses(trained), rel=1e-5)
    assert len(losses(shared.run)) == 3
    one, two = (read_weights(out).state for out in (trained, shared.run))
    for name, value in one.items():
        np.testing.assert_allclose(two[name].numpy(), value.numpy(), atol=1e-4, err_msg=name)


def test_evaluating_the_weights_gives_the_metrics_of_the_run(trained: Path, tmp_path: Path) -> None:
    text = succeed("evaluate", "--weights", trained, "--out", tmp_path)
    assert "NDS:" in text
    of_run = json.loads((trained / "card.json").read_text())["metrics"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == of_run


def test_two_processes_evaluate_as_one_does(trained: Path, shared: Shared, tmp_path: Path) -> None:
    assert succeed("evaluate", *on_train_split(trained), "--out", tmp_path) == shared.told
    for name in ("metrics.json", "results_nusc.json"):
        one, two = (json.loads((out / name).read_text()) for out in (tmp_path, shared.evaluation))
        assert one == two
    assert len(two["results"]) == 2 * KEY_FRAMES


def test_predicting_a_scene_and_one_of_its_samples(trained: Path, tmp_path: Path) -> None:
    everything = json.loads((trained / "evaluation/step-00000003/results_nusc.json").read_text())["results"]
    arguments = ("--weights", trained, "--segmentation", "true")
    succeed("predict", *arguments, "--scene", "scene-9003", "--out", tmp_path / "scene")
    scene = json.loads((tmp_path / "scene" / "results_nusc.json").read_text())["results"]
    assert scene == everything
    third = list(everything)[2]
    succeed("predict", *arguments, "--sample", third, "--out", tmp_path / "sample")
    sample = json.loads((tmp_path / "sample" / "results_nusc.json").read_text())["results"]
    assert sample == {third: everything[third]}  # the scene before it filled the memory
    maps = np.load(tmp_path / "sample" / "segmentation" / f"{third}.npz")
    assert maps["probabilities"].shape == (7, 20, 20)
    assert 0.0 <= maps["probabilities"].min() <= maps["probabilities"].max() <= 1.0
    assert list(maps["classes"])[-1] == "vehicle"


def test_another_architecture_is_refused(trained: Path, config: Path, tmp_path: Path) -> None:
    message = fail("evaluate", "--weights", trained, "--model.bev.rows", 9, "--out", tmp_path)
    assert "is of another architecture" in message
    assert "model.bev.rows is 9 here, 8 there" in message


def test_resuming_with_another_configuration_is_refused(trained: Path, config: Path, tmp_path: Path) -> None:
    middle = trained / "checkpoints" / "step-00000002.ckpt"
    message = fail(
        "train", "--config", config, "--out", tmp_path, "--resume", middle, "--training.learning_rate", 1
    )
    assert "training.learning_rate (0.0004 there, 1.0 now)" in message


def test_bad_arguments(trained: Path, config: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "o")
    assert "--out is needed" in fail("train", "--config", config)
    assert "data root" in fail("train", "--config", config, *out, "--data.root", tmp_path / "none")
    assert "unknown split 'sunday'" in fail("evaluate", "--weights", trained, *out, "--split", "sunday")
    devices = "training.accelerator, devices or strategy"
    assert devices in fail("train", "--config", config, *out, "--training.accelerator", "abacus")
    assert devices in fail("train", "--config", config, *out, "--training.strategy", "hope")
    assert devices in fail("evaluate", "--weights", trained, *out, "--training.accelerator", "abacus")
    assert "exactly one of" in fail("predict", "--weights", trained, *out)
    assert "no scene or sample 'x'" in fail("predict", "--weights", trained, *out, "--scene", "x")
    assert "no weights at" in fail("predict", "--weights", tmp_path / "w", *out, "--scene", "x")


@pytest.fixture
def damaged(tiny_nuscenes: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the data with a truncated image in one validation sample, and that sample's token."""
    root = tmp_path / "damaged"
    shutil.copytree(tiny_nuscenes, root)
    tables = root / VERSION
    samples = json.loads((tables / "sample.json").read_text())
    scenes = {s["token"]: s["name"] for s in json.loads((tables / "scene.json").read_text())}
    token = next(s["token"] for s in samples if scenes[s["scene_token"]] == "scene-9003" and s["prev"])
    images = json.loads((tables / "sample_data.json").read_text())
    name = next(d["filename"] for d in images if d["sample_token"] == token and "CAM_FRONT/" in d["filename"])
    image = root / name
    image.write_bytes(image.read_bytes()[:200])
    return root, token


def test_a_damaged_image_stops_or_is_skipped(
    trained: Path, damaged: tuple[Path, str], tmp_path: Path
) -> None:
    root, token = damaged
    arguments = ("--weights", trained, "--out", tmp_path / "e", "--data.root", root)
    message = fail("evaluate", *arguments)
    assert f"sample {token}, CAM_FRONT" in message
    text = succeed("evaluate", *arguments, "--data.bad_samples", "skip")
    assert f"1 of {KEY_FRAMES} samples could not be read and count as empty, first {token}" in text
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert list(metrics["skipped"]) == [token]
    results = json.loads((tmp_path / "e" / "results_nusc.json").read_text())["results"]
    assert results[token] == []
    assert len(results) == KEY_FRAMES


def test_a_split_without_annotations_can_only_be_predicted(
    trained: Path, config: Path, tiny_nuscenes: Path, tmp_path: Path
) -> None:
    damaged = DamagedRoot(tiny_nuscenes, tmp_path / "bare")
    damaged.write({"sample_annotation": [], "instance": []})
    root = ("--data.root", damaged.root, "--out", tmp_path / "o")
    for split in (VAL_SPLIT, TRAIN_SPLIT):
        message = fail("evaluate", "--weights", trained, *root, "--split", split)
        assert f"split '{split}' has no annotation that the evaluation counts" in message
        assert f"bevperception predict --weights PATH --split {split} --data.root {damaged.root}" in message
    message = fail("train", "--config", config, *root)
    assert f"split '{TRAIN_SPLIT}' has no annotation of the ten detection classes" in message
    # The vehicle layer of the segmentation head comes from boxes too; without it none are needed.
    alone = ("--model.detection.enabled", "false")
    assert "has no annotation" in fail("train", "--config", config, *root, *alone)
    assert not (tmp_path / "o").exists()
    succeed("predict", "--weights", trained, *root, "--split", VAL_SPLIT)
    assert len(json.loads((tmp_path / "o" / "results_nusc.json").read_text())["results"]) == KEY_FRAMES


def test_annotations_without_enough_points_teach_nothing(config: Path, tmp_path: Path) -> None:
    message = fail("train", "--config", config, "--out", tmp_path / "o", "--data.min_points", 21)
    assert "with at least 21 points (data.min_points)" in message


def test_damaged_tables_stop_a_run_before_it_begins(
    trained: Path, config: Path, tiny_nuscenes: Path, tmp_path: Path
) -> None:
    damaged = DamagedRoot(tiny_nuscenes, tmp_path / "data")
    tables = damaged.tables()
    last = next(r for r in tables["sample_annotation"] if r["sample_token"] == "sample-0011")
    last["rotation"] = [0, 0, 0, 0]
    damaged.write(tables)
    root = ("--data.root", damaged.root, "--out", tmp_path / "o")
    message = fail("evaluate", "--weights", trained, *root)
    assert (
        f"sample sample-0011: sample_annotation.json, record '{last['token']}': rotation must be" in message
    )
    assert "1 of 4 samples cannot be used; data.bad_samples=skip" in message
    assert "1 of 4 samples" in fail("train", "--config", config, *root), "those of val_split, before any step"
    text = succeed("evaluate", "--weights", trained, *root, "--data.bad_samples", "skip")
    assert "1 of 4 samples could not be read and count as empty, first sample-0011" in text
    for row in tables["scene"]:
        row["first_sample_token"] = ""
    damaged.write(tables)
    skip = ("--data.bad_samples", "skip")
    message = fail("evaluate", "--weights", trained, *root, *skip)
    assert (
        f"none of the 4 samples of split '{VAL_SPLIT}' can be read; the first: sample sample-0008: "
        in message
    )
    message = fail("predict", "--weights", trained, *root, *skip, "--split", VAL_SPLIT)
    assert "none of the 4 chosen samples can be read" in message
