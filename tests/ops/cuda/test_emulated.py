"""The CUDA kernels, thread by thread on the CPU, against the references."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bevperception.ops import dcnv3_reference, ms_deform_attn_reference, use_backend
from bevperception.ops.fused_attention import CompressedRows, deform_attn_unfused
from tests.ops.cuda.emulated import ORDERS, ROOT, compile_emulated, cuda_headers, link_emulated, set_order
from tests.ops.problems import AttentionProblem, ConvolutionProblem
from tests.ops.test_hostile import find_runtime, needs_sanitizers

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or cuda_headers() is None, reason="needs g++ and CUDA's headers"
)
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SETTINGS = ("kernel_size", "stride", "padding", "dilation", "groups", "offset_scale", "remove_center")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulated")
    built = link_emulated(compile_emulated(folder), folder / "emulated.so")
    torch.ops.load_library(built)
    return built


@pytest.fixture(params=list(ORDERS))
def operators(library: Path, request: pytest.FixtureRequest) -> Any:
    """The kernels' operators, their threads in every order."""
    set_order(library, request.param)
    return torch.ops.bevperception_emulated


def in_types(dtype: torch.dtype, maps: Tensor, *others: Tensor) -> list[Tensor]:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return [maps.to(dtype), *(t.to(real) for t in others)]


def agree(found: Sequence[Tensor], expected: Sequence[Tensor], share: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            largest = float(b.detach().abs().max())
            torch.testing.assert_close(a.double(), b.detach(), rtol=0, atol=share * max(largest, 1e-30))


ATTENTION = [
    AttentionProblem(),
    AttentionProblem(channels=8, points=1),
    AttentionProblem(channels=32, points=5),
    AttentionProblem(batch=1, heads=1, channels=300, queries=2),
    AttentionProblem(batch=3, heads=1, channels=64, shapes=((1, 1), (2, 5), (3, 1))),
    AttentionProblem(queries=0),
    AttentionProblem(points=0),
]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("problem", ATTENTION)
def test_ms_deform_attn(operators: Any, problem: AttentionProblem, dtype: torch.dtype) -> None:
    value, locations, weights = in_types(dtype, *problem.tensors())
    shapes = [n for shape in problem.shapes for n in shape]
    leaves = [t.double().requires_grad_() for t in (value, locations, weights)]
    expected = ms_deform_attn_reference(leaves[0], problem.shapes, *leaves[1:])
    agree([operators.ms_deform_attn(value, shapes, locations, weights)], [expected], DTYPES[dtype])
    gradient = torch.randn_like(expected).to(dtype)
    gradients = torch.autograd.grad(expected, leaves, gradient.double())
    share = 1e-12 if dtype == torch.float64 else 2e-6
    for backward in (operators.ms_deform_attn_backward, operators.ms_deform_attn_backward_in_order):
        agree(backward(gradient, value, shapes, locations, weights), gradients, share)


CONVOLUTION = [
    ConvolutionProblem(),
    ConvolutionProblem(channels=16, groups=2),
    ConvolutionProblem(channels=16, settings={"stride": 2, "remove_center": True, "offset_scale": 1.5}),
    ConvolutionProblem(
        height=6, width=9, channels=8, settings={"kernel_size": 5, "dilation": 2, "padding": 3}
    ),
    ConvolutionProblem(batch=0),
]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("problem", CONVOLUTION)
def test_dcnv3(operators: Any, problem: ConvolutionProblem, dtype: torch.dtype) -> None:
    tensors = in_types(dtype, *problem.tensors())
    leaves = [t.double().requires_grad_() for t in tensors]
    settings: dict[str, Any] = dict(zip(SETTINGS, (3, 1, 1, 1, problem.groups, 1.0, False), strict=True))
    settings |= problem.settings
    expected = dcnv3_reference(*leaves, **settings)
    arguments = [settings[name] for name in SETTINGS]
    agree([operators.dcnv3(*tensors, *arguments)], [expected], DTYPES[dtype])
    gradient = torch.randn_like(expected).to(dtype)
    gradients = torch.autograd.grad(expected, leaves, gradient.double())
    share = 1e-12 if dtype == torch.float64 else 2e-6
    for backward in (operators.dcnv3_backward, operators.dcnv3_backward_in_order):
        agree(backward(gradient, *tensors, *arguments), gradients, share)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("channels", [7, 16, 64])
def test_deform_attn(operators: Any, channels: int, compressed: bool, dtype: torch.dtype) -> None:
    tensors, settings, rows = row_problem(channels, compressed)
    tensors = in_types(dtype, *tensors)
    leaves = [t.double().requires_grad_() for t in tensors]
    shapes, anchors, groups = settings
    with use_backend("reference"):
        expected = deform_attn_unfused(leaves[0], shapes, *leaves[1:], anchors, groups, rows)
    given = [None, None] if rows is None else [rows.row_start, rows.map_of]
    arguments = (tensors[0], [n for s in shapes for n in s], *tensors[1:], anchors, groups, *given)
    agree([operators.deform_attn(*arguments)], [expected], DTYPES[dtype])
    gradient = torch.randn_like(expected).to(dtype)
    gradients = torch.autograd.grad(expected, leaves, gradient.double())
    share = 1e-12 if dtype == torch.float64 else 2e-6
    agree(operators.deform_attn_backward(gradient, *arguments, True), gradients, share)
    without = operators.deform_attn_backward(gradient, *arguments, False)
    agree(without[:3], gradients[:3], share)
    assert without[3].numel() == 0


def row_problem(channels: int, compressed: bool) -> tuple[list[Tensor], Any, CompressedRows | None]:
    """Tensors; shapes, anchors and groups; rows, some of which look into no map."""
    generator = torch.Generator().manual_seed(channels)
    maps, heads, anchors, points, count = 3, 2, 2, 4, 12
    shapes = ((4, 6), (3, 2))
    samples = len(shapes) * points
    entries = torch.tensor([0, 1, 2, 3, 1, 0, 2, 2, 1, 1, 0, 2])
    start = torch.cat([torch.zeros(1, dtype=torch.long), entries.cumsum(0)])
    map_of = torch.randint(0, maps, (int(start[-1]),), generator=generator)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    references = torch.rand(
        len(map_of) if compressed else count, anchors, 2, generator=generator, dtype=torch.float64
    )
    tensors = [numbers(maps, 30, heads, channels), numbers(count, heads * samples * 2)]
    tensors += [numbers(count, heads * samples), references]
    settings = (shapes, [p % anchors for _ in shapes for p in range(points)], 2)
    return tensors, settings, CompressedRows(start, map_of) if compressed else None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38, -1e10])
