"""How a mistake of the user's reaches the user: a message of one to three lines and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

USAGE_EXIT_CODE = 2


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


class NonFiniteLossError(BevError):
    """Training met a NaN or infinite loss and stopped."""


def run_program(main: Callable[[], int | None]) -> None:
    """Run a command line's ``main`` and leave with its exit code.

    A :class:`BevError` is printed to stderr without a traceback and exits with code 2; an
    interrupt from the keyboard exits with 130 as shells expect. Anything else is a bug of this
    project and keeps its traceback.

    Args:
        main: the program; its return value (None means 0) becomes the exit code.
    """
    try:
        code = main() or 0
    except BevError as error:
        print(f"error: {error}", file=sys.stderr)
        code = USAGE_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    raise SystemExit(code)
