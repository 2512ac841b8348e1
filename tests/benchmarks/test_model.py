from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bevperception.benchmarks import model as benchmark
from bevperception.benchmarks import model_input, model_process
from bevperception.benchmarks.model_process import Memory, ModelProcess, Setting, StageClock
from bevperception.config import ExperimentConfig
from bevperception.config_io import load_config
from bevperception.errors import BevError, ConfigError, DataError
from bevperception.geometry import project_points
from bevperception.models.bev.memory import select_slots
from bevperception.models.bevformer import BEVFormer

SMALL = {
    "data.image_size": [64, 96],
    "model.backbone.out_indices": [2, 3],
    "model.neck.levels": 2,
    "model.bev.channels": 32,
    "model.bev.rows": 10,
    "model.bev.columns": 12,
    "model.detection.queries": 20,
    "model.segmentation.channels": 8,
}


@pytest.fixture(scope="module")
def config() -> ExperimentConfig:
    return load_config(None, SMALL)


@pytest.fixture(scope="module")
def model(config: ExperimentConfig) -> BEVFormer:
    return model_input.build_model(config.model)


def test_parts_add_up_to_the_model(model: BEVFormer) -> None:
    counts = model_process.count_parameters(model)
    total = counts.pop(model_process.TOTAL)
    assert total == sum(p.numel() for p in model.parameters()) == sum(counts.values())
    assert counts["backbone"] == sum(p.numel() for p in model.backbone.parameters())


def test_ring_of_cameras_sees_all_around() -> None:
    """Camera k looks along k * 60 degrees: a point ahead of it is at the middle, others' are not seen."""
    frames = model_input.random_frames(load_config(None, {"data.image_size": [90, 160]}))
    for index in range(6):
        yaw = torch.tensor(2 * torch.pi * index / 6)
        ahead = torch.stack([10 * yaw.cos(), 10 * yaw.sin(), torch.tensor(1.5)])
        left = torch.stack([10 * (yaw + 0.1).cos(), 10 * (yaw + 0.1).sin(), torch.tensor(2.0)])
        pixels, depth = project_points(torch.stack([ahead, left]), frames.bev_to_image[0, index])
        torch.testing.assert_close(pixels[0], torch.tensor([80.0, 45.0]), atol=1e-3, rtol=0)
        assert pixels[1, 0] < 80, "a point to the left is left of the middle"
        assert pixels[1, 1] < 45, "a higher point is higher in the image"
        torch.testing.assert_close(depth[0], torch.tensor(10.0))
        behind = project_points(-ahead[None], frames.bev_to_image[0, index])[1]
        assert behind < 0


def test_stages_and_rest_make_the_total(config: ExperimentConfig, model: BEVFormer) -> None:
    frames = model_input.load_frames(config, "random")
    with torch.inference_mode():
        seconds = StageClock(model).time(lambda: model(frames))
    there = [stage for stage in model_process.STAGES if stage not in ("perspective head", "fusion")]
    assert list(seconds) == [*there, model_process.REST, model_process.TOTAL]
    assert all(value > 0 for value in seconds.values())
    total = seconds.pop(model_process.TOTAL)
    assert sum(seconds.values()) == pytest.approx(total)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_process_measures_a_model_that_lacks_a_head_and_says_when_it_dies() -> None:
    alone = load_config(None, {**SMALL, "model.detection.enabled": False})
    with ModelProcess(alone, "random", Setting("reference", 1, keep_memory=False)) as process:
        seconds = process.time_frame()
        memory = process.memory()
        counts = process.parameters()
        with pytest.raises(BevError, match="reference backend was killed"):
            process._ask(os._exit, 9)
    assert counts == model_process.count_parameters(model_input.build_model(alone.model))
    assert seconds["backbone"] > 0
    assert "decoder" not in seconds
    assert "decoder" not in benchmark.format_costs({"reference": seconds}, {"reference": memory})
    assert 100e6 < memory.before < memory.peak


def test_backends_take_turns_and_medians_count() -> None:
    asked: list[str] = []

    class Process:
        def __init__(self, name: str, seconds: list[float]) -> None:
            self.name, self.left = name, seconds

        def time_frame(self) -> dict[str, float]:
            asked.append(self.name)
            return {"total": self.left.pop(0)}

    processes = {"native": Process("n", [9, 1, 3, 2]), "reference": Process("r", [9, 5, 4, 8])}
    seconds = benchmark.time_stages(processes, warmup=1, repeats=3)  # type: ignore[arg-type]
    assert seconds == {"native": {"total": 2}, "reference": {"total": 5}}
    assert "".join(asked) == "nr" * 4


