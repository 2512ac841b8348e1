"""Streaming: memory is used, and forgotten by the rules."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bevperception.errors import ConfigError, DataError
from bevperception.inference import ResetRules, StreamingPredictor
from bevperception.structures import Boxes3D, CameraFrames, concatenate_frames
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
        boxes, probabilities = perceive(predictor, frames, "a")
        with torch.no_grad():
            outputs, memory = model(frames, memory)
        assert outputs.segmentation_logits is not None
        assert probabilities is not None
        torch.testing.assert_close(probabilities, outputs.segmentation_logits.sigmoid())
        assert len(boxes) == 1
        assert predictor.last_reset == ("first frame" if step == 0 else None)


def perceive(
    predictor: StreamingPredictor, frames: CameraFrames, scene_token: str
) -> tuple[list[Boxes3D], torch.Tensor | None]:
    """Boxes and probabilities of a frame that is already the network's input."""
    outputs = predictor.observe(frames, scene_token)
    logits = outputs.segmentation_logits
    return predictor.decode(outputs), None if logits is None else logits.float().sigmoid()


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
        (0.5, math.nan, "a", "the pose is impossible: bev_to_global is not finite"),
    ],
)
def test_memory_is_forgotten_by_the_rules(time_s: float, x_m: float, scene: str, reason: str | None) -> None:
    torch.manual_seed(0)
    predictor = StreamingPredictor(TinyModel())
    perceive(predictor, frames_at(0.0), "a")
    frames = frames_at(time_s, x_m, seed=1)
    _, found = perceive(predictor, frames, scene)
    assert predictor.last_reset == reason
    predictor.reset()
    _, fresh = perceive(predictor, frames, scene)
    assert found is not None
    assert fresh is not None
    assert torch.equal(found, fresh) == (reason is not None)


def with_can_bus(time_s: float, value: float, seed: int = 0) -> CameraFrames:
    frames = frames_at(time_s, seed=seed)
    frames.can_bus = torch.full((1, 18), value, dtype=torch.float64)
    return frames


class CanBusModel(TinyModel):
    """Looks at the CAN bus and at the pose, as the real one may."""

    def encode(self, features, frames, memory):  # type: ignore[no-untyped-def]
        moved = 0.0 if frames.can_bus is None else frames.can_bus.mean().float()
        return super().encode(features, frames, memory) + moved + frames.bev_to_global.mean().float()


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        (frames_at(0.5, math.nan, seed=1), "the pose is impossible: bev_to_global is not finite"),
        (frames_at(0.5, -math.inf, seed=1), "the pose is impossible: bev_to_global is not finite"),
        (frames_at(0.5, 1e300, seed=1), "the pose is impossible: bev_to_global lies 1e+300 m away"),
        (with_can_bus(0.5, math.nan, seed=1), "the CAN-bus vector is impossible: not finite or too far"),
        (with_can_bus(0.5, 1e300, seed=1), "the CAN-bus vector is impossible: not finite or too far"),
    ],
)
def test_a_frame_that_cannot_be_placed_stands_alone(frames: CameraFrames, reason: str) -> None:
    torch.manual_seed(0)
    model = CanBusModel()
    predictor, fresh = StreamingPredictor(model), StreamingPredictor(model)
    perceive(predictor, frames_at(0.0), "a")
    _, alone = perceive(predictor, frames, "a")
    assert predictor.last_reset == reason
    _, wanted = perceive(fresh, frames_at(0.5, seed=1), "a")
    assert alone is not None
    torch.testing.assert_close(alone, wanted)
    _, after = perceive(predictor, frames_at(1.0, seed=2), "a")
    assert predictor.last_reset == f"the frame before stood alone ({reason})"
    _, wanted = perceive(StreamingPredictor(model), frames_at(1.0, seed=2), "a")
    torch.testing.assert_close(after, wanted)
    perceive(predictor, frames_at(1.5, seed=3), "a")
    assert predictor.last_reset is None
    perceive(predictor, frames, "a")
    predictor.reset()
    perceive(predictor, frames_at(1.0), "a")
    assert predictor.last_reset == "first frame"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)},
            "normalised numbers in float32, got torch.uint8",
        ),
        ({"images": torch.zeros(1, 2, 3, 4, 4, dtype=torch.float64)}, "float32, got torch.float64"),
        ({"images": torch.zeros(1, 2, 1, 4, 4)}, r"\(1, cameras, 3, height, width\), got \(1, 2, 1, 4, 4\)"),
        ({"images": torch.zeros(1, 2, 3, 4, 0)}, r"height, width\), got \(1, 2, 3, 4, 0\)"),
        ({"images": torch.zeros(2, 3, 4, 4)}, r"height, width\), got \(2, 3, 4, 4\)"),
        ({"camera_mask": torch.ones(1, 2)}, r"camera_mask must be \(1, 2\) bool, got \(1, 2\) torch.float32"),
        ({"camera_mask": torch.ones(2, dtype=torch.bool)}, r"camera_mask must be \(1, 2\) bool, got \(2,\)"),
        ({"can_bus": torch.zeros(1, 17)}, r"can_bus must be \(1, 18\), got \(1, 17\)"),
        ({"timestamps_s": torch.tensor([math.nan]).double()}, "stamp must be a finite number"),
        ({"timestamps_s": torch.tensor(0.5)}, r"timestamps_s must be \(1,\)"),
        ({"bev_to_global": torch.eye(4)}, r"bev_to_global must be \(1, 4, 4\)"),
        ({"bev_to_image": torch.eye(4).expand(1, 3, 4, 4)}, r"bev_to_image must be \(1, 2, 4, 4\)"),
        (
            {"bev_to_image": torch.tensor([1.0, math.inf])[None, :, None, None].expand(1, 2, 4, 4)},
            r"bev_to_image of cameras \[1\] is not finite",
        ),
    ],
)
def test_frames_that_are_none_are_refused_and_the_memory_stays(
    change: dict[str, torch.Tensor], message: str
) -> None:
    predictor = StreamingPredictor(TinyModel())
    perceive(predictor, frames_at(0.0), "a")
    with pytest.raises(ValueError, match=message):
        perceive(predictor, replace(frames_at(0.5), **change), "a")
    perceive(predictor, frames_at(1.0), "a")
    assert predictor.last_reset is None


