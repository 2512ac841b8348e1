"""Streams of training: the order of samples, and memory that goes from step to step."""

from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bevperception.checkpoints.weights import AVERAGE_KEY, read_checkpoint
from bevperception.config import DataConfig
from bevperception.data.dataset import collate
from bevperception.errors import ConfigError
from bevperception.structures import Batch
from bevperception.training import stream as stream_module
from bevperception.training.module import TrainingModule
from bevperception.training.run import train
from bevperception.training.sampler import RunShare
from bevperception.training.stream import StreamMemory, StreamSampler
from tests.training.standin import TinyModel, TinyScenes, TinySource, no_evaluation, tiny_config

SCENES = (9, 1, 4, 40)


def lanes(sampler: StreamSampler) -> list[list[tuple[int, int]]]:
    """What each slot plays."""
    return [list(lane) for lane in zip(*sampler, strict=True)]


@given(st.lists(st.integers(0, 13), min_size=1, max_size=5).filter(sum), st.integers(1, 9), st.integers(0, 3))
def test_every_epoch_holds_every_sample_once(scenes: list[int], length: int, seed: int) -> None:
    samples = sum(scenes)
    share = RunShare(1, steps=3 * samples, seed=seed)
    order = [index for ((index, _),) in StreamSampler(scenes, length, share)]
    for start in range(0, len(order), samples):
        assert sorted(order[start : start + samples]) == list(range(samples))


def test_slots_play_their_segments_frame_by_frame() -> None:
    starts = [sum(SCENES[:i]) for i in range(len(SCENES))]
    for lane in lanes(StreamSampler(SCENES, 6, RunShare(3, steps=60, seed=2))):
        lengths = Counter(segment for _, segment in lane)
        assert max(lengths.values()) <= 6
        for (before, segment), (index, next_segment) in pairwise(lane):
            if segment == next_segment:
                assert index == before + 1
                assert index not in starts
    pairs = list(chain.from_iterable(StreamSampler(SCENES, 6, RunShare(3, steps=60, seed=2))))
    assert len(set(pairs)) == len(pairs) == 180  # no sample comes twice with the same draw
    assert max(Counter(index for index, _ in pairs).values()) <= 180 // sum(SCENES) + 2


def test_groups_of_slots_take_turns() -> None:
    turns = 3
    batches = list(StreamSampler(SCENES, 6, RunShare(2, steps=61, seed=2), turns=turns))
    assert len(batches) == 61
    for turn in range(turns):
        for slot in range(2):
            lane = [batch[slot] for batch in batches[turn::turns]]
            goes_on = [b == (a[0] + 1, a[1]) for a, b in pairwise(lane)]
            changes = [a[1] != b[1] for a, b in pairwise(lane)]
            assert all(a != b for a, b in zip(goes_on, changes, strict=True))
            assert sum(goes_on) > len(lane) / 2
    segments = [{segment for _, segment in batch} for batch in batches]
    for first, second, third in zip(segments, segments[1:], segments[2:], strict=False):
        assert not (first & second) | (first & third)
    pairs = list(chain.from_iterable(batches))
    assert len(set(pairs)) == len(pairs)
    assert max(Counter(index for index, _ in pairs).values()) <= 122 // sum(SCENES) + 2


@pytest.mark.parametrize(("accumulate", "turns"), [(1, 1), (2, 1), (2, 3)])
def test_processes_share_the_slots(accumulate: int, turns: int) -> None:
    shared: dict[str, Any] = {"steps": 9, "accumulate": accumulate, "seed": 1}
    whole = list(StreamSampler(SCENES, 5, RunShare(4, **shared), turns))
    parts = [
        list(StreamSampler(SCENES, 5, RunShare(2, **shared, rank=rank, world_size=2), turns))
        for rank in (0, 1)
    ]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("turns", [1, 4])
@pytest.mark.parametrize("first_step", [0, 1, 8, 9])
def test_resuming_goes_on_within_segments(first_step: int, turns: int) -> None:
    settings: dict[str, Any] = {"steps": 9, "accumulate": 2, "seed": 4, "rank": 1, "world_size": 2}
    whole = list(StreamSampler(SCENES, 5, RunShare(2, **settings), turns))
    rest = StreamSampler(SCENES, 5, RunShare(2, **settings, first_step=first_step), turns)
    assert list(rest) == whole[2 * first_step :]
    assert len(rest) == len(whole) == 18


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        StreamSampler([0, 0], 3, RunShare(1, steps=1))


def batch_of(*indices: int) -> Batch:
    batch = collate([TinyScenes(scene_lengths=(40, 40), samples=80)[index, 0] for index in indices])
    assert isinstance(batch, Batch)
    return batch


def at(batch: Batch, *times_s: float) -> Batch:
    """The batch at other times."""
    batch.frames.timestamps_s = torch.tensor(times_s, dtype=torch.float64)
    return batch


