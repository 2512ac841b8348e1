"""Deformable attention from raw predictions: the fused operator against its parts, and odd input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bevperception.ops import (
    CompressedRows,
    deform_attn,
    deform_attn_unfused,
    fused_attention,
    use_backend,
)
from tests.ops.problems import ISAS, cpu_isa, needs_native

Arguments = dict[str, Any]


@dataclass(frozen=True)
class RowsProblem:
    """Sizes of a deform_attn call; ``entries`` is how many maps each row looks into, None for one each."""

    maps: int = 3
    heads: int = 2
    channels: int = 5
    shapes: tuple[tuple[int, int], ...] = ((4, 6), (3, 2))
    points: int = 4
    anchors: int = 2
    groups: int = 1
    entries: tuple[int, ...] | None = (1, 0, 3, 2, 1)
    queries: int = 4
    seed: int = 0

    def arguments(self, dtype: torch.dtype = torch.float64, reach_cells: float = 2.0) -> Arguments:
        """Random arguments; offsets and logits are parts of longer rows, as the model's are."""
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, generator=generator)

        count = self.maps * self.queries if self.entries is None else len(self.entries)
        samples = self.heads * len(self.shapes) * self.points
        predicted = random(count, 3 * samples + 1)
        rows, pairs = None, count
        if self.entries is not None:
            pairs = sum(self.entries)
            start = torch.tensor([0, *self.entries]).cumsum(0)
            rows = CompressedRows(start, torch.randint(max(self.maps, 1), (pairs,), generator=generator))
        return {
            "value": random(self.maps, sum(h * w for h, w in self.shapes), self.heads, self.channels),
            "spatial_shapes": self.shapes,
            "offsets": reach_cells * predicted[:, : 2 * samples],
            "logits": 3 * predicted[:, 2 * samples : 3 * samples],
            "references": torch.rand(pairs, self.anchors, 2, dtype=dtype, generator=generator) * 1.2 - 0.1,
            "anchors": [p % self.anchors for _ in self.shapes for p in range(self.points)],
            "groups": self.groups,
            "rows": rows,
        }


