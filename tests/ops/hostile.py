"""Calls of the native operators with arguments that nobody means well: a program, so that a crash is seen.

    python tests/ops/hostile.py LIBRARY CALLS INSTRUCTION_SET ...

makes so many random calls with each instruction set, each call from its own seed, and prints a line of how
many ran and how many were refused. Whoever starts it sees from the exit status whether the process survived;
under a sanitizer also whether it read or wrote elsewhere.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HUGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**62, -(2**62))
PLACES = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e10, 2.0**31, -(2.0**31), -1.0, 1.0, 0.0)
Call = Callable[[], Any]


class Hostile:
    """One random call.

    Args:
        seed: of everything random.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice((torch.float32, torch.float64))

    def call(self) -> Call:
        """The call, not yet made."""
        make = self.random.choice((self.attention, self.convolution, self.rows, self.norms))
        return make()

    def attention(self) -> Call:
        """ms_deform_attn or its backward."""
        pick = self.random.randint
        shapes = [(pick(1, 5), pick(1, 5)) for _ in range(pick(1, 3))]
        batch, queries, heads, channels, points = pick(0, 2), pick(0, 4), pick(1, 3), pick(1, 19), pick(0, 4)
        if pick(0, 49) == 0:  # a map of which rows are visited tile by tile
            shapes, batch, queries, heads, channels, points = [(66, 70)], 1, pick(190, 240), 8, 32, pick(0, 1)
        cells = sum(h * w for h, w in shapes)
        value = self.numbers(batch, cells, heads, channels)
        locations = self.places(batch, queries, heads, len(shapes), points, 2)
        weights = self.numbers(batch, queries, heads, len(shapes), points)
        sizes = self.lies([n for shape in shapes for n in shape])
        tensors = [self.bent(t) for t in (value, locations, weights)]
        operators = torch.ops.bevperception
        if pick(0, 1):
            return lambda: operators.ms_deform_attn(tensors[0], sizes, *tensors[1:])
        gradient = self.bent(self.numbers(batch, queries, heads * channels))
        return lambda: operators.ms_deform_attn_backward(gradient, tensors[0], sizes, *tensors[1:])

    def convolution(self) -> Call:
        """dcnv3 or its backward."""
        pick = self.random.randint
        batch, height, width, groups, channels = pick(0, 2), pick(1, 6), pick(1, 6), pick(1, 3), pick(1, 17)
        kernel, stride, padding, dilation = pick(1, 4), pick(1, 3), pick(0, 3), pick(1, 3)
        remove = bool(pick(0, 1)) and kernel % 2 == 1
        high, wide = (
            max(0, (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1) for n in (height, width)
        )
        count = groups * (kernel**2 - remove)
        shape = (batch, high, wide)
        tensors = [
            self.bent(self.numbers(batch, height, width, groups * channels)),
            self.bent(self.places(*shape, 2 * count)),
            self.bent(self.numbers(*shape, count)),
        ]
        whole = self.lies([kernel, stride, padding, dilation, groups])
        scale = self.random.choice((1.0, 2.0, *PLACES))
        operators = torch.ops.bevperception
        if pick(0, 1):
            return lambda: operators.dcnv3(*tensors, *whole, scale, remove)
        gradient = self.bent(self.numbers(*shape, groups * channels))
        return lambda: operators.dcnv3_backward(gradient, *tensors, *whole, scale, remove)

    def rows(self) -> Call:
        """deform_attn or its backward, with and without compressed rows."""
        pick = self.random.randint
        shapes = [(pick(1, 5), pick(1, 5)) for _ in range(pick(1, 2))]
        maps, heads, channels, points, anchors = pick(1, 3), pick(1, 3), pick(1, 17), pick(1, 4), pick(1, 3)
        samples = len(shapes) * points
        rows = maps * pick(0, 3)
        if pick(0, 49) == 0:  # as above
            shapes, heads, channels, points, rows = [(66, 70)], 8, 32, 1, maps * pick(190, 240)
            samples = 1
        compressed = bool(pick(0, 1))
        counts = [pick(0, 3) for _ in range(rows)] if compressed else [1] * rows
        start = [sum(counts[:k]) for k in range(rows + 1)]
        map_of = [pick(0, maps - 1) for _ in range(start[-1])]
        value = self.bent(self.numbers(maps, sum(h * w for h, w in shapes), heads, channels))
        offsets = self.bent(self.places(rows, heads * samples * 2))
        logits = self.bent(self.places(rows, heads * samples))
        references = self.bent(self.places(start[-1], anchors, 2))
        sizes = self.lies([n for shape in shapes for n in shape])
        anchor_of = self.lies([pick(0, anchors - 1) for _ in range(samples)])
        groups = self.lies([self.random.choice((1, points))])[0]
        entries = [torch.tensor(self.lies(x), dtype=torch.int64) for x in (start, map_of)]
        given = entries if compressed else [None, None]
        call = (value, sizes, offsets, logits, references, anchor_of, groups, *given)
        if pick(0, 1):
            return lambda: torch.ops.bevperception.deform_attn(*call)
        gradient, wanted = self.bent(self.numbers(rows, heads * channels)), bool(pick(0, 1))
        return lambda: torch.ops.bevperception.deform_attn_backward(gradient, *call, wanted)

    def norms(self) -> Call:
        """layer_norm or softmax."""
        pick = self.random.randint
        channels = pick(0, 70)
        rows = self.bent(self.places(*(pick(0, 5) for _ in range(pick(0, 3))), channels))
        if pick(0, 1):
            return lambda: torch.ops.bevperception.softmax(rows)
        if pick(0, 2) == 0:
            rows = rows.bfloat16()
        weight, bias = self.bent(self.numbers(channels)), self.bent(self.numbers(channels))
        epsilon = self.random.choice((1e-5, 0.0, *PLACES))
        return lambda: torch.ops.bevperception.layer_norm(rows, weight, bias, epsilon)

    def numbers(self, *shape: int) -> Tensor:
        """Ordinary numbers."""
        return torch.randn(*shape, dtype=self.dtype, generator=self.generator)

    def places(self, *shape: int) -> Tensor:
        """Numbers of which some are very large or none at all."""
        values = self.numbers(*shape)
        flat = values.view(-1)
        for _ in range(self.random.randint(0, 4)):
            if len(flat):
                flat[self.random.randrange(len(flat))] = self.random.choice(PLACES)
        return values

    def lies(self, values: list[int]) -> list[int]:
        """The same whole numbers, or with a false one among them."""
        if values and self.random.random() < 0.25:
            wrong = (*HUGE, -1, 0, self.random.randint(1, 9), values[0] + 1)
            values = list(values)
            values[self.random.randrange(len(values))] = self.random.choice(wrong)
        return values

    def bent(self, tensor: Tensor) -> Tensor:
        """The same numbers in another layout, or fewer of them, or of another type."""
        kind = self.random.random()
        if kind < 0.05 and tensor.numel():
            return tensor.narrow(0, 0, tensor.shape[0] - 1)
        if kind < 0.08:
            return tensor.flatten()
        if kind < 0.1:
            return tensor.to(self.random.choice((torch.float16, torch.int64, torch.float64)))
        if kind < 0.2:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if kind < 0.3:
            return tensor[None].expand(2, *tensor.shape)[1]
        return tensor


def attempt(seed: int) -> bool:
    """Make one call; True if it ran, False if it was refused."""
    call = Hostile(seed).call()
    try:
        call()
    except RuntimeError:
        return False
    return True


def main() -> int:
    """The program."""
    torch.set_num_threads(2)
    torch.ops.load_library(sys.argv[1])
    for isa in sys.argv[3:]:
        torch.ops.bevperception.select_cpu_isa(isa)
        ran = [attempt(seed) for seed in range(int(sys.argv[2]))]
        print(isa, "ran", sum(ran), "refused", len(ran) - sum(ran), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
