"""The native kernels against the references."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bevperception.ops import use_backend
from tests.ops.problems import (
    ISAS,
    AttentionProblem,
    ConvolutionProblem,
    ModulatedProblem,
    Problem,
    assert_close,
    cpu_isa,
    kink_distance,
    needs_native,
    outputs_and_gradients,
    threads,
)

pytestmark = needs_native

ROOT = Path(__file__).resolve().parents[2]

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])

PROBLEMS: list[Problem] = [
    AttentionProblem(),
    AttentionProblem(batch=1, queries=70, heads=8, channels=32, shapes=((9, 11),), points=4),
    AttentionProblem(batch=3, queries=33, heads=4, channels=16, shapes=((5, 4), (3, 3)), points=8),
    AttentionProblem(heads=1, channels=1, shapes=((1, 1),), points=1),
    AttentionProblem(queries=3, heads=2, channels=131, shapes=((2, 9), (8, 3), (1, 5), (4, 1)), points=5),
    AttentionProblem(queries=2, heads=6, channels=4, shapes=((3, 4),) * 4, points=40),
    ConvolutionProblem(),
    ConvolutionProblem(height=9, width=23, groups=4, channels=16),
    ConvolutionProblem(batch=1, height=4, width=70, groups=3, channels=16),
    ConvolutionProblem(batch=1, groups=7, channels=32, settings={"stride": 2}),
    ConvolutionProblem(height=7, width=90, groups=2, channels=9, settings={"stride": 2, "kernel_size": 5}),
    ConvolutionProblem(groups=1, channels=1, height=1, width=1),
    ConvolutionProblem(groups=2, channels=70, settings={"kernel_size": 5, "padding": 2, "offset_scale": 0.5}),
    ConvolutionProblem(groups=20, channels=3, settings={"remove_center": True, "dilation": 2, "padding": 2}),
    ModulatedProblem(),
    ModulatedProblem(groups=1, channels=37, channels_out=6, height=9, width=8),
    ModulatedProblem(batch=3, channels=8, settings={"stride": 2, "padding": 2, "dilation": 2}),
    ModulatedProblem(batch=1, side=1, settings={}, height=1, width=3),
    ModulatedProblem(groups=3, side=5, settings={"padding": 1, "stride": 3}, height=11, width=6),
]


def compare(problem: Problem, dtype: torch.dtype) -> None:
    tensors = problem.tensors(dtype)
    # In float32 the two implementations may fall on different sides of a cell line.
    assume_no_kink = dtype == torch.float64 or float(kink_distance(problem, tensors)) > 1e-5
    native = outputs_and_gradients(problem.run, tensors, "native")
    expected = outputs_and_gradients(problem.run, tensors, "reference")
    if not assume_no_kink:
        native, expected = native[:2], expected[:2]  # the output and the map's gradient are continuous
    assert_close(native, expected, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_instruction_set(problem: Problem, isa: str, dtype: torch.dtype) -> None:
    with cpu_isa(isa):
        compare(problem, dtype)


sizes = st.integers(1, 9)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch=st.integers(0, 3),
    queries=st.integers(0, 40),
    heads=st.integers(1, 5),
    channels=st.integers(1, 40),
    shapes=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4),
    points=st.integers(0, 9),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_ms_deform_attn_any_size(shapes: list[tuple[int, int]], dtype: torch.dtype, **numbers: int) -> None:
    compare(AttentionProblem(shapes=tuple(shapes), **numbers), dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch=st.integers(0, 3),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    groups=st.integers(1, 5),
    channels=st.integers(1, 20),
    kernel_size=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 3),
    offset_scale=st.sampled_from([0.5, 1.0, 2.0]),
    remove_center=st.booleans(),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_dcnv3_any_size(
    batch: int,
    height: int,
    width: int,
    groups: int,
    channels: int,
    seed: int,
    dtype: torch.dtype,
    **settings: Any,
) -> None:
    kernel = settings["kernel_size"]
    assume(not settings["remove_center"] or kernel in (3, 5))
    assume(min(height, width) + 2 * settings["padding"] > settings["dilation"] * (kernel - 1))
    compare(ConvolutionProblem(batch, height, width, groups, channels, settings, seed), dtype)


@pytest.mark.parametrize(
    "problem",
    [
        AttentionProblem(batch=1, queries=2, channels=2),
        ConvolutionProblem(batch=1, height=3, width=3, groups=2, channels=2, settings={"offset_scale": 0.5}),
    ],
    ids=str,
)
def test_gradcheck(problem: Problem) -> None:
    tensors = [t.requires_grad_() for t in problem.tensors()]
    assert float(kink_distance(problem, tuple(t.detach() for t in tensors))) > 1e-4
    with use_backend("native"):
        assert torch.autograd.gradcheck(problem.run, tensors)


def test_prefetching_large_maps() -> None:
    compare(
        AttentionProblem(batch=1, queries=9, heads=8, channels=32, shapes=((80, 70),), points=4),
        torch.float32,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("count", [1, 3])
def test_rows_visited_tile_by_tile(count: int, dtype: torch.dtype) -> None:
    """Maps of more than 4 MB, with more than eight queries for each of their 5 x 5 tiles of 16 x 16 cells."""
    problem = AttentionProblem(
        batch=2, queries=211, heads=8, channels=32, shapes=((66, 70), (2, 3)), points=1
    )
    value, locations, weights = problem.tensors(dtype, reach=0.7)
    assert value[0].nbytes > 4 << 20
    locations[0, 5], locations[1, 7, 0] = float("nan"), 1e30
    with threads(count):
        output, *gradients = outputs_and_gradients(problem.run, (value, locations, weights), "native")
    assert not output[0, 5].any()
    finite = locations.nan_to_num(9.0)
    expected, *others = outputs_and_gradients(problem.run, (value, finite, weights), "reference")
    assert_close((output, *gradients[::2]), (expected, *others[::2]), TOLERANCE[dtype])
    single = [problem.run(*(t[b : b + 1] for t in (value, locations, weights))) for b in range(2)]
    assert torch.equal(torch.cat(single), output)


def test_more_planes_than_are_held_at_a_time() -> None:
    problem = ConvolutionProblem(batch=1, height=60, width=70, groups=35, channels=16)
    assert 62 * 72 * 16 * 4 * problem.groups > 8 << 20
    compare(problem, torch.float32)


@pytest.mark.parametrize("reach", [0.01, 30.0])
def test_points_near_and_far_look_at_the_rows_there_are(reach: float) -> None:
    """The forward copies rows of the input as far as points reach: in which order they do must not matter."""
    problem = ConvolutionProblem(height=41, width=37, groups=2, channels=16)
    tensors = problem.tensors(torch.float32, reach)
    for count in (1, 5):
        with threads(count):
            native = outputs_and_gradients(problem.run, tensors, "native")
        assert_close(native[:1], outputs_and_gradients(problem.run, tensors, "reference")[:1], 2e-5)


def test_gradient_of_a_map_of_fresh_pages() -> None:
    """From 32 MB on, the gradient of a map is cleared by the kernel of Linux where that can be had."""
    problem = AttentionProblem(batch=1, queries=5, heads=8, channels=32, shapes=((190, 181),), points=2)
    assert problem.tensors(torch.float32)[0].nbytes > 32 << 20
    for _ in range(2):  # the second time in memory that the first has left
        compare(problem, torch.float32)


KEPT = """
import torch
from bevperception.malloc import keep_freed_memory
from tests.ops.problems import AttentionProblem, outputs_and_gradients

