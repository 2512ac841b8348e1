"""Rates and percentiles of durations over recent events, in bounded memory."""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np

WINDOW_S: Final = 10.0


class Durations:
    """Percentiles of the newest 200 durations of one stage."""

    def __init__(self) -> None:
        self._values_ms: deque[float] = deque(maxlen=200)

    def add(self, value_ms: float) -> None:
        """Add a duration in milliseconds."""
        self._values_ms.append(value_ms)

    def percentiles_ms(self) -> tuple[float, float] | None:
        """Median and 95th percentile in milliseconds; None before the first duration."""
        if not self._values_ms:
            return None
        p50, p95 = np.percentile(list(self._values_ms), (50, 95))
        return float(p50), float(p95)


class Rate:
    """Events a second, from the newest 100 events of the last :data:`WINDOW_S` seconds."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=100)

    def add(self, now_s: float) -> None:
        """Count an event; ``now_s`` is of a monotonic clock."""
        self._times_s.append(now_s)

    def hz(self, now_s: float) -> float:
        """Events a second in the window; 0 with fewer than two."""
        recent = [t for t in self._times_s if now_s - t <= WINDOW_S]
        if len(recent) < 2 or recent[-1] <= recent[0]:
            return 0.0
        return (len(recent) - 1) / (recent[-1] - recent[0])