def test_a_projection_of_a_missing_camera_may_hold_anything() -> None:
    predictor = StreamingPredictor(TinyModel())
    matrices = torch.tensor([1.0, math.nan])[None, :, None, None].expand(1, 2, 4, 4)
    frames = replace(frames_at(0.0), bev_to_image=matrices, camera_mask=torch.tensor([[True, False]]))
    perceive(predictor, frames, "a")
    with pytest.raises(ValueError, match=r"cameras \[1\]"):
        perceive(predictor, replace(frames, camera_mask=torch.tensor([[False, True]])), "a")


def test_an_impossible_pose_resets_the_memory_even_where_the_frame_is_refused() -> None:
    predictor = StreamingPredictor(TinyModel())
    perceive(predictor, frames_at(0.0), "a")
    with pytest.raises(ValueError, match="not finite"):
        perceive(
            predictor, replace(frames_at(0.5, math.nan), bev_to_image=torch.full((1, 2, 4, 4), math.nan)), "a"
        )
    perceive(predictor, frames_at(1.0), "a")
    assert predictor.last_reset is not None
    assert predictor.last_reset.startswith("the frame before stood alone (the pose is impossible")


def test_the_rules_are_settings() -> None:
    predictor = StreamingPredictor(TinyModel(), rules=ResetRules(max_gap_s=0.2))
    perceive(predictor, frames_at(0.0), "a")
    perceive(predictor, frames_at(0.3), "a")
    assert predictor.last_reset == "0.300 s without a frame"


@pytest.mark.parametrize("value", [math.nan, -0.1, "2", None])
@pytest.mark.parametrize("name", ["max_gap_s", "max_jump_m"])
def test_rules_that_would_never_or_always_hold_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a number of at least 0, got {value!r}"):
        ResetRules(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_said_and_not_remembered(value: float) -> None:
    predictor = StreamingPredictor(TinyModel())
    perceive(predictor, frames_at(0.0), "a")
    frames = frames_at(0.5, seed=1)
    frames.images[0, 1, 2, -1, -1] = value
    with pytest.raises(DataError, match=r"the frame at 0\.5 s gave BEV features that are NaN or infinite"):
        perceive(predictor, frames, "a")
    boxes, found = perceive(predictor, frames_at(1.0, seed=2), "a")
    assert predictor.last_reset == "the frame before gave BEV features that are NaN or infinite"
    wanted_boxes, wanted = perceive(StreamingPredictor(predictor.model), frames_at(1.0, seed=2), "a")
    torch.testing.assert_close((boxes[0].values, found), (wanted_boxes[0].values, wanted))
    perceive(predictor, frames_at(1.5), "a")
    assert predictor.last_reset is None


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="auto or one of 32-true, bf16-mixed, 16-mixed, got 'fp8'"):
        StreamingPredictor(TinyModel(), precision="fp8")


@pytest.mark.parametrize("device", ["gpu", "meta", "cpu:x", "", None, 1.5])
def test_an_unknown_device_is_refused(device: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^device must be one of cpu, cuda, mps or .*got '{device!s}'$"):
        StreamingPredictor(TinyModel(), device=device)


def test_a_device_that_is_not_there_is_refused() -> None:
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ConfigError, match=rf"device is {absent}, but this PyTorch sees \d+ GPUs"):
        StreamingPredictor(TinyModel(), device=absent)
    if not torch.backends.mps.is_available():
        with pytest.raises(ConfigError, match="cannot compute"):
            StreamingPredictor(TinyModel(), device=torch.device("mps"))


def test_two_vehicles_are_refused() -> None:
    with pytest.raises(ValueError, match="one vehicle, got frames of 2"):
        perceive(StreamingPredictor(TinyModel()), concatenate_frames([frames_at(0.0)] * 2), "a")


def test_half_precision_stays_near_full() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    full, half = (
        perceive(StreamingPredictor(model, precision=p), frames_at(0.0), "a")[1]
        for p in ("32-true", "bf16-mixed")
    )
    assert full is not None
    assert half is not None
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, atol=2e-2, rtol=0.0)
