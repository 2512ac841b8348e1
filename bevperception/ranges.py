"""What a setting may be: rules beside a field's type, checked when its dataclass is made.

A field of a settings dataclass names its rules once, ``steps: Annotated[int, Range(1, 1000)] = 10``. Its
``__post_init__`` calls :func:`check_settings`; ``--help`` shows :func:`rules_text`. Numbers must be finite.
"""

from __future__ import annotations

import argparse
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from bevperception.errors import ConfigError

_MOST_SHOWN = 120


class Rule(Protocol):
    """One thing that a value must be."""

    def holds(self, value: Any) -> bool:
        """Whether a value of the right type obeys."""

    def __str__(self) -> str:
        """The rule in words that follow 'must be'."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``; all items of a sequence.

    Args:
        least, most: smallest and largest allowed value; None for no limit.
        above, below: the same, with the limit itself not allowed.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: Any) -> bool:
        """See :class:`Rule`."""
        if isinstance(value, (list, tuple)):
            return all(self.holds(item) for item in value)
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"{_number(self.least)} to {_number(self.most)}"
        limits = (
            ("at least", self.least),
            ("above", self.above),
            ("at most", self.most),
            ("below", self.below),
        )
        return " and ".join(f"{word} {_number(limit)}" for word, limit in limits if limit is not None)


@dataclass(frozen=True)
class Length:
    """A sequence, or text, of ``least`` to ``most`` items; ``most`` None for no limit."""

    least: int
    most: int | None = None

    def holds(self, value: Any) -> bool:
        """See :class:`Rule`."""
        return self.least <= len(value) and (self.most is None or len(value) <= self.most)

    def __str__(self) -> str:
        if self.most is None:
            return "not empty" if self.least == 1 else f"{self.least} or more long"
        return f"{self.least} long" if self.least == self.most else f"{self.least} to {self.most} long"


@dataclass(frozen=True)
class Increasing:
    """A sequence whose items grow; ``equal`` allows an item as large as the one before."""

    equal: bool = False

    def holds(self, value: Any) -> bool:
        """See :class:`Rule`."""
        return all(a < b or (self.equal and a == b) for a, b in pairwise(value))

    def __str__(self) -> str:
        return "in ascending order" if not self.equal else "in ascending order (or equal)"


@dataclass(frozen=True)
class Distinct:
    """A sequence without an item that comes twice."""

    def holds(self, value: Any) -> bool:
        """See :class:`Rule`."""
        return len(set(value)) == len(value)

    def __str__(self) -> str:
        return "without repetition"


NotEmpty = Length(1)
Share = Annotated[float, Range(0.0, 1.0)]
"""A probability or a fraction."""
Name = Annotated[str, NotEmpty]
"""A text that says something."""


def check_settings(settings: object, section: str) -> None:
    """Refuse a value that has the wrong type or breaks a rule of its field.

    Args:
        settings: instance of a dataclass; fields that are dataclasses have checked themselves.
        section: dotted name of its group, for the message; empty for none.

    Raises:
        ConfigError: which field, its rule, and what came instead; ``key`` is the field's dotted name.
    """
    for name, hint in _hints(type(settings)).items():
        value = getattr(settings, name)
        wanted = _problem(hint, value)
        if wanted is not None:
            key = f"{section}.{name}" if section else name
            raise ConfigError(f"{key} must be {wanted}, got {_shown(value)}", key)


def rules_of(settings: type, name: str) -> list[Rule]:
    """The rules of a field, in the order of its annotation."""
    found: list[Rule] = []
    _collect(_hints(settings)[name], found)
    return found


def rules_text(settings: type, name: str) -> str:
    """The rules of a field in words, for ``--help``; empty where there are none."""
    return ", ".join(dict.fromkeys(map(str, rules_of(settings, name))))


def add_number(
    parser: argparse.ArgumentParser, name: str, kind: type[int] | type[float], rule: Range, **more: Any
) -> None:
    """Add an option for a number, with its range in its help.

    Args:
        parser: of a program.
        name: of the option, with its dashes.
        kind: int or float.
        rule: what the number must be. On the command line it raises ConfigError where it is not, or is NaN
            or infinite.
        more: for ``add_argument``, ``help`` among it.
    """

    def convert(text: str | float) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise ConfigError(f"command line: {name} must be {_KINDS[kind]}, got {_shown(text)}") from None
        if not _is_finite(value) or not rule.holds(value):
            raise ConfigError(f"command line: {name} must be {rule}, got {_shown(value)}")
        return value

    convert.__name__ = kind.__name__
    more["help"] = f"{more['help']} [{rule}]"
    parser.add_argument(name, type=convert, **more)


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(settings: type) -> dict[str, Any]:
    """Type hints of a dataclass's fields, looked up once."""
    if settings not in _HINTS:
        assert is_dataclass(settings), settings
        hints = get_type_hints(settings, include_extras=True)
        _HINTS[settings] = {field.name: hints[field.name] for field in fields(settings)}
    return _HINTS[settings]


def _collect(hint: Any, found: list[Rule]) -> None:
    if get_origin(hint) is Annotated:
        found.extend(hint.__metadata__)
        hint = hint.__origin__
    if get_origin(hint) is not Literal:
        for part in get_args(hint):
            _collect(part, found)


def _problem(hint: Any, value: Any) -> str | None:
    """What a value must be and is not, in words; None where it is as it should be."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        wanted = _problem(hint.__origin__, value)
        broken = [r for r in hint.__metadata__ if wanted is None and value is not None and not r.holds(value)]
        return str(broken[0]) if broken else wanted
    if origin in (Union, types.UnionType):
        found = [_problem(part, value) for part in arguments]
        if None in found:
            return None
        return " or ".join(wanted for wanted in found if wanted is not None and wanted != "nothing")
    if origin is Literal:
        return None if value in arguments else " or ".join(map(repr, arguments))
    if origin is tuple:
        return _tuple_problem(arguments, value)
    return _scalar_problem(hint, value)


def _tuple_problem(items: Sequence[Any], value: Any) -> str | None:
    if not isinstance(value, (list, tuple)):
        return "a list"
    if len(items) == 2 and items[1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        return f"a list of {len(items)}"
    found = (_problem(hint, item) for hint, item in zip(items, value, strict=True))
    return next((f"a list, each {wanted}" for wanted in found if wanted is not None), None)


def _scalar_problem(kind: Any, value: Any) -> str | None:
    if kind is type(None):
        return None if value is None else "nothing"
    if kind is bool:
        return None if isinstance(value, bool) else _KINDS[bool]
    if kind is int:
        return None if isinstance(value, Integral) and not isinstance(value, bool) else _KINDS[int]
    if kind is float:
        real = isinstance(value, Real) and not isinstance(value, bool)
        if not real:
            return _KINDS[float]
        return None if _is_finite(value) else "a finite number"
    if kind is str:
        if not isinstance(value, str):
            return _KINDS[str]
        # Neither can be in a file's name, and a surrogate in no file.
        unfit = "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)
        return "text without NUL characters and surrogates" if unfit else None
    return None


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _is_finite(value: float) -> bool:
    return isinstance(value, Integral) or math.isfinite(value)  # a whole number may be too large for a float


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
