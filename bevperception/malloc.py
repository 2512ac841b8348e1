"""Control of the C library's handling of freed memory."""

from __future__ import annotations

import ctypes
import platform

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
