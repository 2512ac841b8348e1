"""What the C library does with memory that a program frees."""

from __future__ import annotations

import ctypes
import math
import platform

import numpy as np
import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""``M_TRIM_THRESHOLD`` and ``M_MMAP_THRESHOLD`` of glibc's malloc.h."""
_NEVER, _LARGEST = -1, 2**31 - 1
_LINE = 64
"""Bytes of a cache line."""


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for the next frame, from now on and for the whole process.

    By default it hands large pieces back to Linux at once, and Linux clears every page of the next ones: of
    a published-size model on a CPU, whose activations take hundreds of megabytes, that is a sixth to two
    fifths of the time of a frame. The process' memory then stays at its peak, which may be twice as high.

    Returns:
        Whether it could be had: not with another C library.

    Source: mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return all(mallopt(*option) == 1 for option in ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _NEVER)))


def reusable_empty(*shape: int) -> Tensor:
    """An uninitialised float32 tensor, aligned to cache lines, whose memory serves the next one of its size.

    PyTorch's own is aligned by the C library, and glibc (2.36) wants more for that than it got back when the
    last piece of this size was freed: where freed memory is kept, it grows with every frame for a while.

    Args:
        shape: of the tensor.

    Returns:
        It, contiguous, on the CPU.
    """
    count, item = math.prod(shape), np.dtype(np.float32).itemsize
    memory = np.empty(count + _LINE // item, np.float32)
    first = -memory.ctypes.data % _LINE // item
    return torch.from_numpy(memory)[first : first + count].view(shape)
