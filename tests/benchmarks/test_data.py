"""The benchmark of reading, on the tiny data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from bevperception.benchmarks import data as benchmark
from bevperception.config import ExperimentConfig
from bevperception.config_io import load_config
from bevperception.errors import ConfigError
from tests.fixtures.tiny_nuscenes import TRAIN_SPLIT, VERSION


@pytest.fixture
def config(tiny_nuscenes: Path) -> ExperimentConfig:
    return load_config(
        None,
        {
            "data.root": str(tiny_nuscenes),
            "data.version": VERSION,
            "data.train_split": TRAIN_SPLIT,
            "data.image_size": [64, 96],
            "data.history": 1,
            "model.bev.channels": 16,
            "model.bev.rows": 8,
            "model.bev.columns": 8,
            "model.bev.layers": 1,
            "model.detection.queries": 12,
            "model.segmentation.cell_m": 5.0,
            "training.batch_size": 2,
        },
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_and_waiting_are_told_apart(config: ExperimentConfig, workers: int) -> None:
    reading = benchmark.measure(config, workers, batches=2, steps=1)
    assert reading.workers == workers
    assert reading.samples_per_s > 0
    assert reading.step_s > 0
    assert reading.waiting_share == pytest.approx(reading.wait_s / (reading.wait_s + reading.step_s))


def test_bad_arguments() -> None:
    config = ["--config", str(Path(__file__).parents[2] / "configs" / "world_micro.yaml")]
    with pytest.raises(ConfigError, match="numbers such as 0,2, got 'two'"):
        benchmark.main([*config, "--workers", "two"])
    with pytest.raises(ConfigError, match="--steps must be 1 to"):
        benchmark.main([*config, "--steps", "0"])
