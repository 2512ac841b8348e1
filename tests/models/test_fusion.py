"""The temporal fusion of BEVFormer v2: what is remembered, chosen, warped and fused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bevperception.config_model import ModelConfig, TemporalConfig
from bevperception.errors import ConfigError
from bevperception.geometry import BEVGrid, planar_pose
from bevperception.models.bev.alignment import seen_from
from bevperception.models.bev.fusion import FusionNetwork
from bevperception.models.bev.memory import gather_slots, push, select_slots
from bevperception.models.bev.temporal import fuse_memory
from bevperception.models.bevformer import BEVFormer
from bevperception.structures import Batch, BEVMemory, CameraFrames
from bevperception.training.module import memory_from_history
from tests.models.builders import random_frames, take, tiny_config, tiny_model
from tests.models.test_bevformer import assert_same, select


def fusion_config(**temporal: object) -> ModelConfig:
    config = tiny_config()
    config.temporal = TemporalConfig(**{"mode": "fusion", "past": 3, **temporal})
    return config


def fusion_model(**temporal: object) -> BEVFormer:
    """A model whose fusion matters (the residual one begins with nothing)."""
    model = tiny_model(fusion_config(**temporal))
    assert model.fusion is not None
    with torch.no_grad():
        model.fusion.projection.weight.normal_(0, 0.2)
    return model


def drive(count: int, batch: int = 1, step_s: float = 0.5) -> list[CameraFrames]:
    frames = [random_frames(batch, seed=index) for index in range(count)]
    return [
        replace(f, timestamps_s=torch.full((batch,), 100.0 + step_s * i, dtype=torch.float64))
        for i, f in enumerate(frames)
    ]


def frame(time_s: float, value: float = 0.0, valid: bool = True, batch: int = 1) -> BEVMemory:
    return BEVMemory(
        torch.full((batch, 2, 3, 3), value),
        torch.eye(4).double().expand(batch, 4, 4),
        torch.full((batch,), time_s).double(),
        torch.full((batch,), valid),
    )


def times(memory: BEVMemory) -> list[float]:
    return [float(f.timestamps_s[0]) for f in memory.frames]


@torch.no_grad()
@pytest.mark.parametrize("past", [1, 3])
def test_streaming_equals_recomputing(past: int) -> None:
    model = fusion_model(past=past)
    frames = drive(7)
    memory: BEVMemory | None = None
    for index, now in enumerate(frames):
        streamed, memory = model(now, memory)
        anew: BEVMemory | None = None
        for earlier in frames[max(0, index - past) : index]:
            bev = model.encode(model.image_features(earlier), earlier, None)
            anew = model.temporal.remember(bev, earlier, anew)
        recomputed, _ = model(now, anew)
        assert_same(streamed, recomputed, 1e-12)
        assert len(memory.frames) == min(index + 1, past)


@torch.no_grad()
def test_each_remembered_frame_matters() -> None:
    model = fusion_model()
    frames = drive(4)
    outputs = []
    for dropped in (None, 0, 1, 2):
        memory = None
        for index, earlier in enumerate(frames[:3]):
            bev = model.encode(model.image_features(earlier), earlier, None)
            memory = model.temporal.remember(bev, earlier, memory, torch.tensor([index != dropped]))
        outputs.append(model(frames[3], memory)[0].bev)
    for other in outputs[1:]:
        assert (outputs[0] - other).abs().max() > 1e-4


@torch.no_grad()
def test_a_residual_fusion_begins_as_the_single_frame_model() -> None:
    model = tiny_model(fusion_config())
    first, second = drive(2)
    _, memory = model(first)
    assert torch.equal(model(second, memory)[0].bev, model(second)[0].bev)


@torch.no_grad()
def test_batch_with_mixed_history_equals_singles() -> None:
    model = fusion_model()
    frames = drive(5, batch=3)
    # Sample 0 has all its history, sample 1 none, sample 2 lacks its second and has a longer gap.
    seen = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 0, 1], [1, 0, 1]], dtype=torch.bool)
    memory: BEVMemory | None = None
    singles: list[BEVMemory | None] = [None, None, None]
    for now, valid in zip(frames[:4], seen, strict=True):
        bev = model.encode(model.image_features(now), now, None)
        bev[~valid] = float("nan")  # whatever a placeholder holds must not leak
        poses = now.bev_to_global.clone()
        poses[~valid] = float("nan")
        memory = model.temporal.remember(bev, replace(now, bev_to_global=poses), memory, valid)
        for b in range(3):
            if valid[b]:
                one = take(now, b)
                alone = model.encode(model.image_features(one), one, None)
                singles[b] = model.temporal.remember(alone, one, singles[b])
    outputs, _ = model(frames[4], memory)
    for b in range(3):
        assert_same(select(outputs, b), model(take(frames[4], b), singles[b])[0], 1e-9)


@torch.no_grad()
def test_forgetting_a_sample_forgets_all_its_frames() -> None:
    model = fusion_model()
    frames = drive(4, batch=2)
    memory = None
    for now in frames[:3]:
        _, memory = model(now, memory)
    outputs, _ = model(frames[3], memory.keep(torch.tensor([True, False])))
    assert_same(select(outputs, 1), model(take(frames[3], 1))[0])


@torch.no_grad()
def test_a_pose_jump_is_as_no_history_to_a_fusion_that_sees_coverage() -> None:
    model = fusion_model()
    first, second = drive(2)
    _, memory = model(first)
    memory = replace(memory, bev_to_global=planar_pose(1e6, 1e6, 2.0)[None])
    assert_same(model(second, memory)[0], model(second)[0], 1e-12)


def test_cells_from_outside_are_marked() -> None:
    grid = BEVGrid(-4, 4, -4, 4, 8, 8)

    class Spy(FusionNetwork):
        def forward(self, maps: list[Tensor], coverages: list[Tensor], current: int) -> Tensor:
            self.seen = (maps, coverages)
            return super().forward(maps, coverages, current)

    spy = Spy(1, 2)
    now = BEVMemory(
        torch.ones(1, 1, 8, 8), torch.eye(4).double()[None], torch.ones(1).double(), torch.tensor([True])
    )
    earlier = replace(now, bev_to_global=planar_pose(-3.0, 0, 0)[None])  # the car drove 3 m ahead
    fuse_memory(spy, grid, now, [earlier], 1, "zeros")
    maps, coverages = spy.seen
    assert torch.equal(coverages[0][0], torch.tensor([[1.0] * 5 + [0.0] * 3] * 8))
    assert torch.equal(maps[0][0, 0], coverages[0][0])


def chosen(memory: BEVMemory, now_s: float, past: int, future: int, interval_s: float) -> list[float | None]:
    """Times of the first sample's frames, slot by slot; the frames that are picked must be those."""
    now = torch.full((len(memory.valid),), now_s).double()
    choice = select_slots(memory, now, past, future, interval_s)
    index, there = choice.index[:, 0].tolist(), choice.filled[:, 0].tolist()
    found = [times(memory)[i] if valid else None for i, valid in zip(index, there, strict=True)]
    picked = gather_slots(memory, choice)
    assert found == [float(f.timestamps_s[0]) if f.valid[0] else None for f in picked]
    return found