assert keep_freed_memory()
problem = AttentionProblem(batch=1, queries=5, heads=8, channels=32, shapes=((190, 181),), points=2)
tensors = problem.tensors(torch.float32)
old = [torch.full_like(tensors[0], 7.0) for _ in range(4)]
del old  # wherever the gradient comes to lie
value_gradient = outputs_and_gradients(problem.run, tensors, "native")[1]
print(float((value_gradient - outputs_and_gradients(problem.run, tensors, "reference")[1]).abs().max()))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc")
def test_gradient_of_a_large_map_in_kept_memory() -> None:
    """Where freed memory is kept, the gradient's holds old numbers."""
    found = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, check=True, cwd=ROOT, text=True)
    assert float(found.stdout) < 1e-5


@pytest.mark.parametrize("empty", [{"queries": 0}, {"batch": 0}, {"points": 0}], ids=str)
def test_empty_attention(empty: dict[str, int]) -> None:
    problem = AttentionProblem(**empty)
    output, *gradients = outputs_and_gradients(problem.run, problem.tensors(), "native")
    assert output.shape == (problem.batch, problem.queries, problem.heads * problem.channels)
    assert all(not t.any() for t in (output, *gradients))


def test_empty_convolution() -> None:
    problem = ConvolutionProblem(batch=0)
    output, *_ = outputs_and_gradients(problem.run, problem.tensors(), "native")
    assert output.shape == (0, problem.height, problem.width, problem.groups * problem.channels)


