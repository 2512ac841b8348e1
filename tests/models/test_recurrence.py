"""The frame that a recurrent model goes on from, at any rate of frames."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from bevperception.config_model import TemporalConfig
from bevperception.errors import ConfigError
from bevperception.models.bev.memory import frame_before, select_slots
from bevperception.models.bevformer import BEVFormer
from bevperception.structures import BEVMemory, CameraFrames
from tests.models.builders import random_frames, tiny_config, tiny_model


def frame(*times_s: float, valid: bool = True) -> BEVMemory:
    """A frame of samples at these times, whose features are the times."""
    stamps = torch.tensor(times_s, dtype=torch.float64)
    features = stamps[:, None, None, None].expand(-1, 1, 2, 3)
    return BEVMemory(
        features, torch.eye(4).double().expand(len(stamps), 4, 4), stamps, torch.full(stamps.shape, valid)
    )


def test_each_sample_goes_on_from_the_frame_an_interval_ago() -> None:
    memory = frame(10.0, 20.0, 5.0).with_older(
        [frame(9.8, 19.9, 4.9), frame(9.4, 19.5, 4.8), frame(9.3, 19.4, 4.7)]
    )
    found = frame_before(memory, torch.tensor([10.0, 20.1, 5.1]).double(), 0.5)
    assert found.valid.tolist() == [True, True, True]
    assert found.timestamps_s.tolist() == [9.4, 19.5, 4.7]
    assert found.features[:, 0, 1, 2].tolist() == [9.4, 19.5, 4.7]
    assert frame_before(memory, torch.zeros(3).double(), 0.0).timestamps_s.tolist() == [10.0, 20.0, 5.0]


@pytest.mark.parametrize("ages_s", [(0.5,), (0.2,), (0.8,), (0.1, 0.3, 0.74), (0.1, 0.9), (0.45, 0.55)])
def test_it_is_the_choice_of_a_fusion_of_one(ages_s: tuple[float, ...]) -> None:
    frames = [frame(10.0 - age) for age in ages_s]
    memory, now = frames[0].with_older(frames[1:]), torch.tensor([10.0]).double()
    choice = select_slots(memory, now, 1, 0, 0.5)
    found = frame_before(memory, now, 0.5)
    off_s = {age: abs(age - 0.5) for age in ages_s}
    nearest = min(off_s, key=lambda age: off_s[age])
    assert bool(choice.filled) == bool(found.valid) == (off_s[nearest] <= 0.25)
    if bool(found.valid):
        assert found.timestamps_s[0] == frames[int(choice.index)].timestamps_s[0] == 10.0 - nearest


def test_forgotten_frames_are_not_gone_on_from() -> None:
    memory = frame(9.9).with_older([frame(9.5, valid=False), frame(9.3)])
    assert frame_before(memory, torch.tensor([10.0]).double(), 0.5).timestamps_s.tolist() == [9.3]


def interval_model() -> tuple[BEVFormer, BEVFormer]:
    """A model with an interval, and the same without."""
    config = tiny_config()
    spaced = tiny_model(dataclasses.replace(config, temporal=TemporalConfig(interval_s=0.5)))
    plain = tiny_model(config)
    plain.load_state_dict(spaced.state_dict())
    return spaced, plain


def drive(rate_hz: float, frames: int, batch: int = 2) -> list[CameraFrames]:
    """Random frames at a rate."""
    return [
        dataclasses.replace(
            random_frames(batch, seed=index), timestamps_s=torch.full((batch,), index / rate_hz).double()
        )
        for index in range(frames)
    ]


def codes(model: BEVFormer, frames: list[CameraFrames]) -> list[Tensor]:
    """Box codes of every frame, streaming."""
    memory, found = None, []
    for now in frames:
        outputs, memory = model(now, memory)
        found.append(outputs.detection.box_codes)
    return found


@torch.no_grad()
def test_at_its_own_rate_nothing_changes() -> None:
    spaced, plain = interval_model()
    frames = drive(2.0, 4)
    for one, other in zip(codes(spaced, frames), codes(plain, frames), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rate_hz", [4.0, 6.0, 10.0])
@torch.no_grad()
def test_at_a_higher_rate_frames_half_a_second_ago_are_gone_on_from(rate_hz: float) -> None:
    spaced, plain = interval_model()
    frames = drive(rate_hz, 9)
    memories: list[BEVMemory] = []
    for index, found in enumerate(codes(spaced, frames)):
        off_s = [abs((index - earlier) / rate_hz - 0.5) for earlier in range(index)]
        best = min(reversed(range(index)), key=lambda k: off_s[k], default=None)
        before = memories[best] if best is not None and off_s[best] <= 0.25 else None
        outputs, memory = plain(frames[index], before)
        torch.testing.assert_close(found, outputs.detection.box_codes, rtol=0, atol=1e-12)
        memories.append(memory)


@torch.no_grad()
def test_a_gap_is_as_no_history() -> None:
    spaced, plain = interval_model()
    frames = drive(2.0, 4)
    found = codes(spaced, [frames[0], frames[3]])
    torch.testing.assert_close(found[1], plain(frames[3])[0].detection.box_codes, rtol=0, atol=1e-12)


def test_the_memory_stays_small_at_any_rate() -> None:
    spaced, _ = interval_model()
    memory = None
    for now in drive(30.0, 60, batch=1):
        bev = torch.zeros(1, 32, spaced.config.bev.rows, spaced.config.bev.columns)
        memory = spaced.temporal.remember(bev, now, memory)
    assert 4 <= len(memory.frames) <= 10


def test_an_interval_goes_without_the_published_alignment() -> None:
    with pytest.raises(ConfigError, match=r"interval_s goes without"):
        dataclasses.replace(tiny_config(alignment="published"), temporal=TemporalConfig(interval_s=0.5))
