"""Rows of several samples side by side."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from bevperception.models.padding import pad_rows


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=5), columns=st.integers(0, 3))
def test_as_pad_sequence(counts: list[int], columns: int) -> None:
    rows = torch.randn(sum(counts), *((columns,) if columns else ()))
    torch.testing.assert_close(
        pad_rows(rows, counts), pad_sequence(rows.split(counts), batch_first=True), rtol=0, atol=0
    )


def test_not_finite_rows_stay_in_their_place() -> None:
    rows = torch.tensor([[1.0], [float("nan")]])
    padded = pad_rows(rows, [0, 2, 1 - 1])
    assert padded.isnan().sum() == 1
    assert padded[[0, 2]].eq(0).all()


def test_no_samples_and_wrong_counts() -> None:
    assert pad_rows(torch.zeros(0, 3), []).shape == (0, 0, 3)
    with pytest.raises(ValueError, match="add up to 3, but there are 2 rows"):
        pad_rows(torch.zeros(2), [1, 2])
