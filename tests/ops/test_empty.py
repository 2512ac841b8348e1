"""Sizes of zero give zeros or an error, never what the memory held; tensors elsewhere are refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bevperception.ops import dcnv3, ms_deform_attn, use_backend
from bevperception.ops.fused_attention import CompressedRows, deform_attn
from bevperception.ops.linear import linear
from bevperception.ops.normalization import layer_norm, softmax
from tests.ops.problems import needs_native

BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """What is left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def run_forward_and_backward(function: Any, *tensors: Tensor) -> list[Tensor]:
    """The output and the gradients of all tensors; none if the call is refused."""
    leaves = [tensor.requires_grad_() for tensor in tensors]
    # Kernels' own memory is not PyTorch's to fill: they get what is freed here.
    kept = [torch.full((n,), math.nan) for n in range(4, 2000, 4) for _ in range(2)]
    del kept
    try:
        output = function(*leaves)
        gradients = torch.autograd.grad(output, leaves, torch.ones_like(output))
    except (ValueError, RuntimeError):
        return []
    return [output, *gradients]


def all_are_zero(found: list[Tensor]) -> bool:
    return all((tensor == 0).all() for tensor in found)


ATTENTION = {"batch": 2, "queries": 5, "heads": 3, "points": 2, "channels": 7}


def attention(sizes: dict[str, int], levels: tuple[tuple[int, int], ...]) -> list[Tensor]:
    batch, queries, heads, points, channels = sizes.values()
    cells = sum(h * w for h, w in levels)
    value = torch.randn(batch, cells, heads, channels)
    locations = torch.rand(batch, queries, heads, len(levels), points, 2)
    weights = torch.rand(batch, queries, heads, len(levels), points)
    return run_forward_and_backward(
        lambda v, x, w: ms_deform_attn(v, levels, x, w), value, locations, weights
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*ATTENTION, "levels", "height"])
def test_ms_deform_attn(backend: str, name: str) -> None:
    levels = {"levels": (), "height": ((3, 4), (0, 2))}.get(name, ((3, 4), (1, 2)))
    sizes = {**ATTENTION, name: 0} if name in ATTENTION else ATTENTION
    with use_backend(backend):
        assert not all_are_zero(attention(ATTENTION, ((3, 4), (1, 2))))
        found = attention(sizes, levels)
    assert all_are_zero(found)
    assert bool(found) or backend == "reference" or name not in ATTENTION, "the native operator serves these"


ROWS = {"maps": 2, "rows": 6, "heads": 3, "points": 4, "channels": 5, "anchors": 2, "entries": 7}


