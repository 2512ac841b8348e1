"""Random numbers and tokens that depend on names only, never on order, time or the number of workers."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, *name: str | int) -> np.random.Generator:
    """The generator of a part of the world, for example ``generator(7, "scene", 3)``."""
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return np.random.Generator(np.random.PCG64(np.frombuffer(digest, dtype=np.uint32).tolist()))


def token(seed: int, table: str, *key: str | int) -> str:
    """The 32 hexadecimal digits that name a record of a table."""
    return hashlib.sha256(repr((seed, table, *key)).encode()).hexdigest()[:32]