def test_only_native_keeps_its_memory_unless_told_otherwise() -> None:
    found = [
        [benchmark.keeps_memory(c, b) for b in ("native", "reference")] for c in ("auto", "keep", "return")
    ]
    assert found == [[True, False], [True, True], [False, False]]


def test_data_that_cannot_be_read_is_the_parents_error_too(tmp_path: Path) -> None:
    config = load_config(None, {**SMALL, "data.root": str(tmp_path / "none")})
    with pytest.raises(DataError, match="none"):
        ModelProcess(config, "data", Setting("reference", 1, keep_memory=False))


@torch.no_grad()
def test_published_alignment_gets_a_can_bus() -> None:
    settings = load_config(None, {**SMALL, "model.bev.alignment": "published"})
    frames = model_input.load_frames(settings, "random")
    assert frames.can_bus is not None
    model = model_input.build_model(settings.model)
    outputs, _ = model(*model_input.with_memory(model, frames))
    assert torch.isfinite(outputs.bev).all()


def test_table_shows_medians_memory_and_ratio() -> None:
    seconds = {
        "native": {"encoder": 0.01, "decoder": 0.02, "rest": 0.0, "total": 0.03},
        "reference": {"encoder": 0.04, "decoder": 0.05, "rest": 0.0, "total": 0.09},
    }
    memory = {
        "native": Memory(1_000_000, 3_000_000),
        "reference": Memory(1_000_000, 9_000_000),
    }
    seconds = {b: {k: v or 1e-6 for k, v in by.items()} for b, by in seconds.items()}
    table = benchmark.format_costs(seconds, memory)  # type: ignore[arg-type]
    assert re.search(r"encoder \+ decoder, ms +30\.0 +90\.0 +3\.00", table)
    assert re.search(r"peak memory, MB +3\.0 +9\.0 +3\.00", table)


def test_peak_counts_memory_that_was_freed_again() -> None:
    code = (
        "import torch\n"
        "from bevperception.benchmarks.model_process import peak_resident_bytes\n"
        "before = peak_resident_bytes()\n"
        "del_me = torch.ones(300 << 20, dtype=torch.uint8)\n"
        "del del_me\n"
        "print(peak_resident_bytes() - before)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert 250 << 20 < int(printed) < 350 << 20


def test_program_prints_everything(
    config: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("data: {image_size: [64, 96]}\nmodel: {bev: {rows: 10, columns: 12}}\n")
    code = benchmark.main(
        ["--config", str(path), "--backend", "reference", "--repeats", "1", "--threads", "1"]
    )
    printed = capsys.readouterr().out
    assert code == 0
    for wanted in ("6 cameras of 64 x 96", "backbone", "total", "peak memory, MB", "encoder + decoder, ms"):
        assert wanted in printed
    peak, before = (
        float(re.search(rf"{row}, MB +([\d.]+)", printed)[1])  # type: ignore[index]
        for row in ("peak memory", "before the forward")
    )
    assert 20 < before <= peak < 4000


def test_bad_counts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(ConfigError, match="--repeats"):
        benchmark.main(["--config", str(tmp_path / "c.yaml"), "--repeats", "0"])


def test_native_that_is_not_built_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Report:
        problem = "the native operators are not built"

    monkeypatch.setattr(benchmark, "backend_report", Report)
    assert benchmark.chosen_backends("auto") == ("reference",)
    for choice in ("native", "both"):
        with pytest.raises(ConfigError, match="not built"):
            benchmark.chosen_backends(choice)
    Report.problem = None  # type: ignore[assignment]
    assert benchmark.chosen_backends("auto") == benchmark.chosen_backends("both") == ("native", "reference")
    assert benchmark.chosen_backends("native") == ("native",)


@pytest.mark.parametrize("temporal", [{"interval_s": 0.4}, {"mode": "fusion", "past": 3, "interval_s": 0.4}])
@torch.no_grad()
def test_a_frame_is_timed_with_all_the_memory_that_it_uses(temporal: dict[str, object]) -> None:
    """Frames at one and the same time would be no history to a model that looks back by time."""
    settings = {f"model.temporal.{name}": value for name, value in temporal.items()}
    config = load_config(None, {**SMALL, **settings})
    model = model_input.build_model(config.model)
    frames, memory = model_input.with_memory(model, model_input.random_frames(config))
    needed = model.config.temporal.needed
    choice = select_slots(memory, frames.timestamps_s, needed, 0, 0.4)
    assert choice.filled.tolist() == [[True]] * needed
