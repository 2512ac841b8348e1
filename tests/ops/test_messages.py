"""Arguments that do not fit: the rule, what came, the likely cause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bevperception.ops import dcnv3, ms_deform_attn
from tests.ops.problems import AttentionProblem, ConvolutionProblem

SHAPES = AttentionProblem().shapes


def attention(**changes: Any) -> Tensor:
    value, locations, weights = AttentionProblem().tensors()
    arguments = {
        "value": value,
        "spatial_shapes": SHAPES,
        "sampling_locations": locations,
        "attention_weights": weights,
    }
    return ms_deform_attn(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": torch.zeros(2, 30, 21)}, r"value must have 4 dimensions.*got shape \(2, 30, 21\)"),
        ({"spatial_shapes": ((4, 6),)}, r"as many cells as the levels.*\(24\); got value \(2, 30, 3, 7\)"),
        ({"spatial_shapes": ()}, "at least one"),
        ({"spatial_shapes": ((4, 6), (0, 2))}, "all positive"),
        ({"sampling_locations": torch.zeros(2, 5, 3, 1, 3, 2).double()}, r"shape \(2, 5, 3, 2, 3, 2\)"),
        ({"attention_weights": torch.zeros(2, 5, 3, 2, 4).double()}, "without its last dimension"),
        ({"attention_weights": torch.zeros(2, 5, 3, 6).double()}, "attention_weights must have 5 dimensions"),
        ({"value": torch.zeros(2, 30, 3, 7).long()}, "value torch.int64.*integers"),
        ({"value": torch.zeros(2, 30, 3, 7)}, "float64 may not be mixed"),
        ({"value": torch.zeros(2, 30, 3, 7, device="meta").double()}, "on one device; got value on meta"),
    ],
)
def test_ms_deform_attn(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)ms_deform_attn: .*{message}"):
        attention(**changes)


def convolution(**changes: Any) -> Tensor:
    input, offset, mask = ConvolutionProblem().tensors()
    arguments = {"input": input, "offset": offset, "mask": mask, "groups": 3}
    return dcnv3(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": torch.zeros(2, 5, 7)}, "input must have 4 dimensions"),
        ({"groups": 2}, "multiple of groups; got 15 channels and 2 groups.*channels last"),
        ({"groups": 0}, "at least 1"),
        ({"stride": 2}, r"offset must have shape \(2, 3, 4, 54\)"),
        ({"mask": torch.zeros(2, 5, 7, 24).double()}, r"mask must have shape \(2, 5, 7, 27\)"),
        ({"kernel_size": 4, "remove_center": True}, "remove_center needs an odd kernel_size"),
        ({"dilation": 4, "padding": 0}, r"at least as large as the dilated kernel \(9 cells\)"),
        ({"padding": -1}, "padding at least 0"),
    ],
)
def test_dcnv3(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)dcnv3: .*{message}"):
        convolution(**changes)
