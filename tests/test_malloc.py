"""Freed memory that is kept is not taken from the system again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from bevperception import malloc

PROGRAM = """
import resource, sys
import torch
from bevperception.malloc import keep_freed_memory

def frame():
    first = torch.ones(3, 3_000_001)  # beyond the largest piece that glibc takes from its heap by itself
    return float((2 * first + 1).sum())

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(8):
    frame()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    frame()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc")
def test_kept_memory_is_used_again() -> None:
    faults = {
        choice: int(
            subprocess.run([sys.executable, "-c", PROGRAM, choice], capture_output=True, check=True).stdout
        )
        for choice in ("return", "keep")
    }
    # Now and then the heap still grows by a tensor, before it has found its size.
    assert faults["return"] > 5 * faults["keep"]
    assert faults["return"] > 10


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not malloc.keep_freed_memory()
