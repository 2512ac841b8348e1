"""The benchmark of proposals: distances to the nearest box, what a row counts, and the program."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from bevperception.benchmarks.proposals import Nearest, format_table, joined, main, nearest_m, proposals_of
from bevperception.checkpoints.weights import Card, save_weights
from bevperception.config import ExperimentConfig
from bevperception.config_io import config_to_dict
from bevperception.errors import ConfigError
from bevperception.structures import Boxes3D
from tests.fixtures.tiny_nuscenes import VAL_SPLIT
from tests.models.builders import random_frames
from tests.streaming.helpers import micro_config, micro_model

INFINITY = float("inf")


def boxes_at(*places: tuple[float, float, int]) -> Boxes3D:
    """Boxes at (x, y) of a class, all else zero."""
    values = torch.zeros(len(places), 9)
    values[:, :2] = torch.tensor([place[:2] for place in places]).reshape(-1, 2)
    return Boxes3D(values, torch.tensor([place[2] for place in places], dtype=torch.int64))


def perspective_config(root: Path, query_mode: Literal["learned", "hybrid"] = "learned") -> ExperimentConfig:
    """The micro model with a perspective head that proposes wherever it looks."""
    config = micro_config(root)
    config.data.workers = 0
    config.model.perspective.enabled, config.model.perspective.score_threshold = True, 0.0
    config.model.perspective.max_proposals, config.model.perspective.channels = 30, 16
    config.model.detection.query_mode = query_mode
    return config


def test_the_nearest_box_is_of_the_same_class_and_counts_on_the_ground() -> None:
    objects = boxes_at((0.0, 0.0, 0), (10.0, 0.0, 1), (0.0, 20.0, 2))
    found = boxes_at((3.0, 4.0, 0), (0.5, 0.0, 1), (10.0, -1.0, 1), (60.0, 0.0, 0))
    found.values[:, 2] = 7.0
    expected = [5.0, 1.0, INFINITY]
    assert nearest_m(objects, found).tolist() == expected
    assert nearest_m(objects, boxes_at()).tolist() == [INFINITY] * 3
    assert nearest_m(boxes_at(), found).shape == (0,)
    assert nearest_m(boxes_at(), boxes_at()).shape == (0,)


def test_a_row_counts_what_each_finds_and_what_proposals_find_alone() -> None:
    def numbers(*values: float) -> Tensor:
        return torch.tensor(values)

    # Four objects nearer than 15 m: both find, only boxes, only proposals, none; one far off, found by both.
    near = Nearest(numbers(1, 2, 3, 14.9), numbers(1.0, 0.5, 2.0, INFINITY), numbers(0.5, 5, 1.9, 2.5))
    far = Nearest(numbers(40), numbers(0.4), numbers(1.6))
    table = {line[:12].strip(): line[12:].split() for line in format_table(joined([near, far])).splitlines()}
    assert table["0 to 15"] == ["4", "0.500", "0.500", "0.250", "1.00", "0.50"]
    assert table["15 to 30"][0] == "0"
    assert table["from 30"] == ["1", "1.000", "1.000", "0.000", "0.40", "1.60"]
    assert table["all"] == ["5", "0.600", "0.600", "0.200", "0.70", "1.05"]


def test_proposals_are_the_same_whether_the_model_needs_them_or_not(tiny_nuscenes: Path) -> None:
    learned = micro_model(perspective_config(tiny_nuscenes))
    hybrid = micro_model(perspective_config(tiny_nuscenes, "hybrid"))
    assert learned.hybrid is None
    learned.load_state_dict(hybrid.state_dict(), strict=False)
    frames = random_frames(batch=1, cameras=3, size=(96, 160), dtype=torch.float32)
    with torch.inference_mode():
        ours, theirs = (proposals_of(m, frames, m(frames)[0]) for m in (learned, hybrid))
    assert 0 < len(ours) <= 30
    assert torch.equal(ours.values, theirs.values)
    assert torch.equal(ours.labels, theirs.labels)


def test_the_program_prints_a_row_a_band(
    tiny_nuscenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = perspective_config(tiny_nuscenes)
    save_weights(tmp_path, micro_model(config).state_dict(), Card(config_to_dict(config)))
    assert main(["--weights", str(tmp_path), "--split", VAL_SPLIT]) == 0
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert "the best 30 boxes and proposals" in first
    counts = [int(row[12:].split()[0]) for row in rows]
    assert sum(counts[:-1]) == counts[-1] > 0


def test_a_model_without_perspective_head_is_refused(tiny_nuscenes: Path, tmp_path: Path) -> None:
    config = micro_config(tiny_nuscenes)
    save_weights(tmp_path, micro_model(config).state_dict(), Card(config_to_dict(config)))
    with pytest.raises(ConfigError, match="with detection and perspective heads"):
        main(["--weights", str(tmp_path), "--split", VAL_SPLIT])
