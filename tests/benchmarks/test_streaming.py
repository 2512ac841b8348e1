"""The streaming benchmark: both ways agree, and the program says what it measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bevperception.benchmarks.streaming import (
    format_costs,
    main,
    measure,
    random_drive,
    relative_difference,
    with_history,
)
from bevperception.config import DataConfig, ExperimentConfig
from bevperception.config_io import dump_config
from bevperception.errors import ConfigError
from tests.models.test_bevformer_v2 import v2_config


def experiment() -> ExperimentConfig:
    config = v2_config(threshold=0.0)
    config.temporal.inner_channels = 32
    data = DataConfig(image_size=(64, 96), cameras=("CAM_FRONT", "CAM_BACK"))
    return ExperimentConfig(model=config, data=data)


def test_streaming_equals_recomputing_for_twenty_frames() -> None:
    config = experiment()
    frames = random_drive(config, 20)
    costs = measure(config, frames, [1, 3], recomputing=True)
    assert [cost.past for cost in costs] == [1, 3]
    for cost in costs:
        assert cost.difference is not None
        assert cost.difference < 1e-4
        assert 0 < cost.streaming_s < cost.recomputing_s
    table = format_costs(costs)
    assert "recomputing" in table
    assert len(table.splitlines()) == 3
    (without,) = measure(config, frames[:3], [1], recomputing=False)
    assert without.recomputing_s is None
    format_costs([without])


def test_the_comparison_sees_a_lost_frame() -> None:
    config = experiment()
    model = with_history(config, 2)
    frames = random_drive(config, 3)
    with torch.inference_mode():
        _, memory = model(frames[0])
        _, memory = model(frames[1], memory)
        whole, lacking = model(frames[2], memory)[0], model(frames[2], replace(memory, older=[]))[0]
    assert relative_difference(whole, whole) == 0
    assert relative_difference(whole, lacking) > 1e-3


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    dump_config(experiment(), path)
    arguments = ["--config", str(path), "--frames", "4", "--history", "1,2", "--threads", "1"]
    assert main(arguments) == 0
    assert "streaming, ms" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="never fills"):
        main([*arguments[:-4], "--history", "1,9", "--threads", "1"])
    with pytest.raises(ConfigError, match="positive numbers"):
        main([*arguments, "--history", "0"])
    with pytest.raises(ConfigError, match="mode=fusion"):
        main([*arguments, "--model.temporal.mode", "recurrent"])
