"""Configuration files, overrides and the messages that mistakes in them get."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from bevperception.config import ExperimentConfig
from bevperception.config_help import INFERENCE_SETTINGS, TRAINING_SETTINGS
from bevperception.config_io import (
    ConfigParser,
    config_from_dict,
    config_to_dict,
    dump_config,
    load_config,
)
from bevperception.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_base_files_merge_depth_first_and_own_values_win(tmp_path: Path) -> None:
    write(tmp_path, "root.yaml", "training: {steps: 1, seed: 1, batch_size: 1}\nmodel: {bev: {rows: 10}}\n")
    write(tmp_path, "parts/other.yaml", "training: {batch_size: 4}\n")
    write(tmp_path, "middle.yaml", "base: root.yaml\ntraining: {seed: 2}\nmodel: {bev: {columns: 20}}\n")
    path = write(tmp_path, "top.yaml", "base: [middle.yaml, parts/other.yaml]\ntraining: {steps: 3}\n")
    config = load_config(path)
    assert (config.training.steps, config.training.seed, config.training.batch_size) == (3, 2, 4)
    assert (config.model.bev.rows, config.model.bev.columns) == (10, 20)
    assert config.data == ExperimentConfig().data


def test_values_take_the_types_of_their_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.yaml",
        "data: {image_size: [64, 96], cameras: [CAM_FRONT]}\n"
        "training: {learning_rate: 2e-4}\naugmentation:\n",
    )
    config = load_config(path, {"training.steps": 7, "model.bev.x_range_m": [-10, 10]})
    assert config.data.image_size == (64, 96)
    assert config.data.cameras == ("CAM_FRONT",)
    assert config.training.learning_rate == pytest.approx(2e-4)
    assert config.training.steps == 7
    assert config.model.bev.x_range_m == (-10.0, 10.0)


def test_one_configuration_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    """They share a parser."""
    plain = load_config(None)
    wrong = write(tmp_path, "wrong.yaml", "training: {steps: many, seed: 5}\n")
    for _ in range(2):
        changed = load_config(None, {"training.seed": 3, "data.cameras": ["CAM_FRONT"], "model.bev.rows": 9})
        assert (changed.training.seed, changed.data.cameras) == (3, ("CAM_FRONT",))
        with pytest.raises(ConfigError, match=r"wrong\.yaml: training\.steps: expected int"):
            load_config(wrong)
        with pytest.raises(ConfigError, match=r"^overrides: training\.seed: expected int"):
            load_config(None, {"training.seed": "x"})
        assert load_config(None) == plain == ExperimentConfig()


def test_threads_get_messages_of_their_own(tmp_path: Path) -> None:
    paths = [write(tmp_path, f"{k}.yaml", f"training: {{steps: x{k}}}\n") for k in range(20)]

    def told(path: Path) -> str:
        with pytest.raises(ConfigError) as refused:
            load_config(path)
        return str(refused.value)

    with ThreadPoolExecutor(4) as pool:
        for path, message in zip(paths, pool.map(told, paths), strict=True):
            assert message.startswith(f"{path}: training.steps: expected int")
            assert f"x{path.stem}" in message


def test_dumped_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config(None, {"training.steps": 3, "data.image_size": [32, 64], "model.bev.heads": 8})
    dump_config(config, tmp_path / "run" / "config.yaml")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert config_from_dict(config_to_dict(config), "here") == config
    assert asdict(load_config(None)) == asdict(ExperimentConfig())


def test_a_list_of_a_base_is_replaced_not_extended(tmp_path: Path) -> None:
    write(tmp_path, "root.yaml", "data: {cameras: [CAM_FRONT, CAM_BACK]}\n")
    path = write(tmp_path, "top.yaml", "base: root.yaml\ndata: {cameras: [CAM_BACK_LEFT]}\n")
    assert load_config(path).data.cameras == ("CAM_BACK_LEFT",)


MISTAKES = {
    "training: {stepz: 3}": r"a\.yaml: unknown key training\.stepz\. Did you mean training\.steps\?",
    "steps: 3": r"a\.yaml: unknown key steps\. Did you mean training\.steps\?",
    "training: {steps: many}": r"a\.yaml: training\.steps: expected int, got many",
    "data: {image_size: [3]}": r"a\.yaml: data\.image_size: expected tuple with 2 elements",
    "training: {precision: 64}": r"training\.precision: expected .*bf16-mixed.*got 64",
    "training: 5": r"a\.yaml: training is a section",
    "- 5": r"must hold sections",
    "training: [": r"a\.yaml is not valid YAML: line",
    "training: {seed: 1, seed: 2}": r"'seed' is given twice",
    "base: missing.yaml": r"cannot read the config file .*missing\.yaml \(a base of a\.yaml\)",
    "base: a.yaml": r"lead back to themselves: a\.yaml -> a\.yaml",
    "base: 5": r"base must be a file name",
    "model: {bev: {heads: 7}}": r"a\.yaml: bev\.channels .* must be a multiple of bev\.heads",
    "model: {bev: {temporal_heads: 0}}": r"a\.yaml: model\.bev\.temporal_heads must be 1 to 1024, got 0",
    "model: {segmentation: {classes: [sea]}}": r"unknown \['sea'\]",
    "training: {steps: 0}": r"a\.yaml: training\.steps must be 1 to",
    "training: {ema_decay: 1.0}": r"training\.ema_decay must be at least 0 and below 1, got 1.0",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_a_file_is_named(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", text)
    with pytest.raises(ConfigError, match=MISTAKES[text]) as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_mistake_is_blamed_on_the_file_that_holds_it(tmp_path: Path) -> None:
    write(tmp_path, "root.yaml", "training: {seed: x}\n")
    path = write(tmp_path, "top.yaml", "base: root.yaml\ntraining: {steps: 3}\n")
    with pytest.raises(ConfigError, match=r"root\.yaml: training\.seed: expected int"):
        load_config(path)


def test_a_cycle_over_two_files_is_found(tmp_path: Path) -> None:
    write(tmp_path, "one.yaml", "base: two.yaml\n")
    path = write(tmp_path, "two.yaml", "base: one.yaml\n")
    with pytest.raises(ConfigError, match=r"two\.yaml -> one\.yaml -> two\.yaml"):
        load_config(path)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "training: {steps: 3, seed: 4}\n")
    parser = ConfigParser("Train.", "tools/train.py")
    parser.add_argument("--out", type=str)
    argv = ["--config", str(path), "--training.steps=9", "--out", "run", "--data.image_size", "[3,4]"]
    config, options = parser.parse_experiment(argv)
    assert (config.training.steps, config.training.seed) == (9, 4)
    assert config.data.image_size == (3, 4)
    assert options.out == "run"


def test_an_override_may_settle_a_contradiction_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "model: {bev: {channels: 12, heads: 5}}\n")
    argv = ["--config", str(path), "--model.bev.heads", "3"]
    config, _ = ConfigParser("Train.", "tools/train.py").parse_experiment(argv)
    assert config.model.bev.heads == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.stepz", "3"], r"unknown option --training\.stepz\. Did you mean --training\.steps\?"),
        (["--training.st", "3"], r"unknown option --training\.st"),
        (["--training.steps", "x"], r"training\.steps: expected int, got x"),
        (["--training.steps"], r"expected one argument"),
        (["--data.image_size", "3"], r"Write lists as '\[a,b\]'"),
        (["stray"], r"cannot read the config file stray"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "training: {steps: 3}\n")
    with pytest.raises(ConfigError, match=message):
        ConfigParser("Train.", "tools/train.py").parse_experiment(["--config", str(path), *arguments])


def test_help_documents_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        ConfigParser("Train.", "bevperception train").parse_experiment(["--help"])
    assert left.value.code == 0
    short = capsys.readouterr().out
    assert "--training.steps" in short
    assert "--training.ema_decay" not in short
    assert "--model" not in short
    assert short.count("\n") < 60
    text = " ".join(short.split())
    for key in TRAINING_SETTINGS:
        assert f"--{key} " in text
    assert "--training.steps STEPS optimiser steps [1 to 1000000000] (default: 1000)" in text
    assert "--help-all shows all" in text
    assert "null" not in text
    with pytest.raises(SystemExit) as left:
        ConfigParser("Train.", "bevperception train").parse_experiment(["--help-all"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--training.ema_decay" in text
    assert "decay of the averaged weights that are evaluated and saved" in text
    assert text.count("(type:") >= 80


@pytest.mark.parametrize("settings", [TRAINING_SETTINGS, INFERENCE_SETTINGS])
def test_help_shows_at_most_ten_settings_and_the_defaults_of_the_file(
    settings: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(set(settings)) == len(settings) <= 10
    path = write(tmp_path, "a.yaml", "data: {root: /data/mine}\n")
    with pytest.raises(SystemExit):
        ConfigParser("Run.", "run", settings=settings).parse_experiment(["--config", str(path), "--help"])
    assert "(default: /data/mine)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("program", "text"), [("train", "training: {stepz: 3}"), ("train", None), ("evaluate", "training: [")]
)
def test_programs_leave_with_code_2_and_a_short_message(
    program: str, text: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.yaml"
    if text is not None:
        path.write_text(text)
    finished = subprocess.run(
        [sys.executable, REPOSITORY / "tools" / f"{program}.py", "--config", path, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert finished.returncode == 2, finished.stderr
    assert 1 <= len(finished.stderr.strip().splitlines()) <= 3, finished.stderr
    assert "a.yaml" in finished.stderr
    assert "Traceback" not in finished.stderr
