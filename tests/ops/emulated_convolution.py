"""The convolution by split numbers against a direct sum, where its tile registers are emulated: a program.

    python tests/ops/emulated_convolution.py LIBRARY

prints the largest error of results of about 1. Whoever starts it sees from the exit status, under a
sanitizer, whether it read or wrote elsewhere.
"""

from __future__ import annotations

import sys

import torch
from torch.nn import functional


def main() -> int:
    """The program."""
    torch.set_num_threads(2)
    torch.ops.load_library(sys.argv[1])
    torch.ops.bevperception.select_cpu_isa("amx")
    worst = 0.0
    for kernel, stride, inputs, size in (
        (1, 1, 64, (2, 5, 9)),
        (3, 2, 64, (1, 7, 20)),
        (3, 1, 96, (2, 3, 5)),
        (7, 2, 3, (2, 9, 23)),
    ):
        torch.manual_seed(kernel + stride)
        padding = kernel // 2
        pixels, bias = torch.randn(*size, inputs), torch.randn(64)
        weight = torch.randn(64, inputs, kernel, kernel) * (inputs * kernel**2) ** -0.5
        maps = pixels.permute(0, 3, 1, 2).double()
        expected = functional.conv2d(maps, weight.double(), bias.double(), stride, padding).relu()
        result = torch.full_like(expected.permute(0, 2, 3, 1), float("nan"), dtype=torch.float32)
        result = result.contiguous()
        torch.ops.bevperception.convolve_split_(result, pixels, weight, bias, stride, padding, False, "relu")
        worst = max(worst, float((result - expected.permute(0, 2, 3, 1)).abs().max()))
    print(worst)
    return 0


if __name__ == "__main__":
    sys.exit(main())
