"""The least time a machine could need for an operator: numbers to move, and arithmetic to do.

Source: Williams, Waterman, Patterson, "Roofline", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bevperception.benchmarks.ops_cases import (
    AttentionCase,
    Case,
    ConvolutionCase,
    LocationKind,
    ModulatedCase,
)
from bevperception.benchmarks.spatial_case import ANCHORS, CHANNELS, HEADS, SpatialCase

_CACHED_BYTES = 64 << 20
"""Most that a cache is expected to hold."""

_FLOPS_OF_CORNER = 2
"""A multiplication and an addition a channel; what it takes to find the corners is left out."""


@dataclass(frozen=True)
class Work:
    """Least work of a forward call.

    Args:
        bytes: of arguments and result, each moved once.
        flops: multiplications and additions of the samples.
        looked_at_bytes: of the arguments and the result, without cells of a map that no point looks at;
            None if that was not counted, or is too much for a cache.
    """

    bytes: int
    flops: int
    looked_at_bytes: int | None = None


@dataclass(frozen=True)
class Machine:
    """Measured speeds of a machine.

    Args:
        bytes_per_s: copying large tensors, bytes read and written.
        flops_per_s: of a large matrix product.
        cached_bytes_per_s: reading what the caches near the cores cannot hold, but a shared one can.
    """

    bytes_per_s: float
    flops_per_s: float
    cached_bytes_per_s: float

    def bound_ms(self, work: Work) -> float:
        """Milliseconds below which the work cannot be done."""
        return 1e3 * max(work.bytes / self.bytes_per_s, work.flops / self.flops_per_s)

    def cache_bound_ms(self, work: Work) -> float | None:
        """Milliseconds in which a shared cache can at best hand over what the work looks at, if counted."""
        if work.looked_at_bytes is None:
            return None
        return 1e3 * work.looked_at_bytes / self.cached_bytes_per_s

    def limit(self, work: Work) -> str:
        """Origin of the bound: 'memory' or 'arithmetic'."""
        by_memory = work.bytes / self.bytes_per_s >= work.flops / self.flops_per_s
        return "memory" if by_memory else "arithmetic"


def measure_machine(threads: int, dtype: torch.dtype = torch.float32) -> Machine:
    """Bandwidth and peak of this machine, each the best of several tries.

    Args:
        threads: that the operators have.
        dtype: of the matrix product.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.ones(1 << 26)  # 256 MB, beyond any cache
        target = torch.empty_like(source)
        moved = 2 * source.numel() * source.element_size()
        bandwidth = moved / _best_s(lambda: target.copy_(source))
        side = 1536
        left = torch.ones(side, side, dtype=dtype)
        peak = 2 * side**3 / _best_s(lambda: left @ left)
        near = torch.ones(1 << 21)  # two of 8 MB
        far = torch.ones_like(near)
        cached = 2 * near.numel() * near.element_size() / _best_s(lambda: torch.dot(near, far), tries=50)
        return Machine(bandwidth, peak, cached)
    finally:
        torch.set_num_threads(before)


def forward_work(case: Case, bytes_of_number: int = 4, kind: LocationKind = "local") -> Work:
    """Least work of a case's forward call.

    Args:
        case: sizes.
        bytes_of_number: 4 for float32.
        kind: of its sampling points.
    """
    unseen: int | None = None  # numbers of maps that no point looks at
    product = 0  # of a matrix product after the samples
    if isinstance(case, ConvolutionCase):
        cells = case.batch * case.height * case.width
        samples, channels = cells * case.groups * 9, 16
        numbers = 2 * cells * case.groups * channels + 3 * samples
        unseen = 0 if numbers * bytes_of_number <= _CACHED_BYTES else None  # points look everywhere
    elif isinstance(case, ModulatedCase):
        cells, channels = case.batch * case.height * case.width, case.channels
        samples = cells * 9
        numbers = 2 * cells * channels + 3 * samples + 9 * channels**2
        product = 2 * samples * channels**2
    elif isinstance(case, SpatialCase):
        rows, cameras = case.batch * case.side**2, 6 * case.batch
        per_row = HEADS * len(case.shapes) * case.points
        entries = int(case.seen(torch.float64)[1].any(-1).sum())
        samples, channels = entries * per_row, CHANNELS
        value = cameras * sum(h * w for h, w in case.shapes) * HEADS * CHANNELS
        numbers = value + 3 * rows * per_row + rows * HEADS * CHANNELS + 2 * entries * ANCHORS
    else:
        assert isinstance(case, AttentionCase)
        rows, channels = case.batch * (case.queries or case.cells), 32
        samples = rows * 8 * len(case.shapes) * case.points
        numbers = case.batch * case.cells * 8 * channels + 3 * samples + rows * 8 * channels
        is_small = numbers * bytes_of_number <= _CACHED_BYTES
        unseen = case.cells_unseen(kind) * channels if is_small else None
    return Work(
        bytes=numbers * bytes_of_number,
        flops=samples * channels * 4 * _FLOPS_OF_CORNER + product,
        looked_at_bytes=None if unseen is None else (numbers - unseen) * bytes_of_number,
    )


def _best_s(call: Callable[[], object], tries: int = 7) -> float:
    call()
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
