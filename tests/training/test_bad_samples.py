"""Unreadable samples that are skipped: what is trained instead, and what a stream remembers over the gap."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bevperception.data.loading import Fetcher, OnBad, collate_or_fail
from bevperception.structures import BadSample, Batch, BEVMemory, CameraFrames, ModelOutputs, Targets
from bevperception.training import module as training_module
from bevperception.training.module import TrainingModule
from bevperception.training.run import train
from bevperception.training.stream import StreamMemory
from tests.processes import as_processes
from tests.training.standin import TinyModel, TinyScenes, TinySource, no_evaluation, tiny_config

WHOLE = 10_000
"""Length of a segment that leaves scenes in one piece."""
Seen = list[tuple[int, int | None]]
"""Of one micro-batch: each sample that counts, and the sample that its memory is of."""


class Diary(TinyModel):
    """Notes what it learns from; samples of one scene are half a second apart."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.seen: list[Seen] = []
        self._remembered: list[int | None] = []

    def forward(
        self, frames: CameraFrames, memory: BEVMemory | None = None
    ) -> tuple[ModelOutputs, BEVMemory]:
        self._remembered = [None] * frames.batch_size
        if memory is not None:
            indices = (memory.timestamps_s * 2).long().tolist()
            self._remembered = [
                i if valid else None for i, valid in zip(indices, memory.valid.tolist(), strict=True)
            ]
        return super().forward(frames, memory)

    def losses(self, outputs: ModelOutputs, targets: Targets, reduce_mean: Any) -> dict[str, Tensor]:
        indices = (targets.segmentation[:, 0, 0, 0] * self.samples).round().long().tolist()
        counts = float(reduce_mean(torch.ones(()))) > 0
        self.seen.append(list(zip(indices, self._remembered, strict=True)) if counts else [])
        return super().losses(outputs, targets, reduce_mean)


def learned(out: Path, bad: set[int], samples: int, **settings: Any) -> list[Seen]:
    """What a run of one scene learns from, micro-batch by micro-batch."""
    config = tiny_config(**{"stream_length": WHOLE, "batch_size": 1, "steps": samples, **settings})
    config.data.bad_samples = "skip"
    model = Diary(samples)
    train(
        config, model, TinyScenes(samples, bad=frozenset(bad), scene_lengths=(samples,)), no_evaluation, out
    )
    return model.seen


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({5}, [(3, 2), (4, 3), None, (6, 4), (7, 6), (8, 7)]),
        ({5, 6}, [(3, 2), (4, 3), None, None, (7, 4), (8, 7)]),
        ({3, 7}, [None, (4, 2), (5, 4), (6, 5), None, (8, 6)]),
        ({4, 5, 6, 7}, [(3, 2), None, None, None, None, (8, None)]),  # more than two seconds
    ],
)
def test_a_stream_goes_on_after_bad_samples(
    tmp_path: Path, bad: set[int], expected: list[tuple[int, int | None] | None]
) -> None:
    seen = learned(tmp_path, bad, 9)
    assert seen[:3] == [[(0, None)], [(1, 0)], [(2, 1)]]
    assert seen[3:] == [[] if sample is None else [sample] for sample in expected]


def test_the_ends_of_a_segment_may_be_bad(tmp_path: Path) -> None:
    seen = learned(tmp_path, {0, 4}, 5, steps=10)
    epoch: list[Seen] = [[], [(1, None)], [(2, 1)], [(3, 2)], []]
    assert seen == epoch + epoch


def test_a_step_of_bad_samples_alone_has_no_gradient(tmp_path: Path) -> None:
    learned(tmp_path, {2}, 4)
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = [row["train/gradient_norm"] for row in csv.DictReader(file)]
    assert [float(norm) > 0.0 for norm in rows if norm] == [True, True, False, True]


