"""Plans of several training runs: order, starts, repetition, failures, and what wrong files are told."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from bevperception.cli.run_plan import main
from bevperception.config_io import load_config
from bevperception.errors import BevError, ConfigError, DataError
from bevperception.training import plan
from bevperception.training.plan import LOG_NAME, TABLE_NAME, read_plan, run_plan
from bevperception.training.record import curve, record

PLANS = Path(__file__).resolve().parents[2] / "configs" / "plans"

TRAINER = """
import json, pathlib, sys
options = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:] if "=" in a)
out = pathlib.Path(options["out"])
start = options.get("training.initial_weights")
if start and not (pathlib.Path(start) / "weights.safetensors").is_file():
    sys.exit("began too early")
if options.get("training.steps") == "13":
    sys.exit("unlucky")
if options.get("training.steps") == "0":
    sys.exit(0)
with (out.parent / "order.txt").open("a") as file:
    file.write(json.dumps([out.name, options]) + "\\n")
metrics = {"detection": {"overall": {"NDS": 0.25}}, "segmentation": {"iou": {"vehicle": 0.5}}}
(out / "weights.safetensors").write_bytes(b"")
(out / "card.json").write_text(json.dumps({"metrics": metrics, "step": 5, "commit": "abc"}))
for version, steps in ((0, range(0, 60, 10)), (1, range(40, 100, 10))):
    log = out / f"logs/version_{version}/metrics.csv"
    log.parent.mkdir(parents=True)
    lines = [f"{step},{step + 100 * version},{step / 10},0.5,0.0" for step in steps]
    heads = "step,train/loss,train/a.box,train/a.layer0.box,train/skipped"
    log.write_text("\\n".join([heads, *lines, ",,,,"]) + "\\n")
"""

PLAN = """
common: {data.root: out/world, training.seed: 3}
runs:
  first: {config: a.yaml, options: {training.steps: 5}}
  second: {config: b.yaml, start: first, parts: [backbone, neck]}
  third: {config: b.yaml, options: {training.seed: 4, augmentation.bev_scale: [0.9, 1.1]}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "program.py").write_text(TRAINER)
    monkeypatch.setattr(plan, "PROGRAM", (sys.executable, str(tmp_path / "program.py")))
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("jobs", [1, 3])
def test_runs_are_made_once_after_those_they_start_from(folder: Path, jobs: int) -> None:
    runs = read_plan(write(folder, PLAN))
    out = folder / "out"
    table = run_plan(runs, out, jobs, ["--data.root=elsewhere"])
    made = dict(json.loads(line) for line in (out / "order.txt").read_text().splitlines())
    assert set(made) == {"first", "second", "third"}
    assert made["first"]["training.steps"] == "5"
    assert made["second"]["training.initial_weights"] == str(out / "first")
    assert json.loads(made["second"]["training.initial_parts"]) == ["backbone", "neck"]
    assert json.loads(made["third"]["augmentation.bev_scale"]) == [0.9, 1.1]
    assert [made[name]["training.seed"] for name in ("first", "third")] == ["3", "4"]
    assert made["third"]["config"] == str(folder / "b.yaml")
    assert all(options["data.root"] == "elsewhere" for options in made.values())
    assert table == (out / TABLE_NAME).read_text().rstrip()
    assert table.count("| 0.250 |") == table.count("| 0.500 |") == 3
    run_plan(runs, out, jobs)
    assert len((out / "order.txt").read_text().splitlines()) == 3, "complete runs were made again"


@pytest.mark.parametrize(
    ("extra", "again"),
    [
        (["--training.steps=5"], []),
        (["--training.steps=9"], ["first", "second", "third"]),
        (["--training.steps", "9"], ["first", "second", "third"]),
        (["--training.steps=9", "--training.steps=5"], []),
    ],
)
def test_a_run_that_is_to_take_more_steps_is_not_complete(
    folder: Path, extra: list[str], again: list[str]
) -> None:
    runs = read_plan(write(folder, PLAN))
    run_plan(runs, folder / "out", 1)
    (folder / "out" / "order.txt").write_text("")
    if again:
        with pytest.raises(BevError):  # the stand-in still takes 5 steps, which is not what was asked for
            run_plan(runs, folder / "out", 1, extra)
    else:
        run_plan(runs, folder / "out", 1, extra)
    made = [json.loads(line)[0] for line in (folder / "out" / "order.txt").read_text().splitlines()]
    assert made == [name for name in again if name != "second"]  # which starts from one that failed


