"""The order of training samples."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest

from bevperception.training.sampler import RunShare, StepSampler


def flat(sampler: StepSampler) -> list[tuple[int, int]]:
    return list(chain.from_iterable(sampler))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_every_epoch_holds_every_sample_once(batch_size: int) -> None:
    order = [index for index, _ in flat(StepSampler(7, RunShare(batch_size, steps=21, seed=3)))]
    for start in range(0, len(order) - 6, 7):
        assert sorted(order[start : start + 7]) == list(range(7))
    assert order[:7] != order[7:14]


def test_draws_never_repeat() -> None:
    draws = [draw for _, draw in flat(StepSampler(5, RunShare(2, steps=20)))]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_share_the_global_batch(accumulate: int) -> None:
    whole = list(StepSampler(7, RunShare(4, steps=9, accumulate=accumulate, seed=1)))
    parts = [
        list(StepSampler(7, RunShare(2, steps=9, accumulate=accumulate, seed=1, rank=rank, world_size=2)))
        for rank in (0, 1)
    ]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_accumulation_sees_what_a_larger_batch_sees() -> None:
    accumulated = StepSampler(7, RunShare(1, steps=9, accumulate=4))
    assert flat(accumulated) == flat(StepSampler(7, RunShare(4, steps=9)))


@pytest.mark.parametrize("first_step", [0, 1, 3, 8, 9])
def test_resuming_goes_on_in_the_middle_of_an_epoch(first_step: int) -> None:
    share = RunShare(2, steps=9, accumulate=2, seed=4, rank=1, world_size=2)
    whole, rest = StepSampler(5, share), StepSampler(5, replace(share, first_step=first_step))
    assert list(rest) == list(whole)[2 * first_step :]
    assert len(rest) == len(whole) == 18


def test_the_seed_changes_the_order() -> None:
    zero, one = (StepSampler(50, RunShare(1, steps=50, seed=seed)) for seed in (0, 1))
    assert flat(zero) != flat(one)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        StepSampler(0, RunShare(1, steps=1))
