"""Names and files that come from data: they never lead out of the data's folder, hang or fill the memory.

Tables, bags and submissions may be anybody's. A token in them can become part of a file name, and a file name
in them is opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Final

from bevperception.errors import BevError, DataError

MOST_CHARACTERS: Final = 200
"""Of a name; with an ending it still fits into the 255 bytes that disks allow."""


def check_name(value: object, what: str, error: Callable[[str], BevError] = DataError) -> str:
    """Return a token, or another name from data, if a file can be named after it.

    Args:
        value: from data.
        what: what messages call it, for example "scene name".
        error: to raise, made from its message.

    Raises:
        BevError: of the kind asked for: it is no text, empty, too long, or has characters that would make a
            path of it.
    """
    if not isinstance(value, str) or not is_name(value):
        raise error(
            f"{what} {_shown(value)} is not a valid name: it must have 1 to {MOST_CHARACTERS} "
            "printable characters, no slash, and no dot at the beginning\n"
            "likely cause: damaged or hostile data"
        )
    return value


def is_name(value: str) -> bool:
    """Whether a file can be named after a text, see :func:`check_name`."""
    plain = value.isprintable() and "/" not in value and "\\" not in value
    return plain and 0 < len(value.encode()) <= MOST_CHARACTERS and not value.startswith(".")


def is_inside(name: str) -> bool:
    """Whether a text names a file below a root, such as samples/CAM_FRONT/x.jpg.

    Links in the root may lead elsewhere: people keep their images on another disk.
    """
    parts = PurePosixPath(name).parts
    return bool(parts) and name.isprintable() and not name.startswith("/") and ".." not in parts


def read_file(path: Path, most_bytes: int, name: str, error: Callable[[str], BevError] = DataError) -> bytes:
    """Read a regular file of a bounded size whole.

    Args:
        path: of the file.
        most_bytes: that it may have.
        name: what messages call it, for example "image samples/x.jpg".
        error: to raise, made from its message.

    Raises:
        BevError: of the kind asked for: it is missing, larger, or a folder, a pipe or a device.
    """
    try:
        # Without O_NONBLOCK the opening itself of a pipe waits until somebody writes into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            _check_bounded(status, most_bytes, name, error)
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(status.st_size)
        finally:
            os.close(descriptor)
    except OSError as problem:
        raise error(f"cannot read {name}: {problem.strerror}") from problem
    except ValueError as problem:
        raise error(f"cannot read {name}: there is a NUL character in its path") from problem


def has_file(path: Path, most_bytes: int, name: str) -> bool:
    """Whether there is a file, before another library reads it whole.

    Args:
        path: of the file.
        most_bytes: that it may have.
        name: what messages call it, for example "map expansion maps/expansion/x.json".

    Raises:
        DataError: it is larger, or a folder, a pipe or a device.
    """
    try:
        _check_bounded(path.stat(), most_bytes, name, DataError)
    except FileNotFoundError:
        return False
    except OSError as problem:
        raise DataError(f"cannot read {name}: {problem.strerror}") from problem
    return True


def _check_bounded(
    status: os.stat_result, most_bytes: int, name: str, error: Callable[[str], BevError]
) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise error(f"cannot read {name}: it is {kind}, not a file")
    if status.st_size > most_bytes:
        raise error(
            f"cannot read {name}: it has {status.st_size} bytes, more than the {most_bytes} allowed; "
            "likely cause: the wrong file"
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
