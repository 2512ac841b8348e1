"""Counting the sets that a soak's results come from."""

from __future__ import annotations

import pytest

from tools.ros_soak import count_sets


@pytest.mark.parametrize(
    ("stamps_ns", "sets"),
    [
        ([], 0),
        ([7], 1),
        ([0, 500, 1000, 1500], 4),
        ([0, 500, 2000, 2490, 3000], 7),  # two are missing
        ([0, 500, 640, 1140, 1640], 5),  # one came early: nothing more was there than results
        ([3, 3], 2),
    ],
)
def test_sets_are_counted_by_the_gaps_between_results(stamps_ns: list[int], sets: int) -> None:
    assert count_sets(stamps_ns) == sets
