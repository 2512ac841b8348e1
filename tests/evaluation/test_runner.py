"""Sharing scenes among processes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bevperception.evaluation.runner import share_scenes


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 9))
def test_every_scene_goes_to_one_process_and_loads_are_even(lengths: list[int], processes: int) -> None:
    shares = share_scenes(lengths, processes)
    assert len(shares) == processes
    assert sorted(scene for share in shares for scene in share) == list(range(len(lengths)))
    loads = [sum(lengths[scene] for scene in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    assert all(share == sorted(share) for share in shares)
