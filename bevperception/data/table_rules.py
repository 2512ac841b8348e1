"""The rules for every field of nuScenes' tables, for reader and doctor.

A rule judges a whole column at once, since the largest tables have millions of rows; :func:`bad_rows` finds
the rows that break it. Format: nuScenes devkit, docs/schema_nuscenes.md; only fields that are read are here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from bevperception.geometry import MAX_COORDINATE_M, is_valid_intrinsics
from bevperception.names import MOST_CHARACTERS, is_inside, is_name

Record = dict[str, Any]
Tables = dict[str, list[Record]]

TABLES: Final = (
    *("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose"),
    *("log", "scene", "sample", "sample_data", "sample_annotation", "map"),
)
"""The tables of a nuScenes version, one JSON file each."""

MAX_MOUNT_M: Final = 1e3
MAX_SIZE_M: Final = 1e3
MIN_SIZE_M: Final = 1e-3
MAX_TIME_US: Final = 2**53
"""Microseconds are exact in float64 up to here, the year 2255."""
MAX_PIXELS: Final = 65535
VISIBILITY: Final = ("", "1", "2", "3", "4")

_WRITER: Final = "the program that wrote the table left it out or wrote another type"
_MIXED: Final = "the tables come from different downloads, or one was cut short"
_HOSTILE: Final = "the table was damaged, or made to reach other files of this machine"
_NUMBERS: Final = "a calibration, localisation or conversion failed"


class _Missing:
    def __repr__(self) -> str:
        return "nothing (the field is missing)"


MISSING: Final = _Missing()
"""Stands in a column for a field that a record lacks."""


@dataclass(frozen=True)
class Rule:
    """A rule that every value of a column must keep.

    Attributes:
        wanted: completes "FIELD must be ...".
        holds: whether every value of a column is so; may raise TypeError, ValueError or OverflowError for
            values of another type, which means no.
        cause: the likely cause where it is not.
        table: the table whose tokens the values are, for references.
    """

    wanted: str
    holds: Callable[[Sequence[Any]], bool]
    cause: str = _WRITER
    table: str | None = None


def column_of(records: Sequence[Record], field: str) -> list[Any]:
    """A field of every record, :data:`MISSING` where a record lacks it."""
    try:
        return list(map(itemgetter(field), records))
    except KeyError:
        return [record.get(field, MISSING) for record in records]


def is_good(rule: Rule, column: Sequence[Any]) -> bool:
    """Whether every value of a column keeps a rule."""
    try:
        return rule.holds(column)
    except (TypeError, ValueError, OverflowError):
        return False


def bad_rows(rule: Rule, column: Sequence[Any]) -> list[int]:
    """Rows of a column that break a rule, ascending, found by bisection.

    Args:
        rule: one that a column keeps if each of its values does.
        column: values of any type.
    """
    bad: list[int] = []
    parts = [(0, len(column))]
    while parts:
        start, end = parts.pop()
        if start == end or is_good(rule, column[start:end]):
            continue
        if end - start == 1:
            bad.append(start)
            continue
        middle = (start + end) // 2
        parts += [(middle, end), (start, middle)]
    return bad


def _types(values: Iterable[Any]) -> set[type]:
    return set(map(type, values))


def _numbers(column: Sequence[Any], length: int) -> NDArray[np.float64]:
    """(rows, length) of lists of that many numbers; raises where they are not."""
    if not _types(column) <= {list} or not set(map(len, column)) <= {length}:
        raise TypeError("not lists of that length")
    flat = list(chain.from_iterable(column))
    return _plain_numbers(flat).reshape(-1, length)


def _plain_numbers(flat: Sequence[Any]) -> NDArray[np.float64]:
    if not _types(flat) <= {int, float}:
        raise TypeError("not numbers")
    return np.array(flat, dtype=np.float64)


def name() -> Rule:
    """A text that can be shown."""
    return Rule(
        "a text of printable characters", lambda column: "".join(column).isprintable() and all(column)
    )


def file_token() -> Rule:
    """A text that files can be named after."""
    return Rule(
        f"1 to {MOST_CHARACTERS} printable characters without a slash or a dot at the beginning",
        lambda column: "".join(column).isprintable() and all(map(is_name, column)),
        _HOSTILE,
    )


def file_name() -> Rule:
    """The name of a file below the data root."""

    def holds(column: Sequence[Any]) -> bool:
        if not "".join(column).isprintable():
            return False
        # Taking millions of names apart takes seconds, and hardly any has two dots.
        return all(
            is_inside(name) for name in column if ".." in name or not name.strip("./") or name[0] == "/"
        )

    return Rule("the name of a file inside the data root, without '..'", holds, _HOSTILE)


def link() -> Rule:
    """The token of a neighbour, or empty."""
    return Rule("a token or an empty text", lambda column: "".join(column).isprintable())


def one_of(values: Collection[str]) -> Rule:
    """One of a few texts."""
    known = set(values)
    return Rule("one of " + ", ".join(map(repr, values)), known.issuperset)


def reference(table: str, tokens: Collection[str]) -> Rule:
    """The token of a record of another table."""
    known = set(tokens)
    return Rule(f"the token of a record of {table}.json", known.issuperset, _MIXED, table)


def references(table: str, tokens: Collection[str]) -> Rule:
    """A list of tokens of another table."""
    known = set(tokens)

    def holds(column: Sequence[Any]) -> bool:
        return _types(column) <= {list} and known.issuperset(chain.from_iterable(column))

    return Rule(f"a list of tokens of {table}.json", holds, _MIXED)


def names() -> Rule:
    """A list of texts."""

    def holds(column: Sequence[Any]) -> bool:
        return _types(column) <= {list} and "".join(chain.from_iterable(column)).isprintable()

    return Rule("a list of texts", holds)


def flag() -> Rule:
    """True or false."""
    return Rule("true or false", lambda column: _types(column) <= {bool})


def whole_number(least: int, most: int) -> Rule:
    """An int in a range."""

    def holds(column: Sequence[Any]) -> bool:
        return _types(column) <= {int} and least <= min(column) and max(column) <= most

    return Rule(f"a whole number from {least} to {most}", holds)


def time_us() -> Rule:
    """Microseconds since 1970."""

    def holds(column: Sequence[Any]) -> bool:
        values = _plain_numbers(column)
        return bool(((values >= 0) & (values < MAX_TIME_US)).all())

    return Rule(f"a time in microseconds, 0 to below {MAX_TIME_US}", holds, _NUMBERS)


def vector(length: int, limit: float) -> Rule:
    """A list of finite numbers in metres."""

    def holds(column: Sequence[Any]) -> bool:
        return bool((np.abs(_numbers(column, length)) <= limit).all())

    return Rule(f"{length} finite numbers of at most {limit:.0e} metres", holds, _NUMBERS)


def quaternion() -> Rule:
    """A rotation; it is normalised by who reads it."""

    def holds(column: Sequence[Any]) -> bool:
        values = _numbers(column, 4)
        return bool((np.abs(values) < 1e6).all() and (np.linalg.norm(values, axis=-1) > 1e-6).all())

    return Rule("a rotation, 4 finite numbers (w, x, y, z) that are not all 0", holds, _NUMBERS)


def box_size() -> Rule:
    """Width, length and height."""

    def holds(column: Sequence[Any]) -> bool:
        values = _numbers(column, 3)
        return bool(((values >= MIN_SIZE_M) & (values <= MAX_SIZE_M)).all())

    return Rule(
        f"3 lengths of {MIN_SIZE_M:g} to {MAX_SIZE_M:g} metres (a box needs a volume)", holds, _NUMBERS
    )


def intrinsics() -> Rule:
    """Camera frame to pixels."""

    def holds(column: Sequence[Any]) -> bool:
        if not _types(column) <= {list}:
            return False
        matrices = [torch.from_numpy(_numbers(matrix, 3)) for matrix in column]
        return all(map(is_valid_intrinsics, matrices))

    return Rule("a finite invertible 3x3 matrix whose last row is 0, 0, 1", holds, _NUMBERS)


def table_rules(table: str, sound: Mapping[str, Collection[str]]) -> dict[str, Rule]:
    """The rules of a table, by field; links between records of one table are checked separately.

    Args:
        table: one of :data:`TABLES`.
        sound: tokens of the usable records of the tables that this one refers to.
    """
    time, place = time_us(), vector(3, MAX_COORDINATE_M)
    rules: dict[str, dict[str, Rule]] = {
        "category": {"name": name()},
        "attribute": {"name": name()},
        "visibility": {},
        "sensor": {"channel": name(), "modality": name()},
        "log": {"location": name()},
        "map": {"log_tokens": names(), "filename": file_name()},
        "scene": {"name": name(), "log_token": reference("log", sound.get("log", ()))},
        "sample": {"scene_token": reference("scene", sound.get("scene", ()))},
        "instance": {"category_token": reference("category", sound.get("category", ()))},
        "calibrated_sensor": {
            "sensor_token": reference("sensor", sound.get("sensor", ())),
            "translation": vector(3, MAX_MOUNT_M),
            "rotation": quaternion(),
        },
        "ego_pose": {"translation": place, "rotation": quaternion()},
        "sample_data": {
            "sample_token": reference("sample", sound.get("sample", ())),
            "calibrated_sensor_token": reference("calibrated_sensor", sound.get("calibrated_sensor", ())),
            "ego_pose_token": reference("ego_pose", sound.get("ego_pose", ())),
            "timestamp": time,
            "is_key_frame": flag(),
            "filename": file_name(),
        },
        "sample_annotation": {
            "sample_token": reference("sample", sound.get("sample", ())),
            "instance_token": reference("instance", sound.get("instance", ())),
            "attribute_tokens": references("attribute", sound.get("attribute", ())),
            "visibility_token": one_of(VISIBILITY),
            "translation": place,
            "size": box_size(),
            "rotation": quaternion(),
            "num_lidar_pts": whole_number(0, 10**9),
            "num_radar_pts": whole_number(0, 10**9),
        },
    }
    return rules[table]


CHAIN_RULES: Final = {"timestamp": time_us(), "prev": link(), "next": link()}
"""Fields of a sample without which its scene has no order."""

CAMERA_RULES: Final = {"width": whole_number(1, MAX_PIXELS), "height": whole_number(1, MAX_PIXELS)}
"""Fields of a camera's sample_data."""