def test_choice_without_interval() -> None:
    memory = frame(3.0).with_older([frame(2.5), frame(2.0, valid=False), frame(1.0)])
    assert chosen(memory, 3.5, 4, 0, 0.0) == [None, 1.0, 2.5, 3.0]
    assert chosen(memory, 2.7, 1, 1, 0.0) == [2.5, 3.0]
    assert chosen(frame(1.0, valid=False, batch=2), 2.0, 1, 1, 0.0) == [None, None]
    assert chosen(frame(1.0), 2.0, 3, 2, 0.0) == [None, None, 1.0, None, None]


def test_choice_by_interval_and_a_gap() -> None:
    frames = [frame(10.0 - 0.5 * k) for k in range(10) if k not in (3, 4, 5)]
    assert chosen(frames[0].with_older(frames[1:]), 10.5, 3, 0, 1.0) == [7.0, 9.0, 9.5]
    assert chosen(frame(1.0), 9.0, 1, 0, 2.0) == [None]


def test_samples_choose_and_forget_for_themselves() -> None:
    """Two samples of other times in one memory are as two memories."""

    def one(stamps: list[float], rate: float) -> list[BEVMemory]:
        return [frame(rate * t, value=rate * t, valid=t != 3.0) for t in stamps]

    def both(a: BEVMemory, b: BEVMemory) -> BEVMemory:
        parts = [torch.cat((getattr(a, n), getattr(b, n))) for n in ("features", "bev_to_global")]
        return BEVMemory(*parts, torch.cat((a.timestamps_s, b.timestamps_s)), torch.cat((a.valid, b.valid)))

    stamps = [float(t) for t in range(9)]
    for interval_s in (0.0, 0.8):
        singles: list[BEVMemory | None] = [None, None]
        batch: BEVMemory | None = None
        for a, b in zip(one(stamps, 0.2), one(stamps, 0.9), strict=True):
            singles = [push(m, now, 3, interval_s) for m, now in zip(singles, (a, b), strict=True)]
            batch = push(batch, both(a, b), 3, interval_s)
        now = torch.tensor([0.2 * 9, 0.9 * 9]).double()
        picked = gather_slots(batch, select_slots(batch, now, 3, 0, interval_s))
        for b, single in enumerate(singles):
            assert single is not None
            mine = gather_slots(single, select_slots(single, now[b : b + 1], 3, 0, interval_s))
            assert any(bool(f.valid) for f in mine)
            for alone, together in zip(mine, picked, strict=True):
                assert bool(alone.valid[0]) == bool(together.valid[b])
                if bool(alone.valid[0]):
                    assert torch.equal(alone.features[0], together.features[b])
                    assert alone.timestamps_s[0] == together.timestamps_s[b]


