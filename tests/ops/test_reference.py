"""The plain-PyTorch references against loops over single numbers, and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bevperception.ops import use_backend
from tests.ops.problems import AttentionProblem, ConvolutionProblem, Problem
from tests.ops.slow_reference import slow_dcnv3, slow_ms_deform_attn


@pytest.mark.parametrize(
    "problem",
    [
        AttentionProblem(),
        AttentionProblem(batch=1, heads=1, channels=1, shapes=((1, 1),), points=1),
        AttentionProblem(shapes=((1, 9), (7, 1), (2, 3)), points=4),
    ],
)
def test_ms_deform_attn(problem: AttentionProblem) -> None:
    value, locations, weights = problem.tensors(reach=0.8)
    locations[0, 0, 0, 0, 0] = torch.tensor([float("nan"), 0.5])
    with use_backend("reference"):
        output = problem.run(value, locations, weights)
    expected = slow_ms_deform_attn(value, problem.shapes, locations, weights)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


CONVOLUTION_SETTINGS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "offset_scale": 0.5},
    {"dilation": 2, "padding": 2},
    {"kernel_size": 5, "padding": 2, "remove_center": True},
    {"kernel_size": 2, "padding": 0, "dilation": 3},
    {"kernel_size": 1, "padding": 0},
    {"remove_center": True, "offset_scale": 2.0, "padding": 0},
]


@pytest.mark.parametrize("settings", CONVOLUTION_SETTINGS, ids=str)
def test_dcnv3(settings: dict[str, Any]) -> None:
    problem = ConvolutionProblem(batch=1, groups=2, channels=2, settings=settings)
    input, offset, mask = problem.tensors()
    offset[0, 0, 0, 0] = float("inf")
    with use_backend("reference"):
        output = problem.run(input, offset, mask)
    expected = slow_dcnv3(input, offset, mask, groups=problem.groups, **settings)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "problem",
    [
        AttentionProblem(batch=1, queries=2, channels=2),
        ConvolutionProblem(batch=1, height=2, width=3, groups=2, channels=1),
    ],
)
def test_gradients(problem: Problem) -> None:
    tensors = [t.requires_grad_() for t in problem.tensors()]
    with use_backend("reference"):
        assert torch.autograd.gradcheck(problem.run, tensors)
