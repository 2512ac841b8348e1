"""Timing of repeated calls."""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def sample_seconds(function: Callable[[], object], at_least_s: float, at_least_calls: int = 3) -> list[float]:
    """Call a function again and again and time each call; the caller warms it up.

    Args:
        function: what to time; its result is dropped.
        at_least_s: go on until so much time is spent, in seconds.
        at_least_calls: and at least so many calls are made.

    Returns:
        Seconds of each call.
    """
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < at_least_calls or time.perf_counter() - begin < at_least_s:
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return samples


def median_ms(seconds: Sequence[float]) -> float:
    """Median in milliseconds.

    Raises:
        statistics.StatisticsError: nothing was measured.
    """
    return statistics.median(seconds) * 1e3


def peak_extra_bytes(function: Callable[[], object]) -> int | None:
    """Most memory that a call needs at once, beyond what the process holds before it.

    Memory that the process has freed but kept counts as held, so the call is made in a fresh allocator's
    state as far as the C library gives it back.

    Returns:
        Bytes; None where the system does not tell (Linux does).
    """
    if not _CLEAR.is_file():
        return None
    _give_back()
    _CLEAR.write_text("5", encoding="ascii")  # the peak starts again at what is held
    before = _resident_bytes("VmRSS")
    function()
    return max(0, _resident_bytes("VmHWM") - before)


def _give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _resident_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024