@pytest.mark.parametrize("problem", [AttentionProblem(), ConvolutionProblem()], ids=str)
def test_non_contiguous(problem: Problem) -> None:
    tensors = problem.tensors()
    strided = tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors)
    assert not any(t.is_contiguous() for t in strided)
    assert_close(
        outputs_and_gradients(problem.run, strided, "native"),
        outputs_and_gradients(problem.run, tensors, "native"),
        0.0,
    )


def test_expanded_cotangent() -> None:
    problem = AttentionProblem()
    gradients = []
    for backend in ("native", "reference"):
        leaves = [t.requires_grad_() for t in problem.tensors()]
        with use_backend(backend):  # type: ignore[arg-type]
            problem.run(*leaves).sum().backward()  # a gradient of strides 0
        gradients.append(tuple(t.grad for t in leaves))
    assert_close(*gradients, 1e-12)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("problem", [AttentionProblem(queries=20), ConvolutionProblem()], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e9, -3e9])
def test_points_without_a_place_sample_zero(problem: Problem, bad: float, isa: str) -> None:
    """A NaN, infinite or far point adds nothing, and neither it nor its weight gets a gradient."""
    feature_map, points, weights = problem.tensors(torch.float32)
    pairs = points.view(-1, 2)
    pairs[::3, 0] = bad
    pairs[1::5, 1] = bad
    lost = (pairs == bad).any(-1) | pairs.isnan().any(-1)
    without = weights.clone()
    without.view(-1)[lost] = 0
    safe = points.clone()
    safe.view(-1, 2)[lost] = 0
    with cpu_isa(isa):
        output, of_map, of_points, of_weights = outputs_and_gradients(
            problem.run, (feature_map, points, weights), "native"
        )
    expected = outputs_and_gradients(problem.run, (feature_map, safe, without), "reference")
    assert_close((output, of_map), expected[:2], 1e-5)
    assert not of_points.view(-1, 2)[lost].any()
    assert not of_weights.reshape(-1)[lost].any()


@pytest.mark.parametrize("far", [1.5, -0.6])
def test_outside_points_do_not_read_the_border(far: float) -> None:
    problem = AttentionProblem()
    value, locations, weights = problem.tensors(torch.float32)
    value[:] = float("nan")
    locations[..., 0] = far
    with use_backend("native"):
        assert not problem.run(value, locations, weights).any()


@pytest.mark.parametrize("problem", [AttentionProblem(batch=3), ConvolutionProblem(batch=3)], ids=str)
def test_batch_equals_singles(problem: Problem) -> None:
    tensors = problem.tensors(torch.float32)
    together = outputs_and_gradients(problem.run, tensors, "native")
    with use_backend("native"):
        for b in range(3):
            alone = problem.single().run(*(t[b : b + 1] for t in tensors))
            assert torch.equal(alone[0], together[0][b])


@pytest.mark.parametrize(
    "problem",
    [
        AttentionProblem(batch=1, queries=300, heads=5, channels=32, shapes=((9, 9),)),
        AttentionProblem(batch=3, queries=300, heads=2, channels=32, shapes=((9, 9),)),
        ConvolutionProblem(batch=1, height=20, width=30, groups=5, channels=16),
        ConvolutionProblem(batch=2, height=67, width=41, groups=2, channels=16),
    ],
    ids=str,
)
def test_threads_do_not_change_a_bit(problem: Problem) -> None:
    tensors = problem.tensors(torch.float32)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(outputs_and_gradients(problem.run, tensors, "native"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
