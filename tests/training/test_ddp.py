"""Two CPU processes under DistributedDataParallel (gloo) against one with the same global batch."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bevperception.checkpoints.weights import AVERAGE_KEY, read_checkpoint

REPOSITORY = Path(__file__).parents[2]


def run(out: Path, devices: int, what: str = "train") -> subprocess.CompletedProcess[str]:
    program = Path(__file__).with_name("ddp_program.py")
    return subprocess.run(
        [sys.executable, program, out, str(devices), what],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        check=False,
    )


def losses(out: Path) -> list[float]:
    with (out / "logs" / "version_0" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.mark.parametrize("what", ["train", "stream"])
def test_two_processes_equal_one_on_the_same_global_batch(tmp_path: Path, what: str) -> None:
    for devices in (1, 2):
        finished = run(tmp_path / str(devices), devices, what)
        assert finished.returncode == 0, finished.stderr
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 6
    assert two == pytest.approx(one, abs=1e-5)
    last = "checkpoints/step-00000006.ckpt"
    single, shared = (read_checkpoint(tmp_path / d / last) for d in ("1", "2"))
    for key in ("state_dict", AVERAGE_KEY):
        for name, value in single[key].items():
            torch.testing.assert_close(value, shared[key][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("poison", "error: the loss (square) is NaN or infinite at step"),
        ("unreadable", "error: sample token-3: its image is truncated"),
    ],
)
def test_both_processes_stop_when_one_fails(tmp_path: Path, what: str, message: str) -> None:
    finished = run(tmp_path, 2, what)
    assert finished.returncode == 2, finished.stderr
    assert message in finished.stderr
    assert "token-3" in finished.stderr
    assert finished.stderr.count("error:") == 1, finished.stderr
    assert "Traceback" not in finished.stderr
