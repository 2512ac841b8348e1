"""Streaming: memory is used, and forgotten by the rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bevperception.inference import ResetRules, StreamingPredictor
from bevperception.structures import CameraFrames, concatenate_frames
from tests.training.standin import TinyModel, make_frames


def frames_at(time_s: float, x_m: float = 0.0, seed: int = 0) -> CameraFrames:
    frames = make_frames(np.random.default_rng(seed), time_s=time_s)
    frames.bev_to_global = frames.bev_to_global.clone()
    frames.bev_to_global[:, 0, 3] = x_m
    return frames


def test_a_sequence_equals_calling_the_model_with_its_memory() -> None:
    torch.manual_seed(0)
    model = TinyModel(dropout=0.5)
    predictor = StreamingPredictor(model)
    memory = None
    for step in range(3):
        frames = frames_at(0.5 * step, seed=step)
        boxes, probabilities = predictor.perceive(frames, "a")
        with torch.no_grad():
            outputs, memory = model(frames, memory)
        assert outputs.segmentation_logits is not None
        assert probabilities is not None
        torch.testing.assert_close(probabilities, outputs.segmentation_logits.sigmoid())
        assert len(boxes) == 1
        assert predictor.last_reset == ("first frame" if step == 0 else None)


@pytest.mark.parametrize(
    ("time_s", "x_m", "scene", "reason"),
    [
        (0.5, 5.0, "a", None),
        (2.0, 79.0, "a", None),
        (0.0, 0.0, "a", None),
        (0.5, 5.0, "b", "new scene"),
        (2.1, 5.0, "a", "2.100 s without a frame"),
        (-0.1, 0.0, "a", "the clock went back by 0.100 s"),
        (0.5, 81.0, "a", "the pose jumped by 81.0 m"),
        (0.5, math.nan, "a", "the pose jumped by nan m"),
    ],
)
def test_memory_is_forgotten_by_the_rules(time_s: float, x_m: float, scene: str, reason: str | None) -> None:
    torch.manual_seed(0)
    predictor = StreamingPredictor(TinyModel())
    predictor.perceive(frames_at(0.0), "a")
    frames = frames_at(time_s, x_m, seed=1)
    _, found = predictor.perceive(frames, scene)
    assert predictor.last_reset == reason
    predictor.reset()
    _, fresh = predictor.perceive(frames, scene)
    assert found is not None
    assert fresh is not None
    assert torch.equal(found, fresh) == (reason is not None)


def test_the_rules_are_settings() -> None:
    predictor = StreamingPredictor(TinyModel(), rules=ResetRules(max_gap_s=0.2))
    predictor.perceive(frames_at(0.0), "a")
    predictor.perceive(frames_at(0.3), "a")
    assert predictor.last_reset == "0.300 s without a frame"


def test_two_vehicles_are_refused() -> None:
    with pytest.raises(ValueError, match="one vehicle, got frames of 2"):
        StreamingPredictor(TinyModel()).perceive(concatenate_frames([frames_at(0.0)] * 2), "a")


def test_half_precision_stays_near_full() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    full, half = (
        StreamingPredictor(model, precision=p).perceive(frames_at(0.0), "a")[1]
        for p in ("32-true", "bf16-mixed")
    )
    assert full is not None
    assert half is not None
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, atol=2e-2, rtol=0.0)
