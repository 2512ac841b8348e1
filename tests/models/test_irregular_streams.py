"""Memories of vehicles whose frames come at irregular times: a batch is its samples, one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bevperception.geometry import BEVGrid
from bevperception.models.bev.deformable import init_sampling_offsets
from bevperception.models.bev.fusion import FusionNetwork
from bevperception.models.bev.memory import gather_slots, push, select_slots
from bevperception.models.bev.temporal import fuse_memory
from bevperception.models.bevformer import BEVFormer
from bevperception.structures import BEVMemory
from tests.models.builders import random_frames
from tests.models.test_bevformer import assert_same
from tests.models.test_fusion import drive, fusion_model

BATCH, STEPS = 3, 14


def stream(seed: int) -> tuple[Tensor, Tensor]:
    """(STEPS, B) times in seconds, each sample's own and irregular, and whether the sample has the frame."""
    generator = torch.Generator().manual_seed(seed)
    steps_s = torch.rand(STEPS, BATCH, generator=generator, dtype=torch.float64) * 0.4 + 0.02
    return steps_s.cumsum(0), torch.rand(STEPS, BATCH, generator=generator) > 0.2


def single_frame(index: int, time_s: Tensor, valid: Tensor) -> BEVMemory:
    """A frame whose features are its number."""
    features = torch.full((len(time_s), 1, 1, 1), float(index))
    return BEVMemory(features, torch.eye(4).double().expand(len(time_s), 4, 4), time_s, valid)


def chosen_numbers(memory: BEVMemory, now_s: Tensor, past: int, interval_s: float) -> Tensor:
    """(slots, B) number of the frame in each slot; -1 where there is none."""
    slots = gather_slots(memory, select_slots(memory, now_s, past, 0, interval_s))
    return torch.stack([torch.where(s.valid, s.features[:, 0, 0, 0], -1.0) for s in slots])


@pytest.mark.parametrize("interval_s", [0.0, 0.5])
@pytest.mark.parametrize("past", [1, 3])
def test_a_batch_chooses_and_forgets_as_its_samples_do(past: int, interval_s: float) -> None:
    filled = 0
    for seed in range(12):
        times_s, valid = stream(seed)
        together: BEVMemory | None = None
        alone: list[BEVMemory | None] = [None] * BATCH
        for step in range(STEPS - 1):
            together = push(together, single_frame(step, times_s[step], valid[step]), past, interval_s)
            now_s = times_s[step + 1]
            got = chosen_numbers(together, now_s, past, interval_s)
            for b in range(BATCH):
                mine = slice(b, b + 1)
                frame = single_frame(step, times_s[step, mine], valid[step, mine])
                memory = alone[b] = push(alone[b], frame, past, interval_s)
                assert torch.equal(got[:, mine], chosen_numbers(memory, now_s[mine], past, interval_s))
            filled += int((got >= 0).sum())
    assert filled > 100


def small_fusion(frames: int) -> FusionNetwork:
    torch.manual_seed(frames)
    fusion = FusionNetwork(4, frames, inner_channels=4, blocks=1, coverage=False, residual=False).double()
    return fusion.eval()


def some_frame(seed: int, valid: bool, requires_grad: bool = False) -> BEVMemory:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 4, 3, 5, generator=generator, dtype=torch.float64, requires_grad=requires_grad)
    return BEVMemory(
        features,
        torch.eye(4).double()[None],
        torch.tensor([float(seed)]).double(),
        torch.tensor([valid]),
    )


GRID = BEVGrid(-2.5, 2.5, -1.5, 1.5, 3, 5)


@pytest.mark.parametrize("there", [(True, True), (True, False), (False, True), (False, False)])
@torch.no_grad()
def test_the_nearest_frame_stands_in_for_a_missing_one(there: tuple[bool, bool]) -> None:
    """Slots are two past frames and one future frame; one of the past and the future may be missing."""
    fusion = small_fusion(4)
    current, oldest = some_frame(9, True), some_frame(1, True)
    near_past, later = some_frame(2, there[0]), some_frame(3, there[1])
    got = fuse_memory(fusion, GRID, current, [oldest, near_past, later], 2, "nearest")
    maps = [
        oldest.features,
        near_past.features if there[0] else current.features,
        current.features,
        later.features if there[1] else current.features,
    ]
    torch.testing.assert_close(got, fusion(maps, [], 2))


@pytest.mark.parametrize("missing_slot", [0, 1, 2])
def test_no_gradient_goes_through_a_frame_that_stands_in(missing_slot: int) -> None:
    """Two past slots and a future one: beyond an earlier frame, next to the current one on either side."""
    fusion = small_fusion(4)
    current = some_frame(9, True, requires_grad=True)
    frames = [some_frame(seed, True, requires_grad=True) for seed in (1, 2, 3)]
    frames[missing_slot] = some_frame(4, False)
    fuse_memory(fusion, GRID, current, frames, 2, "nearest").square().sum().backward()

    learning = {id(frame): frame.features.detach().clone().requires_grad_() for frame in (*frames, current)}
    stands_in = frames[1] if missing_slot == 0 else current
    slots = [learning[id(frame)] for frame in frames]
    slots[missing_slot] = stands_in.features.detach()
    fusion([*slots[:2], learning[id(current)], slots[2]], [], 2).square().sum().backward()
    for frame in (*frames, current):
        if frame.features.requires_grad:
            torch.testing.assert_close(frame.features.grad, learning[id(frame)].grad)


@torch.no_grad()
def test_a_model_with_an_interval_takes_the_same_frames_at_any_rate() -> None:
    """At 10 Hz the frames half a second and a second ago are fused, as at 2 Hz."""
    model: BEVFormer = fusion_model(past=2, interval_s=0.5)
    key_frames = drive(3, step_s=0.5)
    slow = None
    for now in key_frames:
        wanted, slow = model(now, slow)
    fast = None
    for step in range(11):
        time_s = torch.tensor([100.0 + 0.1 * step], dtype=torch.float64)
        at_hand = key_frames[step // 5] if step % 5 == 0 else random_frames(1, seed=50 + step)
        got, fast = model(replace(at_hand, timestamps_s=time_s), fast)
    assert_same(got, wanted, 1e-12)


def test_every_head_starts_equally_far_out_along_its_direction() -> None:
    """The largest of |x| and |y| is the point's number, also for heads that look along a diagonal."""
    layer = torch.nn.Linear(3, 8 * 2 * 3 * 2)
    init_sampling_offsets(layer, heads=8, groups=2, points=3)
    offsets = layer.bias.detach().view(8, 2, 3, 2)
    steps = torch.tensor(
        [[1.0, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]
    )  # (heads, 2)
    reach = torch.arange(1.0, 4.0)
    wanted = steps[:, None, None] * reach[None, None, :, None]
    torch.testing.assert_close(offsets, wanted.expand(8, 2, 3, 2), rtol=0, atol=1e-5)
