"""The native library: finding and loading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARY_PATH = Path(__file__).resolve().parent.parent / "_C.abi3.so"
DEVICES = ("cpu", "meta")


@dataclass(frozen=True)
class LibraryStatus:
    """Whether the native library is loaded: its file, or what is wrong."""

    library: str | None
    problem: str | None

    @property
    def loaded(self) -> bool:
        """True if the native operators can be called."""
        return self.library is not None


def _load(path: Path) -> LibraryStatus:
    if not path.is_file():
        return LibraryStatus(None, f"the native operators are not built ({path.name} is missing)")
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        return LibraryStatus(None, f"{path.name} cannot be loaded ({error})")
    return LibraryStatus(str(path), None)


STATUS = _load(LIBRARY_PATH)


def cpu_isa() -> str:
    """Name of the instruction set that the native CPU kernels use on this machine.

    Raises:
        AttributeError: the library is not loaded.
    """
    raise AttributeError("the native library is not loaded")
