"""Modulated deformable convolution beyond what all operators are tested for."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from bevperception.models.backbones.resnet import DeformableConvolution
from bevperception.ops import deform_conv2d, modulated_convolution, use_backend
from tests.ops.problems import ModulatedProblem, assert_close, needs_native, outputs_and_gradients

BACKENDS = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])


def by_hand(problem: ModulatedProblem) -> torch.Tensor:
    """One number after the other, as the definition says it."""
    input, offset, mask, weight = problem.tensors()
    stride, padding, dilation = (
        problem.settings.get(k, v) for k, v in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    side, per_group = problem.side, problem.channels
    output = torch.zeros(len(input), len(weight), *mask.shape[2:], dtype=input.dtype)

    def pixel(b: int, c: int, y: int, x: int) -> float:
        inside = 0 <= y < problem.height and 0 <= x < problem.width
        return float(input[b, c, y, x]) if inside else 0.0

    for b, o, row, column in torch.cartesian_prod(*map(torch.arange, output.shape)).tolist():
        total = 0.0
        for c in range(input.shape[1]):
            for i in range(side):
                for j in range(side):
                    k = (c // per_group) * side * side + i * side + j
                    y = row * stride - padding + i * dilation + float(offset[b, 2 * k, row, column])
                    x = column * stride - padding + j * dilation + float(offset[b, 2 * k + 1, row, column])
                    y0, x0 = int(torch.tensor(y).floor()), int(torch.tensor(x).floor())
                    sample = sum(
                        (1 - abs(y - v)) * (1 - abs(x - u)) * pixel(b, c, v, u)
                        for v in (y0, y0 + 1)
                        for u in (x0, x0 + 1)
                    )
                    total += float(weight[o, c, i, j]) * sample * float(mask[b, k, row, column])
        output[b, o, row, column] = total
    return output


@BACKENDS
def test_equals_the_definition(backend: str) -> None:
    for settings in ({"padding": 1}, {"padding": 2, "stride": 2, "dilation": 2}):
        problem = ModulatedProblem(batch=1, channels=2, channels_out=2, height=4, settings=settings)
        with use_backend(backend):  # type: ignore[arg-type]
            output = problem.run(*problem.tensors())
        torch.testing.assert_close(output, by_hand(problem), rtol=0, atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("stride", [1, 2])
def test_without_movement_it_is_a_convolution(backend: str, stride: int) -> None:
    torch.manual_seed(0)
    layer = DeformableConvolution(6, 5, stride).double()
    torch.nn.init.zeros_(layer.conv_offset.weight)
    torch.nn.init.zeros_(layer.conv_offset.bias)  # type: ignore[arg-type]
    features = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    with use_backend(backend):  # type: ignore[arg-type]
        half = layer(features)
    torch.testing.assert_close(half, 0.5 * conv2d(features, layer.weight, stride=stride, padding=1))


@BACKENDS
def test_gradients_by_finite_differences(backend: str) -> None:
    problem = ModulatedProblem(batch=1, height=3, width=4, channels=1, channels_out=2)
    leaves = [tensor.requires_grad_() for tensor in problem.tensors(reach=0.9)]
    with use_backend(backend):  # type: ignore[arg-type]
        assert torch.autograd.gradcheck(problem.run, leaves, eps=1e-6, atol=1e-7)


@needs_native
def test_bands_of_prediction_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ModulatedProblem(height=6, width=11)
    tensors = problem.tensors()
    trained = outputs_and_gradients(problem.run, tensors, "native")[0]
    for numbers in (1, 300, 10_000):
        monkeypatch.setattr(modulated_convolution, "_BAND_NUMBERS", numbers)
        with torch.no_grad():
            assert_close((problem.run(*tensors),), (trained,), 1e-12)


@BACKENDS
def test_batch_layout_and_nothing(backend: str) -> None:
    problem = ModulatedProblem(batch=3)
    tensors = problem.tensors()
    with use_backend(backend):  # type: ignore[arg-type]
        joint = problem.run(*tensors)
        singles = [problem.run(*(t[b : b + 1] for t in tensors[:3]), tensors[3]) for b in range(3)]
        torch.testing.assert_close(joint, torch.cat(singles), rtol=0, atol=1e-12)
        strided = problem.run(*(t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors))
        torch.testing.assert_close(joint, strided, rtol=0, atol=1e-12)
        assert joint.is_contiguous(memory_format=torch.channels_last)
        empty = problem.run(*(t[:0] for t in tensors[:3]), tensors[3])
        assert empty.shape == (0, *joint.shape[1:])


@BACKENDS
def test_offsets_that_are_not_finite_sample_nothing(backend: str) -> None:
    problem = ModulatedProblem(batch=1, groups=1)
    input, offset, mask, weight = problem.tensors()
    point, wild = 4, offset.clone()
    for dy in (float("nan"), float("inf"), -float("inf"), 1e30):
        wild[:, 2 * point] = dy
        without = mask.clone()
        without[:, point] = 0
        with use_backend(backend):  # type: ignore[arg-type]
            torch.testing.assert_close(
                problem.run(input, wild, mask, weight), problem.run(input, offset, without, weight)
            )


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(backend: str, dtype: torch.dtype) -> None:
    problem = ModulatedProblem()
    tensors = problem.tensors(torch.float32)
    with use_backend(backend):  # type: ignore[arg-type]
        exact = problem.run(*tensors)
        half = problem.run(*(t.to(dtype) for t in tensors))
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.3)
        with torch.autocast("cpu", torch.bfloat16):
            cast = problem.run(*tensors)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, exact)


@needs_native
def test_compiles_in_one_graph_with_gradients() -> None:
    problem = ModulatedProblem()
    tensors = problem.tensors(torch.float32)
    compiled = torch.compile(problem.run, fullgraph=True, backend="aot_eager")
    eager = outputs_and_gradients(problem.run, tensors, "native")
    assert_close(outputs_and_gradients(compiled, tensors, "native"), eager, 1e-5)


def test_messages() -> None:
    problem = ModulatedProblem()
    input, offset, mask, weight = problem.tensors()
    for change, message in (
        ({"weight": weight[:, :-1]}, r"weight must be \(channels out, 6, side, side\)"),
        ({"mask": mask[:, :-1]}, r"mask must have shape \(2, groups \* 9, 5, 7\) with groups that divide"),
        ({"offset": offset[:, :-1]}, r"offset must have shape \(2, 36, 5, 7\) for this mask"),
        ({"input": input[..., :0]}, r"the padded input must be at least as large"),
        ({"mask": mask.float()}, r"float64 may not be mixed"),
        ({"input": input[0]}, r"input must have 4 dimensions"),
        ({"stride": 0}, r"stride and dilation must be at least 1"),
    ):
        arguments = {"input": input, "offset": offset, "mask": mask, "weight": weight, "padding": 1, **change}
        with pytest.raises(ValueError, match=message):
            deform_conv2d(**arguments)  # type: ignore[arg-type]