PROBLEMS = {
    "cameras": RowsProblem(),
    "two halves": RowsProblem(
        maps=2, shapes=((5, 3), (5, 3)), groups=2, entries=None, channels=32, heads=8, queries=70
    ),
    "decoder": RowsProblem(maps=1, shapes=((7, 4),), anchors=1, entries=None, queries=9, channels=16),
    "many maps a row": RowsProblem(maps=6, heads=8, points=8, anchors=4, entries=(0, 6, 5, 0, 6, 1)),
    "long rows": RowsProblem(maps=2, heads=8, points=40, anchors=5, entries=(2, 1, 2)),
    # More than 4 MB a map and eight rows for each of its 30 tiles: rows are visited tile by tile.
    "large maps": RowsProblem(
        maps=2, shapes=((80, 85),), points=1, channels=80, anchors=1, entries=(1, 0, 2, 1) * 130
    ),
    "large maps, a row each": RowsProblem(
        maps=2, shapes=((80, 85),), points=1, channels=80, anchors=1, entries=None, queries=250
    ),
}
EACH = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def loops(arguments: Arguments) -> Tensor:
    """The definition, one sampling point at a time."""
    value, shapes, rows = arguments["value"], arguments["spatial_shapes"], arguments["rows"]
    (maps, _, heads, channels), samples = value.shape, len(arguments["anchors"])
    count, groups = arguments["logits"].shape[0], arguments["groups"]
    points = samples // len(shapes)
    offsets = arguments["offsets"].reshape(count, heads, samples, 2)
    weights = arguments["logits"].reshape(count, heads, groups, -1).softmax(-1).reshape(count, heads, -1)
    out = torch.zeros(count, heads, channels, dtype=value.dtype)
    for r in range(count):
        entries = [r] if rows is None else range(int(rows.row_start[r]), int(rows.row_start[r + 1]))
        for e in entries:
            of_map = value[r // (count // maps) if rows is None else int(rows.map_of[e])]
            for s in range(samples):
                height, width = shapes[s // points]
                start = sum(h * w for h, w in shapes[: s // points])
                grid = of_map[start : start + height * width].view(height, width, heads, channels)
                anchor = arguments["references"][e, arguments["anchors"][s]]
                for h in range(heads):
                    x = float(anchor[0]) * width + float(offsets[r, h, s, 0]) - 0.5
                    y = float(anchor[1]) * height + float(offsets[r, h, s, 1]) - 0.5
                    weight = float(weights[r, h, s]) / groups / len(entries)
                    out[r, h] += weight * bilinear(grid[:, :, h], x, y)
    return out.flatten(1)


def bilinear(grid: Tensor, x: float, y: float) -> Tensor:
    total = torch.zeros(grid.shape[-1], dtype=grid.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < grid.shape[0] and 0 <= column < grid.shape[1]:
                total += (1 - abs(x - column)) * (1 - abs(y - row)) * grid[row, column]
    return total


@EACH
@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_against_loops(problem: RowsProblem, backend: str) -> None:
    arguments = problem.arguments()
    with use_backend(backend):  # type: ignore[arg-type]
        torch.testing.assert_close(deform_attn(**arguments), loops(arguments))


@EACH
def test_one_padded_call_is_as_map_by_map(problem: RowsProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem.arguments()
    tensors = [x.requires_grad_() for x in arguments.values() if isinstance(x, torch.Tensor)]
    expected = deform_attn_unfused(**arguments)
    monkeypatch.setattr(fused_attention, "_sample_by_map", fused_attention._sample_padded)
    found = deform_attn_unfused(**arguments)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), tensors) for y in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0])


@needs_native
@EACH
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_every_instruction_set(problem: RowsProblem, isa: str, dtype: torch.dtype, tolerance: float) -> None:
    arguments = problem.arguments(dtype)
    with cpu_isa(isa):
        fused = deform_attn(**arguments)
    longest_side = max(max(shape) for shape in problem.shapes)
    tolerance *= max(1.0, longest_side / 8)  # a place is rounded as a share of the side
    torch.testing.assert_close(fused, deform_attn_unfused(**arguments), rtol=tolerance, atol=tolerance)


@needs_native
@given(
    entries=st.none() | st.lists(st.integers(0, 4), max_size=7).map(tuple),
    heads=st.integers(1, 9),
    channels=st.integers(1, 40),
    points=st.integers(1, 9),
    anchors=st.integers(1, 3),
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3).map(tuple),
    by_level=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_size(by_level: bool, dtype: torch.dtype, **sizes: Any) -> None:
    problem = RowsProblem(**sizes, groups=len(sizes["shapes"]) if by_level else 1)
    arguments = problem.arguments(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(
        deform_attn(**arguments), deform_attn_unfused(**arguments), rtol=tolerance, atol=tolerance
    )


@needs_native
@pytest.mark.parametrize(
    "empty",
    [
        {"entries": ()},
        {"entries": (0, 0, 0)},
        {"entries": (0,), "maps": 0},
        {"entries": None, "queries": 0},
        {"channels": 0},
        {"heads": 0},
        {"points": 0},
    ],
)
def test_empty(empty: dict[str, Any]) -> None:
    arguments = replace(RowsProblem(), **empty).arguments()
    fused = deform_attn(**arguments)
    assert fused.shape == (
        arguments["logits"].shape[0],
        arguments["value"].shape[2] * arguments["value"].shape[3],
    )
    assert (fused == 0).all()


@needs_native
def test_threads_do_not_change_a_bit() -> None:
    arguments = RowsProblem(maps=6, heads=8, channels=32, entries=(1, 2, 0) * 300).arguments(torch.float32)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append((deform_attn(**arguments), *gradients_of(arguments)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(mine, its) for mine, its in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_points_without_a_place_sample_zero(bad: float) -> None:
    arguments = RowsProblem(entries=(1, 1, 2)).arguments(torch.float32)
    arguments["offsets"] = arguments["offsets"].clone()
    arguments["offsets"][1] = bad
    fused = deform_attn(**arguments)
    assert (fused[1] == 0).all()
    torch.testing.assert_close(fused, deform_attn_unfused(**arguments), rtol=2e-5, atol=2e-5)
    value_gradient, offsets_gradient, logits_gradient, _ = gradients_of(arguments)
    assert (offsets_gradient[1] == 0).all()
    assert (logits_gradient[1] == 0).all()
    assert value_gradient.isfinite().all()


@needs_native
@pytest.mark.parametrize("scale", [1e-30, 1.0, 50.0, 1e4, 1e30])
def test_logits_of_any_size(scale: float) -> None:
    arguments = RowsProblem(shapes=((4, 6),), points=11).arguments(torch.float32)
    arguments["logits"] = arguments["logits"] * scale
    torch.testing.assert_close(
        deform_attn(**arguments), deform_attn_unfused(**arguments), rtol=3e-5, atol=3e-5
    )


FLOATS = ("value", "offsets", "logits", "references")


def gradients_of(arguments: Arguments, wanted: tuple[str, ...] = FLOATS) -> tuple[Tensor, ...]:
    """Gradients of the sum of squares of the result."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in wanted}
    result = deform_attn(**{**arguments, **leaves})
    return torch.autograd.grad(result.square().sum(), tuple(leaves.values()))


def assert_gradients(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@EACH
@pytest.mark.parametrize("channels", [3, 16])
def test_gradients(problem: RowsProblem, channels: int) -> None:
    arguments = replace(problem, queries=2, channels=channels).arguments()
    with use_backend("reference"):
        expected = gradients_of(arguments)
    assert_gradients(gradients_of(arguments), expected, 1e-9)
    # What nobody asks for is not computed, and changes nothing else.
    assert_gradients(gradients_of(arguments, FLOATS[:3]), expected[:3], 1e-9)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_gradients_by_every_instruction_set(isa: str) -> None:
    arguments = RowsProblem(maps=4, heads=4, channels=21, points=7).arguments(torch.float32)
    with use_backend("reference"):
        expected = gradients_of(arguments)
    with cpu_isa(isa):
        found = gradients_of(arguments)
    assert_gradients(found, expected, 2e-4)


@needs_native
def test_finite_differences() -> None:
    arguments = RowsProblem(maps=2, shapes=((3, 4),), points=2, entries=(2, 0, 1)).arguments()
    leaves = tuple(arguments[name].detach().clone().requires_grad_() for name in FLOATS)

    def run(*tensors: Tensor) -> Tensor:
        return deform_attn(**{**arguments, **dict(zip(FLOATS, tensors, strict=True))})

    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-6)


@needs_native
def test_operator_inside_pytorch() -> None:
    for problem in PROBLEMS.values():
        arguments = problem.arguments(torch.float32)
        rows = arguments["rows"]
        call = (
            arguments["value"].requires_grad_(),
            [n for shape in arguments["spatial_shapes"] for n in shape],
            *(arguments[name] for name in ("offsets", "logits", "references", "anchors", "groups")),
            None if rows is None else rows.row_start,
            None if rows is None else rows.map_of,
        )
        torch.library.opcheck(torch.ops.bevperception.deform_attn.default, call)
        gradient = torch.randn_like(deform_attn(**arguments).detach())
        plain = [x.detach() if isinstance(x, Tensor) else x for x in call]
        for of_references in (False, True):
            torch.library.opcheck(
                torch.ops.bevperception.deform_attn_backward.default, (gradient, *plain, of_references)
            )


@needs_native
def test_half_precision_is_computed_in_float32() -> None:
    arguments = RowsProblem().arguments(torch.float32)
    names = ("value", "offsets", "logits", "references")
    half = {name: arguments[name].bfloat16() for name in names}
    fused = deform_attn(**{**arguments, **half})
    assert fused.dtype == torch.bfloat16
    full = deform_attn(**{**arguments, **{name: tensor.float() for name, tensor in half.items()}})
    assert torch.equal(fused, full.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert deform_attn(**{**arguments, **half}).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": torch.zeros(3, 30, 10)}, "value must have 4 dimensions"),
        ({"spatial_shapes": ()}, "at least one"),
        ({"spatial_shapes": ((4, 6),)}, "as many cells as the levels"),
        ({"anchors": [0] * 7}, "a multiple of groups; got 7 anchors, 2 levels"),
        ({"groups": 3}, "a multiple of groups"),
        ({"groups": 0}, "a multiple of groups"),
        ({"anchors": [0, 1, 2, 1] * 2}, "indices of the 2 reference points"),
        ({"logits": torch.zeros(5, 15).double()}, r"logits must have shape \(5, 16\)"),
        ({"references": torch.zeros(6, 2, 2).double()}, r"one entry a pair of row and map \(7\)"),
        ({"rows": None}, "one entry a pair"),
        ({"rows": None, "references": torch.zeros(5, 2, 2).double()}, r"multiple of the maps \(3\)"),
        (
            {"rows": CompressedRows(torch.arange(5), torch.zeros(7).long())},
            r"row_start must have shape \(6,\)",
        ),
    ],
)
def test_arguments_that_do_not_fit(changes: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)deform_attn: .*{message}"):
        deform_attn(**{**RowsProblem().arguments(), **changes})


@needs_native
@pytest.mark.parametrize(
    ("start", "map_of", "message"),
    [
        ([0, 1, 1, 4, 6, 8], [0] * 7, "from 0 to the entries"),
        ([1, 1, 1, 4, 6, 7], [0] * 7, "from 0 to the entries"),
        ([0, 9, 1, 4, 6, 7], [0] * 7, "must not decrease"),
        ([0, 1, 1, 4, 6, 7], [0] * 6 + [3], "names a map 3 of 3"),
        ([0, 1, 1, 4, 6, 7], [-1] + [0] * 6, "names a map -1 of 3"),
    ],
)
def test_rows_that_point_elsewhere_are_refused(start: list[int], map_of: list[int], message: str) -> None:
    rows = CompressedRows(torch.tensor(start), torch.tensor(map_of))
    with pytest.raises(RuntimeError, match=message):
        deform_attn(**{**RowsProblem().arguments(), "rows": rows})
