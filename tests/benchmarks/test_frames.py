"""The benchmark of trained models as a vehicle runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bevperception.benchmarks import frames as benchmark
from bevperception.benchmarks.streaming import random_drive
from bevperception.checkpoints.weights import Card, save_weights
from bevperception.config_io import config_to_dict, load_config
from bevperception.errors import CheckpointError, ConfigError
from bevperception.models.bevformer import BEVFormer
from bevperception.structures import Boxes3D, CameraFrames, ModelOutputs
from tests.benchmarks.test_model import SMALL


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_config(None, {**SMALL, "model.temporal.interval_s": 0.5})
    folder = tmp_path_factory.mktemp("small")
    state = BEVFormer(config.model).state_dict()
    save_weights(folder, state, Card(config_to_dict(config), 1, False, {}, None))
    return folder


class Counting:
    """Stands in for a predictor and notes what it is given."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.decoded = 0

    def observe(self, frames: CameraFrames, scene_token: str) -> ModelOutputs:
        assert scene_token == "drive"
        self.seen.append(float(frames.timestamps_s))
        return ModelOutputs(torch.zeros(1, 1, 1, 1), None, None)

    def decode(self, outputs: ModelOutputs) -> list[Boxes3D]:
        self.decoded += 1
        return []


def test_all_see_every_frame_and_the_first_do_not_count() -> None:
    drive = random_drive(load_config(None, SMALL), 5)
    predictors = [Counting(), Counting()]
    candidates = [benchmark.Candidate(str(i), p) for i, p in enumerate(predictors)]  # type: ignore[arg-type]
    costs = benchmark.measure(candidates, [drive, drive], warmup=2)
    assert all(p.seen == [0.0, 0.5, 1.0, 1.5, 2.0] for p in predictors)
    assert [p.decoded for p in predictors] == [5, 5]
    assert [len(cost.milliseconds) for cost in costs] == [3, 3]
    cost = benchmark.FrameCost("x", [float(k) for k in range(100, 0, -1)])
    assert (cost.median_ms, cost.p95_ms) == (50.5, 96.0)
    table = benchmark.format_costs([cost, benchmark.FrameCost("longer", [101.0])])
    assert table.splitlines()[2].split() == ["longer", "101.0", "101.0", "9.9", "2.00"]


def test_the_program(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        options = [f"--weights={weights},{weights}", "--precision=32-true,bf16-mixed", "--threads=1"]
        assert benchmark.main([*options, "--frames=2", "--warmup=1"]) == 0
    finally:
        torch.set_num_threads(before)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 threads, 2 frames"
    assert [line.split(",")[1].split()[0] for line in lines[2:]] == ["32-true", "bf16-mixed"] * 2
    assert float(lines[2].split()[-1]) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision=fp8"], "--precision takes 32-true, .* got fp8"),
        (["--frames=0"], "--frames must be 1 to 1000000, got 0"),
        (["--warmup=-1"], "--warmup must be 0 to 1000000, got -1"),
    ],
)
def test_wrong_options(weights: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark.main([f"--weights={weights}", *options])
    with pytest.raises(CheckpointError, match="no weights at nowhere"):
        benchmark.main(["--weights=nowhere"])