@pytest.mark.parametrize(
    ("settings", "first_slot", "bad"),
    [
        ({"accumulate": 2, "steps": 4}, [0, 1, 2, 3, 4, 5, 6, 7], {1, 4, 5}),
        ({"stream_turns": 2, "accumulate": 2, "steps": 5}, [0, 1, 2, 3, 4], {3}),
    ],
)
def test_slots_are_apart_and_turns_too(
    tmp_path: Path, settings: dict[str, Any], first_slot: list[int], bad: set[int]
) -> None:
    """Two scenes' slots in one batch; every slot goes on by itself, whoever else is missing."""
    config = tiny_config(**{"stream_length": WHOLE, "batch_size": 2, **settings})
    config.data.bad_samples = "skip"
    turns, length = config.data.stream_turns, len(first_slot)
    model = Diary(4 * length)
    scenes = TinyScenes(4 * length, bad=frozenset(bad), scene_lengths=(length,) * 4)
    train(config, model, scenes, no_evaluation, tmp_path)
    batches = len(model.seen)
    assert batches == length * turns
    for turn in range(turns):
        mine = model.seen[turn::turns]
        found = sorted(index for batch in mine for index, _ in batch)
        played = {index // length for index in found}
        assert len(played) == 2
        assert found == [
            i for s in sorted(played) for i in range(s * length, (s + 1) * length) if i not in bad
        ]
        for batch in mine:
            for index, memory in batch:
                before = [i for i in range(index // length * length, index) if i not in bad]
                # A memory's number is counted in its scene.
                assert memory == (before[-1] % length if before else None)


@pytest.mark.parametrize("workers", [0, 2])
def test_queues_replace_bad_samples_by_any_others(workers: int, tmp_path: Path) -> None:
    """The sample after a bad one is not seen more often than the rest."""
    config = tiny_config(batch_size=20, steps=20)
    config.data.bad_samples, config.data.workers = "skip", workers
    model = Diary(20)
    train(config, model, TinySource(20, history=1, bad=frozenset({5, 6, 19})), no_evaluation, tmp_path)
    assert all(len(batch) == 20 for batch in model.seen)
    often = Counter(index for batch in model.seen for index, _ in batch)
    assert set(often) == set(range(20)) - {5, 6, 19}
    assert sum(often.values()) == 400
    assert max(often.values()) <= 30  # 20 of its own and a share of 60; the neighbour took 60 of them


def fetched(on_bad: OnBad, *indices: int, bad: tuple[int, ...] = (3, 4)) -> Batch:
    source = TinyScenes(9, bad=frozenset(bad), scene_lengths=(9,))
    batch = collate_or_fail(Fetcher(source, on_bad).__getitems__([(index, 7) for index in indices]))
    assert isinstance(batch, Batch)
    return batch


def test_places_say_which_slots_are_filled() -> None:
    batch = fetched("vacate", 2, 3, 8)
    assert (batch.tokens, batch.places) == (["token-2", "token-8"], [0, 2])
    assert [sample.token for sample in batch.skipped] == ["token-3"]
    assert not batch.is_stand_in
    stand_in = fetched("vacate", 3, 4)
    assert (len(stand_in), stand_in.places, stand_in.is_stand_in) == (1, [], True)
    assert {"token-3", "token-4"} <= {sample.token for sample in stand_in.skipped} == {"token-3", "token-4"}
    assert fetched("vacate", 0).places == [0]
    assert fetched("replace", 0, 1).places is None
    whole = Fetcher(TinyScenes(9, bad=frozenset({3})), "leave_out").__getitems__([(3, 0), (0, 0)])
    assert [type(sample) for sample in whole] == [BadSample, Batch]


def with_older(batch: Batch, older: int, fill: float) -> BEVMemory:
    """A memory of several frames, each row of values of its own."""
    count = len(batch)
    frames = [
        BEVMemory(
            torch.arange(count).float().view(count, 1, 1, 1).expand(count, 2, 3, 5) + fill + 100 * k,
            batch.frames.bev_to_global,
            batch.frames.timestamps_s - 0.5 * k,
            torch.ones(count, dtype=torch.bool),
        )
        for k in range(older + 1)
    ]
    return frames[0].with_older(frames[1:])


def test_a_slot_left_out_keeps_its_frames_however_many_the_others_have() -> None:
    stream = StreamMemory(3)
    first, second, third = fetched("vacate", 1, 3, 5), fetched("vacate", 2, 1, 3), fetched("vacate", 3, 2, 6)
    stream.remember(first, with_older(first, 2, 0.0))
    stream.remember(second, with_older(second, 0, 10.0))
    recalled = stream.memory_for(third)
    assert recalled is not None
    # Slot 1 goes on from sample 1, remembered in the second step; slot 2 from 5, of the first.
    assert recalled.timestamps_s.tolist() == [0.5, 2.5]
    assert recalled.valid.tolist() == [True, True]
    assert recalled.features[:, 0, 0, 0].tolist() == [11.0, 1.0]
    assert [frame.valid.tolist() for frame in recalled.older] == [[False, True], [False, True]]
    assert [float(frame.features[1, 0, 0, 0]) for frame in recalled.older] == [101.0, 201.0]
    assert stream.memory_for(fetched("vacate", 3, 4)) is None


def test_memory_of_a_run_that_begins_with_bad_samples() -> None:
    stream = StreamMemory(3)
    first = fetched("vacate", 3, 1, 4)
    stream.remember(fetched("vacate", 3, 4, 3), with_older(first, 0, 0.0))
    assert stream.memory_for(first) is None, "a stand-in is not remembered"
    stream.remember(first, with_older(first, 1, 5.0))
    recalled = stream.memory_for(fetched("vacate", 5, 2, 6))
    assert recalled is not None
    assert recalled.valid.tolist() == [False, True, False]
    assert recalled.features[1, 0, 0, 0] == 5.0


@pytest.mark.parametrize("stand_in", [False, True])
def test_losses_of_two_processes_add_up_where_one_has_a_stand_in(
    stand_in: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one process with all samples: the mean over processes of what each of them contributes."""
    module = TrainingModule(tiny_config(stream_length=9, batch_size=2), TinyModel())
    parts = [fetched("vacate", 1, 2), fetched("vacate", 3, 4) if stand_in else fetched("vacate", 5, 3)]
    whole = fetched("vacate", 1, 2, *(() if stand_in else (5,)))

    def losses(batch: Batch, reduce_mean: Any) -> float:
        monkeypatch.setattr(training_module, "mean_over_processes", reduce_mean)
        outputs, _ = module.model(batch.frames, None)
        return float(module._losses(outputs, batch)["square"].detach())

    found = as_processes([lambda mean, part=part: losses(part, mean) for part in parts])
    assert sum(found) / 2 == pytest.approx(losses(whole, lambda value: value))
    assert (found[1] == 0.0) == stand_in
