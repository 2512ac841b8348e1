"""Random problems for the operators, and what every comparison needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bevperception.ops import dcnv3, deform_conv2d, ms_deform_attn, native, use_backend
from bevperception.ops.deformable_convolution import output_size

needs_native = pytest.mark.skipif(
    not native.STATUS.loaded, reason=f"native operators: {native.STATUS.problem}"
)
ISAS = native.available_cpu_isas() if native.STATUS.loaded else []


@dataclass(frozen=True)
class AttentionProblem:
    """Sizes of a ms_deform_attn call."""

    batch: int = 2
    queries: int = 5
    heads: int = 3
    channels: int = 7
    shapes: tuple[tuple[int, int], ...] = ((4, 6), (3, 2))
    points: int = 3
    seed: int = 0

    def tensors(
        self, dtype: torch.dtype = torch.float64, reach: float = 0.6
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value, locations within ``reach`` of the maps' centres (0.5: the border), weights."""
        generator = torch.Generator().manual_seed(self.seed)
        cells = sum(h * w for h, w in self.shapes)
        points = (self.batch, self.queries, self.heads, len(self.shapes), self.points)
        value = torch.randn(self.batch, cells, self.heads, self.channels, dtype=dtype, generator=generator)
        locations = (torch.rand(*points, 2, dtype=dtype, generator=generator) * 2 - 1) * reach + 0.5
        weights = torch.rand(points, dtype=dtype, generator=generator)
        return value, locations, weights

    def run(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, self.shapes, locations, weights)

    def single(self) -> AttentionProblem:
        return replace(self, batch=1)


@dataclass(frozen=True)
class ConvolutionProblem:
    """Sizes and settings of a dcnv3 call."""

    batch: int = 2
    height: int = 5
    width: int = 7
    groups: int = 3
    channels: int = 5
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def tensors(
        self, dtype: torch.dtype = torch.float64, reach: float = 2.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Input, offsets of up to ``reach`` cells, mask."""
        generator = torch.Generator().manual_seed(self.seed)
        kernel = self.settings.get("kernel_size", 3)
        sizes = [
            output_size(
                n,
                kernel,
                self.settings.get("stride", 1),
                self.settings.get("padding", 1),
                self.settings.get("dilation", 1),
            )
            for n in (self.height, self.width)
        ]
        points = self.groups * (kernel**2 - self.settings.get("remove_center", False))
        channels = self.groups * self.channels
        input = torch.randn(self.batch, self.height, self.width, channels, dtype=dtype, generator=generator)
        offset = (
            torch.rand(self.batch, *sizes, points * 2, dtype=dtype, generator=generator) * 2 - 1
        ) * reach
        mask = torch.rand(self.batch, *sizes, points, dtype=dtype, generator=generator)
        return input, offset, mask

    def run(self, input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return dcnv3(input, offset, mask, groups=self.groups, **self.settings)

    def single(self) -> ConvolutionProblem:
        return replace(self, batch=1)


@dataclass(frozen=True)
class ModulatedProblem:
    """Sizes and settings of a deform_conv2d call."""

    batch: int = 2
    height: int = 5
    width: int = 7
    groups: int = 2
    channels: int = 3
    channels_out: int = 4
    settings: dict[str, Any] = field(default_factory=lambda: {"padding": 1})
    side: int = 3
    seed: int = 0

    def tensors(
        self, dtype: torch.dtype = torch.float64, reach: float = 2.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input, offsets of up to ``reach`` cells, mask, weight."""
        generator = torch.Generator().manual_seed(self.seed)
        settings = [self.settings.get(k, v) for k, v in (("stride", 1), ("padding", 0), ("dilation", 1))]
        sizes = [output_size(n, self.side, *settings) for n in (self.height, self.width)]
        points, channels = self.groups * self.side**2, self.groups * self.channels
        input = torch.randn(self.batch, channels, self.height, self.width, dtype=dtype, generator=generator)
        offset = torch.rand(self.batch, 2 * points, *sizes, dtype=dtype, generator=generator) * 2 - 1
        mask = torch.rand(self.batch, points, *sizes, dtype=dtype, generator=generator)
        weight = torch.randn(
            self.channels_out, channels, self.side, self.side, dtype=dtype, generator=generator
        )
        return input, offset * reach, mask, weight

    def run(self, input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        return deform_conv2d(input, offset, mask, weight, **self.settings)


Problem = AttentionProblem | ConvolutionProblem | ModulatedProblem


def outputs_and_gradients(
    run: Callable[..., Tensor], tensors: tuple[Tensor, ...], backend: str
) -> tuple[Tensor, ...]:
    """The output and the gradients of all tensors for a fixed random cotangent."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    with use_backend(backend):  # type: ignore[arg-type]
        output = run(*leaves)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
        gradients = torch.autograd.grad(output, leaves, cotangent)
    return (output.detach(), *gradients)


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Every number within ``tolerance`` of the largest magnitude of its tensor."""
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        scale = max(1.0, float(e.abs().max())) if e.numel() else 1.0
        torch.testing.assert_close(
            a, e, rtol=0, atol=tolerance * scale, msg=lambda m, k=k: f"tensor {k}: {m}"
        )


def kink_distance(problem: Problem, tensors: tuple[Tensor, ...]) -> Tensor:
    """Smallest distance of a sampling point from a cell line, in cells: gradients jump there."""
    if isinstance(problem, AttentionProblem):
        size = torch.tensor([[w, h] for h, w in problem.shapes], dtype=tensors[1].dtype)[:, None]
        position = tensors[1] * size - 0.5
    elif isinstance(problem, ModulatedProblem):
        position = tensors[1]
    else:
        position = tensors[1] * problem.settings.get("offset_scale", 1.0)
        scale = problem.settings.get("offset_scale", 1.0)
        if scale != int(scale):  # the grid itself lies off the cell centres
            position = torch.cat([position + scale * k for k in range(-2, 3)])
    return (position - position.round()).abs().min() if position.numel() else torch.tensor(1.0)


@contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Force an instruction set of the native kernels."""
    native.select_cpu_isa(name)
    try:
        assert native.cpu_isa() == name
        yield
    finally:
        native.select_cpu_isa(None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set PyTorch's number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
