"""Open nuScenes' tables: read them once, check them, then give them to the unmodified devkit."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nuscenes.nuscenes import NuScenes

from bevperception.data.table_checks import Damage, Loss, check_tables
from bevperception.data.table_rules import TABLES, Record, Tables
from bevperception.documents import read_text
from bevperception.errors import DataError

MAX_TABLE_BYTES: Final = 4 * 2**30
"""Four times nuScenes' largest table; a larger file would fill the memory before it is found to be none."""
_SHOWN: Final = 2


@dataclass(frozen=True)
class OpenTables:
    """Tables that can be used.

    Attributes:
        nusc: the devkit's object over the records that can be used.
        lost: by sample token, why it cannot be used.
        cameras: tokens of the calibrated_sensor records that are cameras.
        damages: what is damaged, records that are damaged alike together.
    """

    nusc: NuScenes
    lost: dict[str, list[Loss]]
    cameras: set[str]
    damages: list[Damage]


class _GivenTables(NuScenes):  # type: ignore[misc]  # the devkit has no types
    """The devkit's object over tables that are in memory already.

    Args:
        root: data root.
        version: of the tables.
        tables: by name; others, as nuScenes-lidarseg's, are read by the devkit.
    """

    def __init__(self, root: Path, version: str, tables: Tables) -> None:
        self._given: Tables = tables
        super().__init__(version=version, dataroot=str(root), verbose=False)
        self._given = {}

    def __load_table__(self, table_name: str) -> Any:
        given = self._given.get(table_name)
        return super().__load_table__(table_name) if given is None else given


def open_tables(root: Path, version: str) -> OpenTables:
    """Open a data set, saying plainly what is missing or damaged.

    Args:
        root: folder that holds the version's folder, samples/ and maps/.
        version: for example v1.0-mini.

    Raises:
        DataError: if the root, the version, a table or a map image is missing, or damage cannot be
            assigned to samples.
    """
    if not root.is_dir():
        raise DataError(f"data root {root} does not exist; set data.root to the folder that holds {version}/")
    folder = root / version
    if not folder.is_dir():
        versions = sorted(p.parent.name for p in root.glob("*/sample_data.json"))
        raise DataError(
            f"{root} has no version {version!r}; set data.version\n"
            f"versions there: {', '.join(versions) or 'none'}"
        )
    with _without_garbage_collection():
        tables, problems = read_tables(folder)
        _raise_first(folder, problems)
        checked = check_tables(tables)
        _raise_first(folder, checked.fatal)
        try:
            nusc = _GivenTables(root, version, checked.tables)
        except FileNotFoundError as error:
            raise DataError(f"the devkit cannot open {folder}: {error.filename} is missing") from error
        except (
            AssertionError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            OSError,
        ) as error:
            # Map images, and further tables (nuScenes-lidarseg) that only the devkit looks at.
            raise DataError(f"the devkit refuses {folder}: {type(error).__name__}: {error}") from error
    return OpenTables(nusc, checked.lost, checked.cameras, list(checked.damages.values()))


def load_tables(root: Path, version: str) -> NuScenes:
    """Open a data set of which everything is to be used.

    Args:
        root: folder that holds the version's folder, samples/ and maps/.
        version: for example v1.0-mini.

    Raises:
        DataError: as :func:`open_tables`, and if any record is damaged.
    """
    opened = open_tables(root, version)
    _raise_first(root / version, [damage.first for damage in opened.damages])
    return opened.nusc


def read_tables(folder: Path) -> tuple[Tables, list[str]]:
    """Read the 13 tables.

    Args:
        folder: that holds them.

    Returns:
        records by table;
        a sentence about every table that is missing or is no list of objects.
    """
    tables: Tables = {}
    problems: list[str] = []
    for table in TABLES:
        path = folder / f"{table}.json"
        try:
            tables[table] = _read_table(path)
        except DataError as error:
            problems.append(str(error))
    return tables, problems


def _read_table(path: Path) -> list[Record]:
    if not path.exists():
        raise DataError(f"{path.name} is missing")
    try:
        # Not documents.read_json: looking for nested brackets in millions of records would take minutes.
        content = json.loads(read_text(path, path.name, MAX_TABLE_BYTES, DataError))
    except RecursionError as error:
        raise DataError(f"{path.name} is nested too deeply for a table") from error
    except MemoryError as error:
        raise DataError(f"{path.name} does not fit in the memory") from error
    except ValueError as error:
        raise DataError(f"{path.name} is not valid JSON (truncated? copy it again): {error}") from error
    if not isinstance(content, list):
        raise DataError(f"{path.name} must hold a list of records, got a {type(content).__name__}")
    if not set(map(type, content)) <= {dict}:
        row, record = next((r, v) for r, v in enumerate(content) if not isinstance(v, dict))
        raise DataError(f"{path.name} must hold objects, got a {type(record).__name__} as record {row}")
    return content


def _raise_first(folder: Path, sentences: list[str]) -> None:
    if not sentences:
        return
    more = f" (and {len(sentences) - _SHOWN} more)" if len(sentences) > _SHOWN else ""
    raise DataError(f"the tables of {folder} are damaged{more}:\n" + "\n".join(sentences[:_SHOWN]))


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pause garbage collection: among millions of new records it takes long and finds nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