def test_steps_of_a_plan_win_over_those_of_its_files(folder: Path) -> None:
    (folder / "root.yaml").write_text("training: {steps: 5}\n")
    (folder / "b.yaml").write_text("base: root.yaml\n")
    (folder / "a.yaml").write_text("training: {steps: 7}\n")
    runs = read_plan(write(folder, PLAN))
    run_plan(runs, folder / "out", 1)
    (folder / "root.yaml").write_text("training: {steps: 6}\n")
    (folder / "out" / "order.txt").write_text("")
    with pytest.raises(BevError, match=r"second, third failed|third, second failed"):
        run_plan(runs, folder / "out", 1)
    made = [json.loads(line)[0] for line in (folder / "out" / "order.txt").read_text().splitlines()]
    assert made == ["second", "third"]


def test_a_record_holds_the_curve_of_a_resumed_run(folder: Path) -> None:
    """Steps that were made twice count as the second run made them; layers and rates are left out."""
    out = folder / "out"
    run_plan(read_plan(write(folder, PLAN)), out, 1)
    kept = json.loads((out / "records" / "third.json").read_text())
    assert (kept["run"], kept["step"], kept["commit"]) == ("third", 5, "abc")
    assert kept["options"]["training.seed"] == 4
    assert kept["detection"] == {"NDS": 0.25}
    assert kept["iou"] == {"vehicle": 0.5}
    assert set(kept["curve"]) == {"step", "loss", "a.box"}
    losses = [0, 10, 20, 30, *range(140, 200, 10)]
    assert kept["curve"]["loss"] == losses
    assert curve(out / "third", 4) == {
        "step": [21, 51, 81, 91],
        "loss": [10.0, round((30 + 140 + 150) / 3, 4), 170.0, 190.0],
        "a.box": [1.0, 4.0, 7.0, 9.0],
    }
    with pytest.raises(DataError, match="no complete run"):
        record(folder / "nowhere")


@pytest.mark.parametrize(("steps", "log"), [(13, "unlucky"), (0, "")])
def test_a_run_without_result_takes_along_only_those_that_start_from_it(
    folder: Path, steps: int, log: str
) -> None:
    runs = read_plan(write(folder, PLAN.replace("training.steps: 5", f"training.steps: {steps}")))
    with pytest.raises(BevError, match=r"first, second failed; see .*first.output\.log"):
        run_plan(runs, folder / "out", 1)
    assert (folder / "out" / "first" / LOG_NAME).read_text().strip() == log
    assert "| third |" in (folder / "out" / TABLE_NAME).read_text()


def test_a_plan_that_is_cut_off_has_kept_what_is_complete(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, out, sleep = read_plan(write(folder, PLAN)), folder / "out", time.sleep

    def interrupted(seconds: float) -> None:
        sleep(seconds)
        if (out / TABLE_NAME).is_file():
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_plan(runs, out, 1)
    assert "| first |" in (out / TABLE_NAME).read_text()
    assert [path.name for path in (out / "records").iterdir()] == ["first.json"]


def test_a_start_that_is_left_out_must_be_complete(folder: Path) -> None:
    runs = read_plan(write(folder, PLAN))
    with pytest.raises(DataError, match="no weights of 'first'"):
        run_plan(runs[1:], folder / "out", 1)


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_plans_name_configurations_and_settings_that_exist(path: Path) -> None:
    for run in read_plan(path):
        config = load_config(run.config, run.options)
        assert run.start is not None or not run.parts
        assert config.training.steps > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs: [a", "is not valid YAML"),
        ("steps: 5", "must hold 'runs' by name"),
        ("runs: {a: {options: {}}}", "run 'a' .* must hold 'config'"),
        ("runs: {a: {config: x, colour: red}}", "run 'a' .* must hold 'config'"),
        ("runs: {a: {config: 3}}", "run 'a' .* must hold 'config'"),
        ("runs: {a: {config: x, options: [1]}}", "options must map"),
        ("runs: {a: {config: x, parts: backbone}}", "parts be a list"),
        ("runs: {../a: {config: x}}", "'../a' is not a valid name"),
        ("runs: {..: {config: x}}", "'..' is not a valid name"),
        ("runs: {'': {config: x}}", "'' is not a valid name"),
        ("runs: {records: {config: x}}", "records will hold the results of all runs"),
        ("{runs: {}, common: 3}", "'common' of .* must map"),
        ("runs: {a: {config: x, start: b}, b: {config: x}}", "starts from 'b', which does not stand before"),
    ],
)
def test_wrong_plans(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_plan(write(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot read plan"):
        read_plan(tmp_path / "none.yaml")


def test_the_tool_names_what_a_plan_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, PLAN)
    monkeypatch.setattr(
        sys, "argv", ["run_plan.py", str(path), f"--out={folder / 'o'}", "--only=first,fourth"]
    )
    with pytest.raises(ConfigError, match="no run fourth; the plan has first, second, third"):
        main()
