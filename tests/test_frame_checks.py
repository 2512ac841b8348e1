"""Checks of one vehicle's frames."""

from __future__ import annotations

import math

import pytest
import torch

from bevperception.frame_checks import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, wrong: float) -> None:
    values = torch.randn(2, 3, 5, 7).to(dtype).transpose(1, 3)
    assert all_finite(values)
    for place in ((0, 0, 0, 0), (1, 3, 2, 1), (1, 6, 4, 2)):
        broken = values.clone()
        broken[place] = wrong
        assert not all_finite(broken)
    assert all_finite(torch.full((1,), torch.finfo(dtype).max, dtype=dtype))
