"""Run several trainings from one file: some start from others' weights, some run side by side.

A plan is scripted, resumable and comparable: a run that is complete is left alone, one that was cut off goes
on from its newest checkpoint, and a table of all runs' metrics is written at the end.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bevperception.checkpoints.weights import CARD_NAME, WEIGHTS_NAME
from bevperception.config_files import config_path
from bevperception.config_io import read_config_files
from bevperception.documents import read_json, read_yaml
from bevperception.errors import BevError, ConfigError, DataError
from bevperception.files import write_text
from bevperception.names import check_name
from bevperception.processes import PROGRAM, end_all
from bevperception.training.record import dump_record, record

LOG_NAME = "output.log"
TABLE_NAME = "table.md"
RECORD_FOLDER = "records"
STEPS_KEY = "training.steps"
_POLL_S = 0.5
_KEYS = {"config", "options", "start", "parts"}
_METRICS = ("NDS", "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE")
_COLUMNS = (*_METRICS, "IoU drivable", "IoU vehicle")


@dataclass(frozen=True)
class Run:
    """One training run of a plan.

    Attributes:
        name: of its folder.
        config: YAML file.
        options: dotted option to value, over the plan's common ones.
        start: name of the run whose weights it starts from, or None.
        parts: of the model that it takes from there; none named takes all.
        steps: that it is to take; None where neither the plan nor the YAML file says. One that has taken
            another number is not complete: it goes on, or says why it cannot.
    """

    name: str
    config: Path
    options: Mapping[str, object]
    start: str | None = None
    parts: tuple[str, ...] = ()
    steps: int | None = None

    def command(self, out: Path, extra: Sequence[str]) -> list[str]:
        """Program and arguments; ``extra`` options come last and win."""
        options = dict(self.options)
        if self.start is not None:
            options["training.initial_weights"] = str(out / self.start)
            if self.parts:
                options["training.initial_parts"] = list(self.parts)
        given = [f"--{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in options.items()]
        command = [*PROGRAM, "train", f"--config={self.config}", f"--out={out / self.name}"]
        return [*command, "--resume=auto", *given, *extra]

    def metrics(self, out: Path) -> dict[str, Any] | None:
        """Read the run's final metrics; None while it is not complete."""
        folder = out / self.name
        if not (folder / WEIGHTS_NAME).is_file() or not (folder / CARD_NAME).is_file():
            return None
        card = read_json(folder / CARD_NAME, f"the card of run {folder}", DataError)
        if not isinstance(card, dict) or (self.steps is not None and card.get("step") != self.steps):
            return None
        metrics = card.get("metrics")
        return metrics if isinstance(metrics, dict) and metrics else None


def read_plan(path: Path) -> list[Run]:
    """Read a plan: ``common`` options and ``runs`` by name, each with config, options, start and parts.

    Raises:
        ConfigError: it is missing or no such file, or a run starts from one that does not stand before it.
    """
    plan = read_yaml(path, f"plan {path}")
    if not isinstance(plan, dict) or not isinstance(plan.get("runs"), dict) or set(plan) - {"common", "runs"}:
        raise ConfigError(f"plan {path} must hold 'runs' by name and may hold 'common' options, nothing else")
    common = plan.get("common") or {}
    if not isinstance(common, dict):
        raise ConfigError(f"'common' of {path} must map options to values, got {common!r}")
    runs: list[Run] = []
    for name, given in plan["runs"].items():
        runs.append(_read_run(str(name), given, common, path, [run.name for run in runs]))
    return runs


def _read_run(name: str, given: Any, common: dict[str, object], path: Path, before: Sequence[str]) -> Run:
    rule = f"run {name!r} of {path}"
    if check_name(name, f"the run of {path}", ConfigError) in (RECORD_FOLDER, TABLE_NAME):
        raise ConfigError(f"{rule} must have another name: {name} will hold the results of all runs")
    if not isinstance(given, dict) or not isinstance(given.get("config"), str) or set(given) - _KEYS:
        raise ConfigError(f"{rule} must hold 'config', a file, and may hold options, start, parts")
    options, start, parts = given.get("options") or {}, given.get("start"), given.get("parts") or []
    if not isinstance(options, dict) or not isinstance(parts, list):
        raise ConfigError(f"{rule}: options must map options to values, and parts be a list")
    if start is not None and start not in before:
        raise ConfigError(f"{rule} starts from {start!r}, which does not stand before it")
    config = config_path(given["config"], path.parent).resolve()
    return Run(name, config, {**common, **options}, start, tuple(map(str, parts)))