def test_points_without_a_place_sample_zero(operators: Any, bad: float) -> None:
    problem = AttentionProblem(channels=8)
    value, locations, weights = in_types(torch.float32, *problem.tensors())
    locations[0, 1], locations[1, 2, 0, 0, :, 1] = bad, bad
    shapes = [n for shape in problem.shapes for n in shape]
    leaves = [value.double().requires_grad_(), locations.double(), weights.double()]
    expected = ms_deform_attn_reference(leaves[0], problem.shapes, *leaves[1:])
    agree([operators.ms_deform_attn(value, shapes, locations, weights)], [expected], 2e-6)
    gradient = torch.ones_like(expected)
    found = operators.ms_deform_attn_backward(gradient.float(), value, shapes, locations, weights)
    agree(found[:1], torch.autograd.grad(expected, leaves[:1], gradient), 2e-6)
    assert all(t.isfinite().all() for t in found)


def test_rows_that_lie_read_nothing_else(operators: Any) -> None:
    tensors, (shapes, anchors, groups), rows = row_problem(8, compressed=True)
    assert rows is not None
    start, map_of = rows.row_start.clone(), rows.map_of.clone()
    start[3], start[-1], map_of[0], map_of[-1] = -5, 2**40, 2**40, -(2**40)
    flat = [n for s in shapes for n in s]
    found = operators.deform_attn(tensors[0], flat, *tensors[1:], anchors, groups, start, map_of)
    assert found.isfinite().all()


@pytest.mark.parametrize("channels", [0, 3])
def test_without_channels_or_points_all_gradients_are_zero(operators: Any, channels: int) -> None:
    points = 0 if channels else 2
    value, locations = torch.randn(2, 12, 3, channels), torch.rand(2, 5, 3, 1, points, 2)
    kept = [torch.full((n,), torch.nan) for n in range(4, 400, 4) for _ in range(2)]
    del kept
    call = (value, [3, 4], locations, torch.rand(2, 5, 3, 1, points))
    output = operators.ms_deform_attn(*call)
    found = operators.ms_deform_attn_backward(torch.ones_like(output), *call)
    rows = (value, [3, 4], torch.randn(10, 6 * points), torch.randn(10, 3 * points), torch.rand(10, 1, 2))
    settings = ([0] * points, 1, None, None)
    gradient = torch.ones(10, 3 * channels)
    of_rows = operators.deform_attn_backward(gradient, *rows, *settings, True)
    for tensor in (output, *found, operators.deform_attn(*rows, *settings), *of_rows):
        assert (tensor == 0).all()


