"""How a mistake of the user's reaches the user: a message of one to three lines and exit code 2."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator

USAGE_EXIT_CODE = 2
INTERRUPT_EXIT_CODE = 130
PIPE_EXIT_CODE = 141

_FULL = "the disk is full: free some space, or choose a place on another disk"
_DENIED = "this user may not do that: change the permissions, or choose another place"
_IN_THE_WAY = "something else is in the way: remove it, or choose another name"
_DISK_HINTS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "the disk, or a limit of this shell (ulimit -f), allows no larger file",
    errno.EROFS: "the disk can only be read: choose another place",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EIO: "the disk is damaged or was taken away: check it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "too many files are open at once: raise the limit (ulimit -n)",
}
"""Hints by errno, for errors of the machine (disk, permissions) and not of this program."""
_PLACE_HINTS = {
    errno.ENOENT: "no file can be made there: choose another place",
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
    errno.ENOTEMPTY: _IN_THE_WAY,
}
"""The same for errors that concern the place where a result is being written."""
_LOST_WORKER = re.compile(r"DataLoader worker \(pid\S* [\d, ]+\) (is killed by signal|exited unexpectedly)")
"""How PyTorch begins to say that one of its loader processes has died."""
_LOST_WORKER_SENTENCE = (
    "a process that loads data has died\n"
    "likely cause: the memory was full; try fewer of them (data.workers), or smaller batches"
)


class BevError(Exception):
    """Something the user can put right: bad data, a bad setting, a missing file.

    The message says the rule, what came instead and the likely cause, in one to three lines.
    Programs show it without a traceback (:func:`run_program`); a library caller catches it.
    """


class DataError(BevError):
    """A data set, or one of its files, is missing, truncated or inconsistent."""


class SampleError(DataError):
    """One sample cannot be used; the rest of the data set can. Carries the sample's token.

    Args:
        message: what, where and what to do.
        token: nuScenes sample token.
    """

    def __init__(self, message: str, token: str) -> None:
        super().__init__(message)
        self.token = token

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        # Exceptions cross from loader workers by pickle, which would call __init__ with one argument.
        return (type(self), (str(self), self.token))


class ConfigError(BevError):
    """A setting is unknown, has the wrong type or contradicts another one.

    Args:
        message: the rule, and what came instead.
        key: dotted name of the setting where it is a single one that is wrong, so that the file that sets
            it can be named.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class CheckpointError(BevError):
    """A checkpoint is missing, damaged or belongs to another architecture."""


class OutputError(BevError):
    """A result cannot be written: the disk is full or read-only, or something is in the way."""


class NonFiniteLossError(BevError):
    """Training met a NaN or infinite loss and stopped."""


def os_error_in(error: BaseException) -> OSError | None:
    """The OSError behind an exception; None if there is none.

    Libraries hide it: torch.save raises a RuntimeError after an OSError, safetensors an error of its own
    with the number in its text.
    """
    if isinstance(error, OSError):
        return error
    told = re.search(r"\(os error (\d+)\)", str(error))
    if told is not None:
        return OSError(int(told[1]), os.strerror(int(told[1])))
    before = error.__cause__ or error.__context__
    if isinstance(error, RuntimeError) and isinstance(before, OSError) and before.errno in _DISK_HINTS:
        return before
    return None


def os_error_sentence(error: OSError, what: str) -> str:
    """A message: what failed, the system's reason, and on a second line what can be done about it.

    Args:
        error: of the system.
        what: what failed, for example "cannot write out/run/card.json".
    """
    hint = {**_DISK_HINTS, **_PLACE_HINTS}.get(error.errno or 0)
    return f"{what}: {error.strerror or error}" + (f"\n{hint}" if hint else "")


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import a program's modules, which takes seconds; an interrupt from the keyboard ends it with one word.

    Outside of :func:`run_program` it would end in a traceback, and some libraries make another error of it.
    """

    def leave(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(INTERRUPT_EXIT_CODE)  # nothing has been begun that would have to be put in order

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_program(main: Callable[[], int | None]) -> None:
    """Run a command line's ``main`` and leave with its exit code.

    A :class:`BevError` is printed to stderr without a traceback and exits with code 2, and so does an
    OSError about a full disk, permissions and the like, and the death of a loader process; an interrupt from
    the keyboard exits with 130 as shells expect. Anything else is a bug of this project and keeps its
    traceback.

    Args:
        main: the program; its return value (None means 0) becomes the exit code.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except BevError as error:
        print(f"error: {error}", file=sys.stderr)
        code = USAGE_EXIT_CODE
    except RuntimeError as error:
        if _LOST_WORKER.match(str(error)) is None:
            raise
        print(f"error: {_LOST_WORKER_SENTENCE}", file=sys.stderr)
        code = USAGE_EXIT_CODE
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        _drop_stdout()
        code = PIPE_EXIT_CODE
    except OSError as error:
        if error.errno not in _DISK_HINTS:
            raise
        what = "its output cannot be written" if error.filename is None else f"cannot use {error.filename}"
        print(f"error: {os_error_sentence(error, what)}", file=sys.stderr)
        _drop_stdout()
        code = USAGE_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPT_EXIT_CODE
    raise SystemExit(code)


def _drop_stdout() -> None:
    """Send what is still to be printed nowhere: the interpreter would fail on it again when it ends."""
    stdout = sys.__stdout__
    if stdout is not None and sys.stdout is stdout:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
