"""Past frames of a published BEVFormer v2 are encoded anew in the current frame, as its numbers need."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bevperception.errors import ConfigError
from bevperception.evaluation.history import CurrentFrameHistory, with_history
from bevperception.geometry import planar_pose
from bevperception.inference import StreamingPredictor
from bevperception.models.bev.alignment import seen_from
from bevperception.structures import Batch, CameraFrames, ModelOutputs
from bevperception.training.module import memory_from_history
from tests.models.builders import tiny_model
from tests.models.test_bevformer import assert_same
from tests.models.test_fusion import drive, fusion_config, fusion_model


def moving_drive(count: int) -> list[CameraFrames]:
    """Frames of a car that drives a bend."""
    poses = [planar_pose(3.0 * i, 0.4 * i * i, 0.2 * i)[None] for i in range(count)]
    return [replace(f, bev_to_global=pose) for f, pose in zip(drive(count), poses, strict=True)]


def streamed(model: nn.Module, frames: list[CameraFrames]) -> list[ModelOutputs]:
    outputs, memory = [], None
    for now in frames:
        output, memory = model(now, memory)
        outputs.append(output)
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("past", [1, 3])
def test_equals_encoding_the_queue_in_the_current_frame(past: int) -> None:
    """As ``obtain_history_bev`` of the published code does it: without a cache, frame by frame."""
    model = fusion_model(mode="fusion_published", past=past).eval()
    frames = moving_drive(6)
    outputs = streamed(CurrentFrameHistory(model), frames)
    for index, now in enumerate(frames):
        history = frames[max(0, index - past) : index]
        valid = torch.ones(1, len(history), dtype=torch.bool)
        batch = Batch(history, valid, now, None, ["t"], ["s"])
        expected, _ = model(now, memory_from_history(model, batch, model.config.temporal))
        assert_same(outputs[index], expected, 1e-12)
        # The slots by hand: a missing past frame takes the next newer one.
        maps = [model.encode(model.image_features(f), seen_from(f, now.bev_to_global), None) for f in history]
        current = model.encode(model.image_features(now), now, None)
        nearest = maps[0] if maps else current
        assert model.fusion is not None
        fused = model.fusion([*[nearest] * (past - len(maps)), *maps, current], [], past)
        torch.testing.assert_close(outputs[index].bev, fused, atol=1e-12, rtol=0)


@torch.no_grad()
def test_differs_from_the_warped_memory() -> None:
    model = fusion_model(mode="fusion_published", past=2).eval()
    frames = moving_drive(3)
    published = streamed(with_history(model, model.config), frames)
    warped = streamed(with_history(model, model.config, "warped"), frames)
    assert_same(published[0], warped[0], 1e-12)
    assert float((published[2].bev - warped[2].bev).abs().max()) > 1e-3


@torch.no_grad()
def test_another_scene_and_a_gap_begin_anew() -> None:
    model = fusion_model(mode="fusion_published", past=2).eval().float()
    frames = [replace(f, images=f.images.float()) for f in moving_drive(4)]
    predictor = StreamingPredictor(CurrentFrameHistory(model))
    predictor.observe(frames[0], "a")
    anew = StreamingPredictor(CurrentFrameHistory(model)).observe(frames[1], "b")
    assert_same(predictor.observe(frames[1], "b"), anew, 1e-6)
    late = replace(frames[2], timestamps_s=frames[2].timestamps_s + 60.0)
    alone = StreamingPredictor(CurrentFrameHistory(model)).observe(late, "b")
    assert_same(predictor.observe(late, "b"), alone, 1e-6)


def test_only_models_that_fuse_as_published_have_a_choice() -> None:
    own = fusion_config()
    model = fusion_model()
    assert with_history(model, own) is model
    with pytest.raises(ConfigError, match=r"history=published is for models with temporal\.mode"):
        with_history(model, own, "published")
    published = tiny_model(fusion_config(mode="fusion_published", past=0))
    assert with_history(published, published.config) is published