def run_plan(runs: Sequence[Run], out: Path, jobs: int, extra: Sequence[str] = ()) -> str:
    """Run what is not complete, at most ``jobs`` at a time; a run waits for the run that it starts from.

    Args:
        runs: of a plan; those they start from must be among them or complete.
        out: a folder a run; what a run prints goes to ``output.log`` in its folder.
        jobs: processes side by side.
        extra: options for all runs.

    Returns:
        The table of all complete runs, see :func:`keep_results`.

    Raises:
        BevError: a run failed; the others that do not start from it are finished first.
    """
    runs = [replace(run, steps=_wanted_steps(run, extra)) for run in runs]
    waiting = [run for run in runs if run.metrics(out) is None]
    active: list[tuple[Run, subprocess.Popen[bytes]]] = []
    failed: list[str] = []
    try:
        while waiting or active:
            failed += [run.name for run in waiting if run.start in failed]
            waiting = [run for run in waiting if run.name not in failed]
            ready = [run for run in waiting if run.start is None or not _unfinished(run.start, runs, out)]
            for run in ready[: jobs - len(active)]:
                waiting.remove(run)
                active.append((run, _launch(run, out, extra)))
            time.sleep(_POLL_S)
            for run, process in [pair for pair in active if pair[1].poll() is not None]:
                active.remove((run, process))
                # One that ended well but without metrics would be waited for by those that start from it.
                if process.returncode or run.metrics(out) is None:
                    failed.append(run.name)
                print(f"{run.name} {'failed' if run.name in failed else 'is complete'}", flush=True)
                keep_results(runs, out)  # now, not at the end: a plan of hours may be cut off
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            for _, process in active:
                process.terminate()
        end_all([process for _, process in active])  # or the next try would find their folders in use
        raise
    table = keep_results(runs, out)
    if failed:
        raise BevError(
            f"{', '.join(failed)} failed; see {out / failed[0] / LOG_NAME}\n"
            f"the others are in {out / TABLE_NAME}"
        )
    return table


def _wanted_steps(run: Run, extra: Sequence[str]) -> int | None:
    """``training.steps`` as the run's command will find it, by the same order of who wins."""
    wanted: object = None
    if run.config.is_file():
        training = read_config_files(run.config).values.get("training")
        wanted = training.get("steps") if isinstance(training, dict) else None
    wanted = run.options.get(STEPS_KEY, wanted)
    for index, option in enumerate(extra):
        name, equals, value = option.partition("=")
        if name == f"--{STEPS_KEY}":
            wanted = value if equals else "".join(extra[index + 1 : index + 2])
    try:
        return None if wanted is None else int(str(wanted))
    except ValueError:
        return None  # the run itself will say that it is no number


def keep_results(runs: Sequence[Run], out: Path) -> str:
    """Write ``table.md`` of all complete runs, and a record of a few kilobytes each in ``records/``.

    Returns:
        The table.
    """
    folder = out / RECORD_FOLDER
    for run in runs:
        if run.metrics(out) is not None:
            text = dump_record({"run": run.name, "options": dict(run.options), **record(out / run.name)})
            write_text(folder / f"{run.name}.json", text)
    table = results_table(runs, out)
    write_text(out / TABLE_NAME, table + "\n")
    return table


def _unfinished(name: str, runs: Sequence[Run], out: Path) -> bool:
    matching = [run for run in runs if run.name == name]
    if matching:
        return matching[0].metrics(out) is None
    if not (out / name / WEIGHTS_NAME).is_file():
        raise DataError(f"no weights of {name!r} in {out}: run it first, or do not leave it out")
    return False


def _launch(run: Run, out: Path, extra: Sequence[str]) -> subprocess.Popen[bytes]:
    folder = out / run.name
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{run.name} begins", flush=True)
    with (folder / LOG_NAME).open("ab") as log:
        return subprocess.Popen(run.command(out, extra), stdout=log, stderr=subprocess.STDOUT)


def results_table(runs: Sequence[Run], out: Path) -> str:
    """All complete runs' metrics as a Markdown table."""
    lines = ["| run | " + " | ".join(_COLUMNS) + " |", "| --- |" + " --- |" * len(_COLUMNS)]
    for run in runs:
        metrics = run.metrics(out)
        if metrics is not None:
            lines.append(f"| {run.name} | " + " | ".join(_shown(v) for v in key_numbers(metrics)) + " |")
    return "\n".join(lines)


def key_numbers(metrics: Mapping[str, Any]) -> list[float | None]:
    """NDS, mAP, the five errors, and IoU of drivable area and vehicles; None for what was not measured."""
    overall = (metrics.get("detection") or {}).get("overall", {})
    iou = (metrics.get("segmentation") or {}).get("iou", {})
    return [*(overall.get(name) for name in _METRICS), iou.get("drivable_area"), iou.get("vehicle")]


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
