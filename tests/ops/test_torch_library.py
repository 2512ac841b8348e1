"""The native operators inside PyTorch: opcheck, compile, export, autocast, half precision."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from bevperception.ops import use_backend
from tests.ops.problems import (
    AttentionProblem,
    ConvolutionProblem,
    Problem,
    assert_close,
    needs_native,
    outputs_and_gradients,
)

BOTH = pytest.mark.parametrize(
    "problem", [AttentionProblem(), ConvolutionProblem()], ids=["ms_deform_attn", "dcnv3"]
)
BACKENDS = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])


def operator_call(problem: Problem, tensors: tuple[Tensor, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The registered operator and its positional arguments."""
    if isinstance(problem, AttentionProblem):
        value, locations, weights = tensors
        shapes = [n for shape in problem.shapes for n in shape]
        return torch.ops.bevperception.ms_deform_attn.default, (value, shapes, locations, weights)
    return torch.ops.bevperception.dcnv3.default, (*tensors, 3, 1, 1, 1, problem.groups, 1.0, False)


@needs_native
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(problem: Problem, dtype: torch.dtype, requires_grad: bool) -> None:
    tensors = tuple(t.requires_grad_(requires_grad) for t in problem.tensors(dtype))
    operator, arguments = operator_call(problem, tensors)
    torch.library.opcheck(operator, arguments)


@needs_native
@BOTH
def test_opcheck_of_the_backward_operator(problem: Problem) -> None:
    operator, arguments = operator_call(problem, problem.tensors())
    cotangent = torch.randn_like(operator(*arguments))
    backward = getattr(torch.ops.bevperception, operator.name().split("::")[1] + "_backward").default
    torch.library.opcheck(backward, (cotangent, *arguments))


@needs_native
@BOTH
def test_second_derivative_is_refused(problem: Problem) -> None:
    tensors = [t.requires_grad_() for t in problem.tensors()]
    with use_backend("native"):
        (gradient,) = torch.autograd.grad(
            problem.run(*tensors).square().sum(), tensors[:1], create_graph=True
        )
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@BACKENDS
@BOTH
def test_compile_whole_graph_with_backward(problem: Problem, backend: str) -> None:
    torch.compiler.reset()
    tensors = problem.tensors(torch.float32)
    compiled = torch.compile(problem.run, fullgraph=True, backend="aot_eager")
    assert_close(
        outputs_and_gradients(compiled, tensors, backend),
        outputs_and_gradients(problem.run, tensors, backend),
        1e-5,
    )


@needs_native
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_compile_with_inductor_and_other_sizes() -> None:
    torch.compiler.reset()

    def scaled(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return AttentionProblem().run(value * 2, locations, weights) + 1

    compiled = torch.compile(scaled, fullgraph=True, dynamic=True)
    for queries in (5, 9):
        tensors = AttentionProblem(queries=queries).tensors(torch.float32)
        assert_close(
            outputs_and_gradients(compiled, tensors, "native"),
            outputs_and_gradients(scaled, tensors, "native"),
            1e-5,
        )


@needs_native
@BOTH
def test_export(problem: Problem) -> None:
    class Module(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return problem.run(a, b, c)

    tensors = problem.tensors(torch.float32)
    with use_backend("native"):
        program = torch.export.export(Module(), tensors)
        assert "bevperception" in program.graph_module.code
        torch.testing.assert_close(program.module()(*tensors), problem.run(*tensors))


@BACKENDS
@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(problem: Problem, dtype: torch.dtype, backend: str) -> None:
    tensors = problem.tensors(dtype)
    half = outputs_and_gradients(problem.run, tensors, backend)
    assert all(t.dtype == dtype for t in half)
    full = outputs_and_gradients(problem.run, tuple(t.float() for t in tensors), backend)
    assert torch.equal(half[0], full[0].to(dtype))
    assert_close(tuple(t.float() for t in half[1:]), full[1:], 0.02)


@BACKENDS
def test_mixed_precision_inputs(backend: str) -> None:
    value, locations, weights = AttentionProblem().tensors(torch.float32)
    with use_backend(backend):  # type: ignore[arg-type]
        output = AttentionProblem().run(value.bfloat16(), locations, weights.half())
        expected = AttentionProblem().run(value.bfloat16().float(), locations, weights.half().float())
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected.bfloat16())


@BACKENDS
@BOTH
def test_autocast_computes_and_returns_float32(problem: Problem, backend: str) -> None:
    first, *others = problem.tensors(torch.float32)
    first = first.bfloat16().requires_grad_()
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):  # type: ignore[arg-type]
        output = problem.run(first, *others)
    assert output.dtype == torch.float32
    with use_backend(backend):  # type: ignore[arg-type]
        torch.testing.assert_close(output, problem.run(first.float(), *others))
    output.sum().backward()
    assert first.grad is not None
    assert first.grad.dtype == torch.bfloat16


@needs_native
def test_autocast_of_the_operator_itself() -> None:
    tensors = tuple(t.bfloat16() for t in AttentionProblem().tensors())
    operator, arguments = operator_call(AttentionProblem(), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert operator(*arguments).dtype == torch.float32


@needs_native
def test_operator_refuses_what_its_kernels_do_not_take() -> None:
    problem = AttentionProblem()
    operator, (value, shapes, locations, weights) = operator_call(problem, problem.tensors())
    for arguments, message in (
        ((value.half(), shapes, locations.half(), weights.half()), "float32 or float64"),
        ((value, shapes, locations.float(), weights), "one dtype"),
        ((value, shapes[:2], locations, weights), "value has a shape"),
        ((value, [], locations, weights), "at least one level"),
        ((value, [-1, *shapes[1:]], locations, weights), "positive"),
        ((value, shapes, locations[:, :1], weights), "attention_weights has a shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)
    convolution = ConvolutionProblem()
    operator, (input, offset, mask, *numbers) = operator_call(convolution, convolution.tensors())
    with pytest.raises(RuntimeError, match="offset has a shape"):
        operator(input, offset[:, 1:], mask, *numbers)
    with pytest.raises(RuntimeError, match="settings do not fit"):
        operator(input, offset, mask, 3, 0, *numbers[2:])
