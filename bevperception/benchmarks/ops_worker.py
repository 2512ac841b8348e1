"""One competitor in a process of its own: settings such as huge pages hold for a whole process.

Runs as ``python -m bevperception.benchmarks.ops_worker COMPETITOR THREADS keep|return``, the last being
what it does with memory that it frees. It says once that it is ready; then each line on stdin is a JSON
request, each line on stdout its JSON answer; see :func:`measure`.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bevperception import ops
from bevperception.benchmarks.ops_cases import CASES, AttentionCase, Case, ConvolutionCase, ModulatedCase
from bevperception.benchmarks.spatial_case import Attention, SpatialCase, native_call, published_call
from bevperception.benchmarks.timing import peak_extra_bytes, sample_seconds
from bevperception.malloc import keep_freed_memory

Call = Callable[..., Tensor]

PEERS = {"torch-ms-deform-attn": "torch_ms_deform_attn", "deformops": "deformops.registry"}
"""PyPI packages that hold a multi-scale deformable attention, and the module to import."""

SMALL_CASES: tuple[Case, ...] = (
    AttentionCase("small", "agreement", 2, 25, ((6, 9), (3, 4)), 4, "grid"),
    ConvolutionCase("small", "agreement", 2, 5, 7, 2),
    ModulatedCase("small", "agreement", 2, 5, 7, 6),
    SpatialCase("small", "agreement", 2, 9, ((6, 9), (3, 4)), 4),
)
AGREEMENT = 1e-4
"""Largest difference from the reference in float32, as a share of the largest magnitude."""


KEEP, RETURN = "keep", "return"
"""A worker's treatment of freed memory, see :func:`~bevperception.malloc.keep_freed_memory`."""

PUBLISHED = "published"
"""Spatial cross-attention by the published scheme around this project's ms_deform_attn."""


def competitor_call(competitor: str, case: Case, dtype: torch.dtype = torch.float32) -> Call | None:
    """A competitor's operator for a case; None if it has none.

    Spatial cross-attention is the published scheme around a competitor's multi-scale deformable attention,
    for all but "native".

    Args:
        competitor: "native", "reference", "published", or a key of PEERS.
        case: sizes.
        dtype: that the call will have.

    Raises:
        ImportError, SyntaxError: the peer is not installed, or not for this Python.
        ConfigError: the native operators are not built.
    """
    if competitor in ("native", PUBLISHED):
        ops.set_backend("native")
    if isinstance(case, SpatialCase):
        if competitor == "native":
            return native_call(case, dtype)
        return published_call(case, dtype, _attention(competitor))
    if competitor == PUBLISHED:
        return None
    if isinstance(case, AttentionCase):
        attention, shapes = _attention(competitor), case.shapes
        return lambda value, locations, weights: attention(value, shapes, locations, weights)
    if competitor in PEERS:
        return None
    if isinstance(case, ModulatedCase):
        modulated = ops.deform_conv2d if competitor == "native" else ops.deform_conv2d_reference
        return functools.partial(modulated, padding=1)
    convolution = ops.dcnv3 if competitor == "native" else ops.dcnv3_reference
    return functools.partial(convolution, groups=case.groups)


def _attention(competitor: str) -> Attention:
    """A competitor's multi-scale deformable attention."""
    if competitor not in PEERS:
        return ops.ms_deform_attn_reference if competitor == "reference" else ops.ms_deform_attn
    module = importlib.import_module(PEERS[competitor])
    operator = module.ms_deform_attn if competitor == "torch-ms-deform-attn" else module.msda

    def call(
        value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
    ) -> Tensor:
        shapes = torch.tensor(spatial_shapes)
        starts = torch.cat([torch.zeros(1, dtype=torch.long), shapes.prod(1).cumsum(0)[:-1]])
        output: Tensor = operator(value, shapes, starts, locations, weights)
        return output

    return call


@functools.cache
def disagreement(competitor: str, operator: str) -> float:
    """Largest difference of output and gradients from the reference on a small case (a share)."""
    case = next(case for case in SMALL_CASES if case.operator == operator)
    results = []
    for name in (competitor, "reference"):
        call = competitor_call(name, case)
        assert call is not None
        leaves = [t.requires_grad_() for t in case.inputs("local", torch.float32)]
        output = call(*leaves)
        results.append((output.detach(), *torch.autograd.grad(output.square().sum(), leaves)))
    return max(float((a - e).abs().max() / e.abs().max()) for a, e in zip(*results, strict=True))


def measure(competitor: str, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each call, forward alone and forward + backward.

    Args:
        competitor: see :func:`competitor_call`.
        request: "case" (a key of CASES), "locations", "dtype" and "seconds" to spend on each of the two.

    Returns:
        "forward" and "both": lists of seconds, "forward_bytes" and "both_bytes": most memory beyond the
        arguments'; or "missing": why there is nothing to measure.
    """
    case, dtype = CASES[request["case"]], getattr(torch, request["dtype"])
    try:
        call = competitor_call(competitor, case, dtype)
    except (ImportError, SyntaxError) as error:
        return {"missing": f"{type(error).__name__}: {error}"}
    if call is None:
        return {"missing": f"has no {case.operator}"}
    difference = disagreement(competitor, case.operator)
    if not difference <= AGREEMENT:
        return {"missing": f"differs from the reference by {difference:.1e}"}
    tensors = case.inputs(request["locations"], dtype)
    leaves = tuple(t.clone().requires_grad_() for t in tensors)
    cotangent = torch.randn_like(call(*tensors))

    def forward() -> None:
        with torch.no_grad():
            call(*tensors)

    def both() -> None:
        torch.autograd.grad(call(*leaves), leaves, cotangent)

    both()  # warm-up
    return {
        "forward": sample_seconds(forward, request["seconds"]),
        "both": sample_seconds(both, request["seconds"]),
        "forward_bytes": peak_extra_bytes(forward),
        "both_bytes": peak_extra_bytes(both),
    }


def main() -> None:
    """Answer requests until stdin closes."""
    competitor, threads, freed = sys.argv[1:]
    torch.set_num_threads(int(threads))
    if freed == KEEP:
        keep_freed_memory()
    print(json.dumps({"ready": competitor}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(competitor, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
