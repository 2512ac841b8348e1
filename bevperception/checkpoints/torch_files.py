"""Files of ``torch.save``, of which only plain values, tensors and NumPy scalars are read."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bevperception.errors import CheckpointError

_NUMPY_KINDS = "?bhilqBHILQefdgFDSU"
_NUMPY_SCALAR = np.core.multiarray.scalar  # type: ignore[attr-defined]
_READABLE: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),  # as NumPy 2 names it
    np.dtype,
    *(type(np.dtype(kind)) for kind in _NUMPY_KINDS),
]
"""Callables that NumPy scalars are unpickled with; none of them runs code of the file. Training programs save
such scalars beside their weights: a best score, a step."""

_FOREIGN = (
    re.compile(r"Unsupported global: GLOBAL (\S+) was"),
    re.compile(r"unsupported GLOBAL (\S+) whose module"),
)


def read_torch_file(path: Path, mmap: bool = False) -> object:
    """Plain containers, tensors and NumPy scalars of a file of ``torch.save``, on the CPU; no code runs.

    Args:
        path: of the file.
        mmap: map the tensors from the disk instead of reading them, where the file's format allows it; their
            memory is then the system's cache, and a file larger than the memory can be read.

    Raises:
        CheckpointError: it is missing, damaged or holds something else.
    """
    try:
        _check_sizes(path)
        with torch.serialization.safe_globals(_READABLE):
            mapped = mmap and zipfile.is_zipfile(path)  # the format before PyTorch 1.6 cannot be mapped
            content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except (PermissionError, IsADirectoryError) as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except pickle.UnpicklingError as error:  # whose text advises to let the file's code run
        raise CheckpointError(_cause(path, str(error))) from None
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file leads the unpickler to errors of any type
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason}") from None
    return content


def _check_sizes(path: Path) -> None:
    """Refuse an archive whose parts are larger than itself, before they are unpacked.

    ``torch.save`` does not compress. An archive that does can ask for any amount of memory.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked, whole = sum(part.file_size for part in archive.infolist()), path.stat().st_size
    if unpacked > whole:
        raise CheckpointError(
            f"{path} has {whole} bytes and unpacks to {unpacked}; torch.save does not compress\n"
            "the file is damaged, or made to fill the memory"
        )


def _cause(path: Path, text: str) -> str:
    for pattern in _FOREIGN:
        found = pattern.search(text)
        if found:
            return (
                f"{path} holds an object of {found[1][:80]}; only tensors, plain containers, texts and "
                "numbers are read, since other objects could run code of the file\n"
                "the file may be sound: who made it can save its weights alone, "
                "torch.save({'state_dict': model.state_dict()}, ...)"
            )
    return (
        f"{path} is damaged or not a checkpoint: no file of torch.save, or one that holds more than "
        "plain containers and tensors"
    )