def rows_attention(
    sizes: dict[str, int], compressed: bool, levels: tuple[tuple[int, int], ...]
) -> list[Tensor]:
    maps, count, heads, points, channels, anchors, entries = sizes.values()
    rows = None
    if compressed:
        # The last row looks nowhere.
        start = torch.linspace(0, entries, max(count, 1)).long()
        start = torch.cat((start, start.new_full((1,), entries))) if count else start.new_zeros(1)
        entries = entries if count and maps else 0
        start = start.clamp(max=entries)
        rows = CompressedRows(start, torch.arange(entries) % max(maps, 1))
    else:
        entries = count
    value = torch.randn(maps, sum(h * w for h, w in levels), heads, channels)
    samples = len(levels) * points
    offsets, logits = torch.randn(count, heads * samples * 2), torch.randn(count, heads * samples)
    references = torch.rand(entries, anchors, 2)
    anchor_of = [k % max(anchors, 1) for k in range(samples)]
    return run_forward_and_backward(
        lambda v, o, w, r: deform_attn(v, levels, o, w, r, anchor_of, rows=rows),
        *(value, offsets, logits, references),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_deform_attn(backend: str, compressed: bool, name: str) -> None:
    levels = ((3, 4), (2, 2))
    with use_backend(backend):
        assert not all_are_zero(rows_attention(ROWS, compressed, levels))
        found = rows_attention({**ROWS, name: 0}, compressed, levels)
        assert not any(tensor.isnan().any() for tensor in found)
        if compressed or name != "entries":
            assert all_are_zero(found)
        # A map of no pixels claims any size.
        huge = rows_attention(
            {**ROWS, "maps": 0, "rows": 900 if compressed else 0}, compressed, ((999, 999),)
        )
        assert all_are_zero(huge)


CONVOLUTION = {"batch": 2, "height": 5, "width": 7, "channels": 6, "groups": 3, "kernel": 3}


def convolution(sizes: dict[str, int], remove_center: bool = False) -> list[Tensor]:
    batch, height, width, channels, groups, kernel = sizes.values()
    padding, points = kernel // 2, kernel**2 - remove_center
    shape = (batch, height + 2 * padding - kernel + 1, width + 2 * padding - kernel + 1)
    return run_forward_and_backward(
        lambda x, o, m: dcnv3(
            x, o, m, kernel_size=kernel, padding=padding, groups=groups, remove_center=remove_center
        ),
        torch.randn(batch, height, width, channels),
        torch.randn(*shape, groups * points * 2),
        torch.rand(*shape, groups * points),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONVOLUTION)
def test_dcnv3(backend: str, name: str) -> None:
    with use_backend(backend):
        assert not all_are_zero(convolution(CONVOLUTION))
        assert all_are_zero(convolution({**CONVOLUTION, name: 0}))
        assert all_are_zero(convolution({**CONVOLUTION, "kernel": 1}, remove_center=True))


@needs_native
def test_native_dcnv3_without_points_or_output() -> None:
    """Beyond what the Python face lets through."""
    ops = torch.ops.bevperception
    input = torch.randn(2, 5, 7, 6)
    settings = (1, 1, 0, 1, 3, 1.0, True)
    tensors = (input, torch.randn(2, 5, 7, 0), torch.randn(2, 5, 7, 0))
    assert all_are_zero([ops.dcnv3(*tensors, *settings), *ops.dcnv3_backward(input, *tensors, *settings)])
    settings = (3, 1, 0, 1, 3, 1.0, False)
    narrow = torch.randn(2, 5, 2, 6)
    tensors = (narrow, torch.randn(2, 3, 0, 54), torch.randn(2, 3, 0, 27))
    gradient = torch.randn(2, 3, 0, 6)
    found = [ops.dcnv3(*tensors, *settings), *ops.dcnv3_backward(gradient, *tensors, *settings)]
    assert all_are_zero(found)
    assert found[1].shape == narrow.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", [False, True])
def test_rows_of_nothing(backend: str, gradient: bool) -> None:
    with use_backend(backend), torch.set_grad_enabled(gradient):
        for shape in ((0, 8), (3, 0), (2, 0, 8), (0,)):
            x = torch.randn(shape, requires_grad=gradient)
            channels = shape[-1]
            assert softmax(x).shape == shape
            weight, bias = torch.ones(channels), torch.zeros(channels)
            if channels:
                assert layer_norm(x, weight, bias, 1e-5).shape == shape
            # Without inputs only the bias is left.
            shifts = torch.arange(4.0)
            expected = shifts.expand(*shape[:-1], 4)
            torch.testing.assert_close(linear(x, torch.ones(4, channels), shifts), expected)


def test_what_is_refused_elsewhere() -> None:
    levels = ((3, 4),)
    tensors = {
        "value": torch.randn(2, 12, 3, 5),
        "offsets": torch.randn(4, 3 * 2 * 2),
        "logits": torch.randn(4, 3 * 2),
        "references": torch.rand(5, 1, 2),
    }
    rows = CompressedRows(torch.tensor([0, 1, 2, 3, 5]), torch.tensor([0, 1, 1, 0, 1]))

    def call(rows: CompressedRows = rows, **changes: Tensor) -> Tensor:
        given = {**tensors, **changes}
        value = given.pop("value")
        return deform_attn(value, levels, *given.values(), anchors=[0, 0], rows=rows)

    assert call().isfinite().all()
    for name, tensor in tensors.items():
        with pytest.raises(ValueError, match=f"one device; got .*{name} on meta"):
            call(**{name: tensor.to("meta")})
        with pytest.raises(ValueError, match="must be float16"):
            call(**{name: tensor.long()})
    for name in ("row_start", "map_of"):
        tensor = getattr(rows, name)
        with pytest.raises(ValueError, match=f"int64 and on the device.*{name} torch.int64 on meta"):
            call(replace(rows, **{name: tensor.to("meta")}))
        with pytest.raises(ValueError, match=f"int64 and on the device.*{name} torch.int32 on cpu"):
            call(replace(rows, **{name: tensor.int()}))


@pytest.mark.parametrize("name", ["input", "offset", "mask"])
def test_dcnv3_refuses_tensors_elsewhere(name: str) -> None:
    tensors = {
        "input": torch.randn(1, 3, 4, 2),
        "offset": torch.randn(1, 3, 4, 18),
        "mask": torch.rand(1, 3, 4, 9),
    }
    with pytest.raises(ValueError, match=f"one device; got .*{name} on meta"):
        dcnv3(**{**tensors, name: tensors[name].to("meta")}, groups=1)
    with pytest.raises(ValueError, match="must be float16"):
        dcnv3(**{**tensors, name: tensors[name].long()}, groups=1)


@pytest.mark.parametrize("name", ["value", "sampling_locations", "attention_weights"])
def test_ms_deform_attn_refuses_tensors_elsewhere(name: str) -> None:
    tensors = {
        "value": torch.randn(1, 12, 2, 3),
        "sampling_locations": torch.rand(1, 5, 2, 1, 2, 2),
        "attention_weights": torch.rand(1, 5, 2, 1, 2),
    }
    with pytest.raises(ValueError, match=f"one device; got .*{name} on meta"):
        ms_deform_attn(**{**tensors, name: tensors[name].to("meta")}, spatial_shapes=((3, 4),))
    with pytest.raises(ValueError, match="must be float16"):
        ms_deform_attn(**{**tensors, name: tensors[name].long()}, spatial_shapes=((3, 4),))
