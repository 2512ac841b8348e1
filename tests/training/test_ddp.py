"""Two CPU processes under DistributedDataParallel (gloo) against one with the same global batch."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bevperception.checkpoints.weights import AVERAGE_KEY, read_checkpoint
from tests.training.ddp_program import work

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Ended:
    """A program of two processes that has ended, and the folder of its runs."""

    folder: Path
    code: int
    stderr: str


def run_two(folder: Path, *runs: str) -> Ended:
    program = Path(__file__).with_name("ddp_program.py")
    finished = subprocess.run(
        [sys.executable, program, folder, "2", *runs],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return Ended(folder, finished.returncode, finished.stderr)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Two processes that train twice, and then fail: to start them takes longer than what they do."""
    return run_two(tmp_path_factory.mktemp("two"), "train", "stream", "unreadable")


def losses(out: Path) -> list[float]:
    with (out / "logs" / "version_0" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.mark.parametrize("what", ["train", "stream"])
def test_two_processes_equal_one_on_the_same_global_batch(two: Ended, tmp_path: Path, what: str) -> None:
    assert (two.folder / what / "result.json").is_file(), two.stderr
    work(tmp_path, 1, what)
    one, shared = losses(tmp_path), losses(two.folder / what)
    assert len(one) == 6
    assert shared == pytest.approx(one, abs=1e-5)
    last = "checkpoints/step-00000006.ckpt"
    single, both = (read_checkpoint(out / last) for out in (tmp_path, two.folder / what))
    for key in ("state_dict", AVERAGE_KEY):
        for name, value in single[key].items():
            torch.testing.assert_close(value, both[key][name], rtol=1e-4, atol=1e-5, msg=name)


def test_both_processes_stop_where_one_cannot_read_a_sample(two: Ended) -> None:
    check_failure(two, "error: sample token-3: its image is truncated")


def test_both_processes_stop_where_the_loss_of_one_is_not_finite(tmp_path: Path) -> None:
    check_failure(run_two(tmp_path, "poison"), "error: the loss (square) is NaN or infinite at step")


def check_failure(ended: Ended, message: str) -> None:
    assert ended.code == 2, ended.stderr
    assert message in ended.stderr
    assert "token-3" in ended.stderr
    assert ended.stderr.count("error:") == 1, ended.stderr
    assert "Traceback" not in ended.stderr
