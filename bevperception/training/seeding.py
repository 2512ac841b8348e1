"""Random draws as a function of where they are drawn, so that resuming and sharing work change nothing."""

from __future__ import annotations

import numpy as np

SHUFFLE, STEP, PADDING = range(3)
"""First part of a derived seed: what the draw is for, so that no two uses share numbers."""


def derive_seed(*parts: int) -> int:
    """A well-mixed seed from the numbers that say where a draw is made.

    Args:
        parts: non-negative integers, for example a purpose, the run's seed and a step.

    Returns:
        An integer in [0, 2**63), good for ``torch.manual_seed`` and ``numpy.random.default_rng``.
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1
