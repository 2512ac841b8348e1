"""Timing of repeated calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


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