def test_bad_arguments_are_refused(operators: Any) -> None:
    value, locations, weights = in_types(torch.float32, *AttentionProblem().tensors())
    shapes = [4, 6, 3, 2]
    with pytest.raises(RuntimeError, match="positions and weights must be float64 with maps of float64"):
        operators.ms_deform_attn(value, shapes, locations.double(), weights)
    with pytest.raises(RuntimeError, match="maps must be float16, bfloat16, float32 or float64"):
        operators.ms_deform_attn(value.long(), shapes, locations, weights)
    with pytest.raises(RuntimeError, match="attention_weights has a shape"):
        operators.ms_deform_attn(value, shapes, locations, weights[:1])


PROGRAM = """
import sys, torch
from tests.ops.cuda.test_emulated import row_problem
from tests.ops.problems import AttentionProblem, ConvolutionProblem
torch.ops.load_library(sys.argv[1])
operators = torch.ops.bevperception_emulated
for channels in (7, 8, 32):
    value, locations, weights = (t.float() for t in AttentionProblem(channels=channels).tensors(reach=0.8))
    output = operators.ms_deform_attn(value, [4, 6, 3, 2], locations, weights)
    for name in ("", "_in_order"):
        getattr(operators, "ms_deform_attn_backward" + name)(output, value, [4, 6, 3, 2], locations, weights)
    tensors = [t.float() for t in ConvolutionProblem(channels=channels).tensors()]
    output = operators.dcnv3(*tensors, 3, 1, 1, 1, 3, 1.0, False)
    for name in ("", "_in_order"):
        getattr(operators, "dcnv3_backward" + name)(output, *tensors, 3, 1, 1, 1, 3, 1.0, False)
    tensors, (shapes, anchors, groups), rows = row_problem(channels, True)
    tensors = [t.float() for t in tensors]
    arguments = (tensors[0], [4, 6, 3, 2], *tensors[1:], anchors, groups, rows.row_start, rows.map_of)
    operators.deform_attn_backward(operators.deform_attn(*arguments), *arguments, True)
print("done")
"""


def run_sanitized(library: Path) -> subprocess.CompletedProcess[str]:
    """All kernels once, in a process of their own with the sanitizers' libraries."""
    preload = " ".join(filter(None, (find_runtime("libasan.so"), find_runtime("libstdc++.so"))))
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library)],
        cwd=ROOT,
        env={
            "LD_PRELOAD": preload,
            # Fibers change stacks, which the check of returned stacks takes for an error.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The objects of all kernels and the binding with sanitizers."""
    return compile_emulated(tmp_path_factory.mktemp("sanitized"), sanitize=True)


@needs_sanitizers
def test_sanitizers_find_nothing(sanitized: list[Path], tmp_path: Path) -> None:
    done = run_sanitized(link_emulated(sanitized, tmp_path / "emulated.so", sanitize=True))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "done"


@needs_sanitizers
@pytest.mark.parametrize(
    ("right", "wrong", "seen"),
    [
        ("columns[column] : -1", "columns[column] + 1 : -1", "heap-buffer-overflow"),
        ("mask((count == 32", "mask(1u + (count == 32", "emulator: "),
    ],
    ids=["a read beyond the map", "a wrong mask"],
)
def test_planted_faults_are_caught(
    sanitized: list[Path], tmp_path: Path, right: str, wrong: str, seen: str
) -> None:
    shutil.copytree(ROOT / "ops", tmp_path / "ops")
    planted = 0
    for path in (tmp_path / "ops" / "csrc" / "cuda").glob("*.cuh"):
        text = path.read_text()
        planted += text.count(right)
        path.write_text(text.replace(right, wrong))
    assert planted == 1
    # In one of the kernels that include it: the others take the compiler as long again.
    (faulty,) = compile_emulated(
        tmp_path, sanitize=True, sources=tmp_path / "ops", units=("csrc/cuda/dcnv3.cu",)
    )
    others = [path for path in sanitized if path.name != faulty.name]
    # First, so that the linker takes its inline functions for all.
    library = link_emulated([faulty, *others], tmp_path / "emulated.so", sanitize=True)
    done = run_sanitized(library)
    assert done.returncode != 0
    assert seen in done.stderr


def test_the_orders_are_known(library: Path) -> None:
    assert ctypes.CDLL(str(library)).bev_emulator_set_order is not None
    with pytest.raises(KeyError):
        set_order(library, "sideways")