def test_memory_is_that_of_the_frame_before() -> None:
    model, stream = TinyModel(), StreamMemory(2)
    first, second = batch_of(3, 47), batch_of(4, 48)
    assert stream.memory_for(first) is None
    _, memory = model(first.frames, None)
    stream.remember(first, memory)
    recalled = stream.memory_for(second)
    assert recalled is not None
    assert recalled.valid.tolist() == [True, True]
    assert torch.equal(recalled.features, memory.features)
    assert not recalled.features.requires_grad
    assert stream.memory_for(second, turn=1) is None, "another turn's slots"
    stream.remember(batch_of(20, 41), model(batch_of(20, 41).frames, None)[1], turn=1)
    assert torch.equal(stream.memory_for(second).features, memory.features)
    stream.forget()
    assert stream.memory_for(second) is None


@pytest.mark.parametrize(
    ("index", "time_s", "remembers"),
    [
        (4, 2.0, True),
        (44, 2.0, False),  # another scene, just as late
        (4, 3.5, True),
        (4, 3.501, False),  # more than two seconds
        (4, 1.5, False),  # the same instant
        (4, 1.0, False),  # the clock goes back
    ],
)
def test_memory_is_forgotten_elsewhere(index: int, time_s: float, remembers: bool) -> None:
    """Next to a slot that goes on."""
    stream, before = StreamMemory(2), at(batch_of(3, 60), 1.5, 10.0)
    stream.remember(before, TinyModel()(before.frames, None)[1])
    recalled = stream.memory_for(at(batch_of(index, 61), time_s, 10.5))
    assert recalled is not None
    assert recalled.valid.tolist() == [remembers, True]


def test_a_checkpoints_memory_goes_to_the_process_that_had_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes' memory, in order of rank; other numbers of processes or slots start anew."""
    states, firsts = [], (batch_of(3, 47), batch_of(20, 60))
    for first in firsts:
        stream = StreamMemory(2)
        stream.remember(first, TinyModel()(first.frames, None)[1], turn=1)
        states += stream.state()
    alone = StreamMemory(2)
    alone.load_state(states)
    assert alone.memory_for(batch_of(4, 48), turn=1) is None
    monkeypatch.setattr(stream_module, "world_size", lambda: 2)
    for rank, following in enumerate((batch_of(4, 48), batch_of(21, 61))):
        monkeypatch.setattr(stream_module, "rank", lambda rank=rank: rank)
        own, narrow = StreamMemory(2), StreamMemory(1)
        own.load_state(states)
        narrow.load_state(states)
        recalled = own.memory_for(following, turn=1)
        assert recalled is not None
        assert recalled.timestamps_s.tolist() == firsts[rank].frames.timestamps_s.tolist()
        assert own.memory_for(following) is None
        assert narrow.memory_for(batch_of(4), turn=1) is None


@pytest.mark.parametrize("turns", [1, 2])
def test_a_step_sees_what_a_model_that_drives_sees(turns: int) -> None:
    torch.manual_seed(3)
    module = TrainingModule(tiny_config(stream_length=3, stream_turns=turns, accumulate=6), TinyModel())
    found = []
    for i in range(3):
        found.append(module._forward(module.model, batch_of(i, 40 + i), turns * i).bev)
        if turns == 2:
            module._forward(module.model, batch_of(20 + i, 70 - i), turns * i + 1)  # others in between
    memory = None
    for i, bev in enumerate(found):
        outputs, memory = module.model(batch_of(i, 40 + i).frames, memory)
        torch.testing.assert_close(bev, outputs.bev)
    alone, _ = module.model(batch_of(2, 42).frames, None)
    assert not torch.allclose(found[2], alone.bev)


@pytest.mark.parametrize("turns", [1, 2])
def test_a_resumed_stream_equals_the_uninterrupted_one(tmp_path: Path, turns: int) -> None:
    config = tiny_config(steps=8, ema_decay=0.9, checkpoint_every=3, stream_length=3, stream_turns=turns)
    source = TinyScenes()
    for part, resume in (("whole", None), ("rest", str(tmp_path / "whole/checkpoints/step-00000003.ckpt"))):
        torch.manual_seed(0)
        train(config, TinyModel(dropout=0.3), source, no_evaluation, tmp_path / part, resume)
    last = "checkpoints/step-00000008.ckpt"
    whole, rest = (read_checkpoint(tmp_path / part / last) for part in ("whole", "rest"))
    for key in ("state_dict", AVERAGE_KEY):
        for name, value in whole[key].items():
            torch.testing.assert_close(value, rest[key][name], rtol=1e-6, atol=1e-6, msg=name)


def test_streams_need_scenes_and_no_queues(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set data\.history=0"):
        DataConfig(stream_length=4, history=3)
    with pytest.raises(ConfigError, match="stand in scenes"):
        train(tiny_config(stream_length=3), TinyModel(), TinySource(), no_evaluation, tmp_path)