@pytest.mark.parametrize("rate_hz", [2.0, 12.0, 20.0])
def test_memory_with_interval_is_bounded_and_serves_every_slot(rate_hz: float) -> None:
    memory: BEVMemory | None = None
    for index in range(int(30 * rate_hz)):
        now = frame(index / rate_hz)
        if memory is not None and index / rate_hz > 9.0:
            found = chosen(memory, index / rate_hz, 4, 0, 2.0)[::-1]
            ages = [index / rate_hz - time_s for time_s in found if time_s is not None]
            assert len(ages) == 4
            assert all(abs(age - 2.0 * (k + 1)) <= 0.26 for k, age in enumerate(ages))
        memory = push(memory, now, 4, 2.0)
    assert memory is not None
    assert len(memory.frames) <= 5 * 4.5 + 2


def test_memory_without_interval_keeps_what_is_needed() -> None:
    memory: BEVMemory | None = None
    for index in range(6):
        memory = push(memory, frame(float(index)), 3, 0.0)
    assert times(memory) == [5.0, 4.0, 3.0]
    assert times(push(memory, frame(6.0), 0, 0.0)) == [6.0]


@torch.no_grad()
def test_future_frames() -> None:
    model = fusion_model(past=1, future=1)
    frames = drive(3)
    memories = [model(f)[1] for f in frames]
    both = memories[2].with_older([memories[0]])
    outputs, _ = model(frames[1], both)
    for lacking in (memories[0], memories[2], None):
        assert (outputs.bev - model(frames[1], lacking)[0].bev).abs().max() > 1e-5


@torch.no_grad()
def test_batch_of_the_published_form() -> None:
    model = fusion_model(mode="fusion_published", past=2)
    frames = drive(2, batch=2)
    _, memory = model(frames[0])
    outputs, _ = model(frames[1], memory.keep(torch.tensor([False, True])))
    assert outputs.bev.isfinite().all()
    _, one = model(take(frames[0], 1))
    assert_same(select(outputs, 1), model(take(frames[1], 1), one)[0])
    assert_same(select(outputs, 0), model(take(frames[1], 0))[0])


@torch.no_grad()
def test_calibration_for_another_bev_frame() -> None:
    frames = random_frames(2)
    pose = torch.stack([planar_pose(4.0, 1.0, 0.9), planar_pose(-2.0, 0.5, -0.4)])
    moved = seen_from(frames, pose)
    point = torch.tensor([3.0, -2.0, 1.0, 1.0], dtype=torch.float64)
    in_global = pose @ point
    own = torch.linalg.solve(frames.bev_to_global, in_global[..., None])
    torch.testing.assert_close((moved.bev_to_image @ point), (frames.bev_to_image @ own[:, None]).squeeze(-1))
    assert torch.equal(seen_from(frames, frames.bev_to_global).bev_to_global, frames.bev_to_global)


def queue(frames: list[CameraFrames], valid: list[list[bool]]) -> Batch:
    return Batch(frames[:-1], torch.tensor(valid), frames[-1], None, ["t"], ["s"])


def test_training_does_not_reach_through_the_history() -> None:
    model = fusion_model().train()
    frames = drive(4)
    for now in frames:
        now.images.requires_grad_()
    memory = memory_from_history(model, queue(frames, [[False, True, True]]), model.config.temporal)
    outputs, _ = model(frames[3], memory)
    outputs.bev.sum().backward()
    assert [f.images.grad is not None for f in frames] == [False, False, False, True]
    assert model.training


@torch.no_grad()
def test_history_encoded_in_the_current_frame_is_not_warped() -> None:
    model = fusion_model()
    frames = drive(3)
    settings = TemporalConfig(mode="fusion_published", past=3)
    memory = memory_from_history(model, queue(frames, [[True, True]]), settings)
    assert all(torch.equal(f.bev_to_global, frames[2].bev_to_global) for f in memory.frames)


def test_settings_that_contradict() -> None:
    with pytest.raises(ConfigError, match=r"temporal\.past must be 0 to 1000, got -"):
        TemporalConfig(past=-1)
    config = tiny_config(alignment="published")
    with pytest.raises(ConfigError, match=r"temporal\.mode=fusion goes without"):
        replace(config, temporal=TemporalConfig(mode="fusion"))
    assert tiny_model(fusion_config(past=0)).fusion is None
