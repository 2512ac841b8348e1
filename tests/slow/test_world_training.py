"""Training the temporal world model: a kill at a random step, and two processes against one."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bevperception.world import WorldConfig, make_world

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 20
QUEUES = ("--data.stream_length=0", "--data.history=3")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("worlds") / "world"
    config = WorldConfig(scenes=3, seed=41, frames=6, image_size=(225, 400), val_share=0.34)
    return make_world(config, root, progress=False)


def start(world: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    """tools/train.py on the world, in float32 so that only the order of sums differs between runs."""
    command = [
        sys.executable,
        str(REPOSITORY / "tools" / "train.py"),
        f"--config={REPOSITORY / 'configs' / 'world_micro.yaml'}",
        f"--out={out}",
        f"--data.root={world}",
        f"--training.steps={STEPS}",
        "--training.precision=32-true",
        "--training.accelerator=cpu",
        "--training.log_every=1",
        "--training.checkpoint_every=3",
        "--training.warmup_steps=5",
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def finish(process: subprocess.Popen[bytes]) -> None:
    assert process.wait(timeout=1200) == 0


def losses(out: Path) -> list[float]:
    with (out / "logs" / "version_0" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.mark.parametrize("order", ["streams", "queues"])
def test_a_killed_and_resumed_run_ends_as_an_uninterrupted_one(
    world: Path, tmp_path: Path, order: str
) -> None:
    batch = ("--training.batch_size=1", *(QUEUES if order == "queues" else ()))
    finish(start(world, tmp_path / "whole", *batch))
    torn = tmp_path / "torn"
    process = start(world, torn, *batch)
    wanted = random.randrange(4, STEPS - 2)
    print(f"SIGKILL after step {wanted}")
    deadline = time.monotonic() + 600
    logged = torn / "logs" / "version_0" / "metrics.csv"
    while not (logged.exists() and len(losses(torn)) >= wanted):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (torn / "weights.safetensors").exists()
    finish(start(world, torn, *batch, "--resume=auto"))
    whole, resumed = (json.loads((tmp_path / name / "card.json").read_text()) for name in ("whole", "torn"))
    assert resumed["step"] == whole["step"] == STEPS
    for head in whole["metrics"]:
        compare(resumed["metrics"][head], whole["metrics"][head])


def compare(one: object, other: object) -> None:
    """Nested metrics, equal within the noise of float32."""
    if isinstance(other, dict):
        assert isinstance(one, dict)
        assert one.keys() == other.keys()
        for name, value in other.items():
            compare(one[name], value)
    elif isinstance(other, float):
        assert one == pytest.approx(other, abs=1e-3, nan_ok=True)
    else:
        assert one == other


def test_two_processes_learn_as_one_does(world: Path, tmp_path: Path) -> None:
    # From trained weights: of untrained queries so many are alike that rounding decides what they are matched
    # with. Small steps: at the usual rate Adam makes a whole step of the rounding of a tiny gradient, and
    # within some ten steps any two orders of summation part ways.
    rate = ("--training.initial_weights=world_micro", "--training.learning_rate=2e-5")
    finish(start(world, tmp_path / "one", *rate, "--training.batch_size=2"))
    shared = ("--training.batch_size=1", "--training.devices=2", "--training.strategy=ddp")
    finish(start(world, tmp_path / "two", *rate, *shared))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == STEPS
    assert two == pytest.approx(one, abs=1e-4)
