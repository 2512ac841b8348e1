"""Summarise a training run in a few kilobytes: configuration, loss curve and metrics."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from bevperception.checkpoints.weights import CARD_NAME
from bevperception.documents import read_json
from bevperception.errors import DataError

CURVE_POINTS = 20
_PREFIX = "train/"
_LEFT_OUT = ("layer", "learning_rate", "skipped")


def record(folder: Path, points: int = CURVE_POINTS) -> dict[str, Any]:
    """Summarise a run folder.

    Args:
        folder: of a complete run, as :func:`bevperception.training.run.train` leaves it.
        points: of the curve; each is the mean of as many log lines.

    Returns:
        ``commit``, ``step``, ``detection`` (the devkit's overall numbers), ``ap`` and ``iou`` by class, and
        ``curve``: columns of losses by name, ``step`` the last of the lines that were averaged.

    Raises:
        DataError: the run is not complete.
    """
    if not (folder / CARD_NAME).is_file():
        raise DataError(f"no complete run in {folder}: it has no {CARD_NAME}")
    card = read_json(folder / CARD_NAME, f"the card of run {folder}", DataError)
    if not isinstance(card, dict):
        raise DataError(f"the card in {folder} must hold names and values, got {type(card).__name__}")
    metrics = card.get("metrics") or {}
    detection = metrics.get("detection") or {}
    iou = (metrics.get("segmentation") or {}).get("iou", {})
    return {
        "commit": card.get("commit"),
        "step": card.get("step"),
        "detection": _rounded(detection.get("overall", {})),
        "ap": _rounded({name: values["ap"] for name, values in detection.get("classes", {}).items()}),
        "iou": _rounded(iou),
        "curve": curve(folder, points),
    }


def curve(folder: Path, points: int) -> dict[str, list[float]]:
    """Average the logged losses over stretches of steps; a run that was resumed has several logs.

    Args:
        folder: of the run.
        points: at most so many.
    """
    lines: dict[int, dict[str, float]] = {}
    logs = folder.glob("logs/version_*/metrics.csv")
    for log in sorted(logs, key=lambda path: int(path.parent.name.rpartition("_")[2])):
        with log.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row.get(f"{_PREFIX}loss"):
                    lines[int(row["step"])] = _losses(row)
    steps = sorted(lines)
    columns: dict[str, list[float]] = {"step": []}
    length = max(1, -(-len(steps) // max(1, points)))
    for first in range(0, len(steps), length):
        part = steps[first : first + length]
        columns["step"].append(part[-1] + 1)
        for name in lines[part[0]]:
            mean = sum(lines[step].get(name, 0.0) for step in part) / len(part)
            columns.setdefault(name, []).append(round(mean, 4))
    return columns


def _losses(row: dict[str, str]) -> dict[str, float]:
    return {
        name.removeprefix(_PREFIX): float(value)
        for name, value in row.items()
        if name.startswith(_PREFIX) and value and not any(part in name for part in _LEFT_OUT)
    }


def _rounded(numbers: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 4) for name, value in numbers.items()}


def dump_record(content: dict[str, Any]) -> str:
    """Format a record as JSON with one line a number or column, so that differences can be read."""
    return "{\n" + ",\n".join(f"  {_dump(name, value)}" for name, value in content.items()) + "\n}\n"


def _dump(name: str, value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return f"{json.dumps(name)}: {json.dumps(value)}"
    inner = ",\n".join(f"    {json.dumps(key)}: {json.dumps(part)}" for key, part in value.items())
    return f"{json.dumps(name)}: {{\n{inner}\n  }}"
