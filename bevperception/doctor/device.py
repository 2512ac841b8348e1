"""Compare every operator on a device with the float64 reference, then time it: ``doctor --gpu``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bevperception.benchmarks.ops_cases import CASES, AttentionCase, Case, ConvolutionCase, ModulatedCase
from bevperception.benchmarks.spatial_case import SpatialCase, native_call
from bevperception.ops import dcnv3, deform_conv2d, ms_deform_attn, native, use_backend
from bevperception.ops.backend import BackendName

Call = Callable[..., Tensor]

PROBLEMS: tuple[Case, ...] = (
    AttentionCase("", "one level", 2, 25, ((5, 7),), 4, "grid"),
    AttentionCase("", "three levels, odd sizes", 3, 37, ((6, 9), (3, 4), (1, 1)), 3, "random"),
    ConvolutionCase("", "narrow", 2, 5, 7, 1),
    ConvolutionCase("", "wide", 3, 9, 6, 5),
    ModulatedCase("", "odd sizes", 2, 7, 9, 20),
    SpatialCase("", "cameras", 2, 11, ((6, 9), (3, 4)), 4),
)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Largest difference from the float64 reference, as a share of the largest magnitude."""


@dataclass(frozen=True)
class Check:
    """One comparison: its name, the largest relative difference, and the tolerance."""

    what: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        """False for NaN, too."""
        return self.difference <= self.allowed


def operator_call(case: Case, backend: BackendName, device: torch.device, dtype: torch.dtype) -> Call:
    """A case's operator; positions are never of half precision.

    Args:
        case: sizes.
        backend: which implementation.
        device: of the tensors.
        dtype: of positions and weights.
    """
    if isinstance(case, SpatialCase):
        fused = native_call(case, dtype, device)

        def call(*tensors: Tensor) -> Tensor:
            with use_backend(backend):
                return fused(*tensors)

        return call

    def call_plain(value: Tensor, first: Tensor, second: Tensor, *weight: Tensor) -> Tensor:
        with use_backend(backend):
            if isinstance(case, ModulatedCase):
                return deform_conv2d(value, first, second, *weight, padding=1)
            if isinstance(case, ConvolutionCase):
                return dcnv3(value, first, second, groups=case.groups)
            return ms_deform_attn(value, case.shapes, first, second)

    return call_plain


def verify(device: torch.device) -> Iterator[Check]:
    """Compare every operator, forward and backward, in every dtype with the reference in float64 on the CPU.

    Args:
        device: where the native operators run.
    """
    for case in PROBLEMS:
        for dtype, allowed in TOLERANCES.items():
            real = torch.float64 if dtype == torch.float64 else torch.float32
            given = case.inputs("local", torch.float64)
            tensors = [t.to(dtype if k == 0 else real) for k, t in enumerate(given)]
            exact = operator_call(case, "reference", torch.device("cpu"), torch.float64)
            expected = _run(exact, [t.double() for t in tensors])
            tested = operator_call(case, "native", device, real)
            actual = _run(tested, [t.to(device) for t in tensors])
            name = f"{case.operator}, {case.title}, {str(dtype).removeprefix('torch.')}"
            parts = ("output", *(f"gradient {k}" for k in range(1, len(expected))))
            for what, a, b in zip(parts, actual, expected, strict=True):
                yield Check(f"{name}: {what}", _difference(a, b), allowed)
        yield Check(
            f"{case.operator}, {case.title}: gradients twice the same bits", _repeat(case, device), 0.0
        )


def _run(call: Call, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Run an operator forward and backward; returns output and gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = call(*leaves)
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).cos().view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output))]


def _difference(actual: Tensor, expected: Tensor) -> float:
    largest = expected.abs().max().clamp_min(1e-30)
    return float((actual.double().cpu() - expected).abs().max() / largest)


def _repeat(case: Case, device: torch.device) -> float:
    """Largest difference of two deterministic runs."""
    tensors = [t.to(device) for t in case.inputs("local", torch.float32)]
    with _deterministic():
        first, second = (
            _run(operator_call(case, "native", device, torch.float32), tensors) for _ in range(2)
        )
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one case: forward alone, and forward with backward."""

    case: str
    who: str
    forward_ms: float
    both_ms: float


def time_operators(device: torch.device, keys: Sequence[str], calls: int = 20) -> Iterator[Timing]:
    """Time native (float32 and float16) and reference operators at the shapes of real models.

    Args:
        device: where.
        keys: of ``benchmarks.ops_cases.CASES``.
        calls: of which the median is taken.
    """
    competitors: tuple[tuple[str, BackendName, torch.dtype], ...] = (
        ("native float32", "native", torch.float32),
        ("native float16", "native", torch.float16),
        ("reference float32", "reference", torch.float32),
    )
    for key in keys:
        case = CASES[key]
        for who, backend, dtype in competitors:
            given = case.inputs("local", torch.float32)
            tensors = [t.to(device, dtype if k == 0 else torch.float32) for k, t in enumerate(given)]
            call = operator_call(case, backend, device, torch.float32)
            forward = _median_ms(lambda: _forward(call, tensors), device, calls)  # noqa: B023
            both = _median_ms(lambda: _run(call, tensors), device, calls)  # noqa: B023
            yield Timing(f"{key:<3} {case.operator}, {case.title}", who, forward, both)


def _forward(call: Call, tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        call(*tensors)


def _median_ms(function: Callable[[], object], device: torch.device, calls: int) -> float:
    """Median duration of a call in milliseconds, by CUDA events on a GPU; two more calls warm up first."""
    samples: list[float] = []
    for _ in range(calls + 2):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize(device)
            samples.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            function()
            samples.append(1e3 * (time.perf_counter() - start))
    return statistics.median(samples[2:])


def report_device() -> bool:
    """Print all checks that fail, how many passed, and the times; on the CPU where there is no GPU.

    Returns:
        True if everything passed.

    Raises:
        ConfigError: the native operators are not built for the device.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        built = ", ".join(f"sm_{arch}" for arch in native.cuda_architectures())
        print(f"Operators on {torch.cuda.get_device_name()}, kernels for {built or 'no architecture'}")
    else:
        print(
            "No GPU is usable here: the same checks on the CPU, for practice. They say nothing about a GPU."
        )
    checks = list(verify(device))
    for check in checks:
        if not check.passed:
            print(f"  FAIL  {check.what}: differs by {check.difference:.1e}, allowed {check.allowed:.1e}")
    passed = sum(check.passed for check in checks)
    near = max(checks, key=lambda check: check.difference / max(check.allowed, 1e-300))
    print(f"  {passed} of {len(checks)} passed; nearest to its limit: {near.what}, {near.difference:.1e}")
    print(f"\n  {'milliseconds':<64}{'forward':>10}{'+ backward':>12}")
    keys = list(CASES) if device.type == "cuda" else ["ii", "c1", "s4"]
    for timing in time_operators(device, keys, 20 if device.type == "cuda" else 3):
        shown = f"{timing.case}: {timing.who}"
        print(f"  {shown:<64}{timing.forward_ms:>10.3f}{timing.both_ms:>12.3f}", flush=True)
    return passed == len(checks)
