"""Open rosbag2 folders for reading and writing."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bevperception.errors import ConfigError, DataError, OutputError
from bevperception.files import check_output_file, writing_folder

STORAGES = ("mcap", "sqlite3")
_VERSION = 9


def require_rosbags() -> None:
    """Refuse to go on without rosbags; only opening bags needs it, not --help.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        import rosbags  # noqa: F401
    except ImportError as error:
        raise ConfigError("bags need the rosbags package: pip install -e '.[ros]'") from error


def typestore() -> Any:
    """The message types of ROS 2 Kilted; those of Jazzy and Humble that are used here are the same.

    Raises:
        ConfigError: without rosbags.
    """
    require_rosbags()
    from rosbags.typesys import Stores, get_typestore

    return get_typestore(Stores.ROS2_KILTED)


def check_place(path: Path, storage: str, overwrite: bool = False) -> None:
    """Check that a bag can be written, before the work for it begins; arguments as of :func:`open_writer`.

    Raises:
        ConfigError: if there is something already, or the storage is unknown.
        OutputError: if no folder can be made there.
    """
    if storage not in STORAGES:
        raise ConfigError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
    if os.path.lexists(path):
        if not (overwrite and (path / "metadata.yaml").is_file()):
            raise ConfigError(f"{path} exists already; choose another name or remove it")
        check_output_file(path.with_name(f"{path.name}.trial"))
    else:
        check_output_file(path)


@contextmanager
def open_writer(path: Path, storage: str, overwrite: bool = False) -> Iterator[Any]:
    """Open a new bag for writing; it appears under its name when it is complete.

    Args:
        path: folder of the bag.
        storage: one of :data:`STORAGES`.
        overwrite: replace a bag that is there.

    Raises:
        ConfigError, OutputError: see :func:`check_place`; or rosbags is missing, or the disk is full.
    """
    check_place(path, storage, overwrite)
    require_rosbags()
    from rosbags.rosbag2 import StoragePlugin, Writer

    plugin = StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3
    with writing_folder(path, replace=overwrite) as partial:
        try:
            with Writer(partial, version=_VERSION, storage_plugin=plugin) as writer:
                yield writer
        except sqlite3.Error as error:
            raise OutputError(f"cannot write {path}: {error}\nthe disk is probably full") from error


@contextmanager
def open_reader(path: Path) -> Iterator[Any]:
    """Open a bag for reading: a folder, or an mcap file.

    Raises:
        DataError: if it is missing or damaged.
        ConfigError: without rosbags.
    """
    if not path.exists():
        raise DataError(f"there is no bag at {path}")
    for part in [path, *path.iterdir()] if path.is_dir() else [path]:
        if part.exists() and not part.is_file() and not part.is_dir():
            raise DataError(f"{path} cannot be read as a bag: {part.name} is a pipe or a device, not a file")
    require_rosbags()
    from rosbags.highlevel import AnyReader, AnyReaderError

    try:
        with AnyReader([path], default_typestore=typestore()) as reader:
            yield reader
    except AnyReaderError as error:
        raise DataError(f"{path} cannot be read as a bag: {error}") from error


def offered_qos(latched: bool, depth: int) -> Sequence[Any]:
    """Quality of service of a topic as bags record it: reliable.

    Args:
        latched: late subscribers get the last messages (transient local).
        depth: of the history.
    """
    require_rosbags()
    from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime

    durability = QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE
    forever = QosTime(9223372036, 854775807)
    return [
        Qos(
            QosHistory.KEEP_LAST,
            depth,
            QosReliability.RELIABLE,
            durability,
            forever,
            forever,
            QosLiveliness.AUTOMATIC,
            forever,
            False,
        )
    ]
