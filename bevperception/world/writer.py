"""Write a world: a pool of processes makes scenes in a hidden folder, which becomes the data root.

While a world is being made it lies in ``.NAME.partial`` beside its final place. Each finished scene leaves a
record there, so that a run that was cut off goes on where it stopped; what it finds is only taken over if
it was made with the same settings. The last step renames the folder: a data root is complete or absent.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import cv2
from tqdm import tqdm

from bevperception.documents import read_json
from bevperception.errors import ConfigError, DataError, OutputError
from bevperception.files import explained, open_lock, write_bytes, write_json
from bevperception.processes import WorkerPool
from bevperception.world.expansion import map_expansion, map_image
from bevperception.world.scene import furnished_town, write_scene
from bevperception.world.settings import LOCATIONS, WorldConfig
from bevperception.world.tables import SCENE_TABLES, TABLES, Tables, map_filename, shared_tables

MARKER: Final = "world.json"
RECORDS: Final = "scenes"
DONE: Final = "scenes.done"
"""The records' name when all scenes and tables are written."""
LOCK: Final = "lock"


def make_world(config: WorldConfig, root: Path, workers: int = 0, progress: bool = True) -> Path:
    """Make a world, continue an interrupted one, or return at once if it is complete.

    Args:
        config: what it is made of.
        root: data root to make; its parent folders are made if need be.
        workers: processes that render scenes beside this one; 0 renders in this one. The number changes
            nothing in the result.
        progress: show a progress bar on stderr.

    Returns:
        ``root``.

    Raises:
        ConfigError: if the number of workers is negative.
        DataError: if the place is taken by something else or by a world of other settings, or another process
            is making it.
        OutputError: if it cannot be written there, or the disk is full.
    """
    if workers < 0:
        raise ConfigError(f"workers must be 0 or more, got {workers}")
    root = Path(os.path.abspath(root.expanduser()))
    if _is_there(root, config):
        return root
    partial = partial_folder(root)
    try:
        with explained(root), _opened(partial, config, root):
            if (partial / RECORDS).is_dir():
                try:
                    _make_scenes(config, partial, workers, progress)
                except BaseException:
                    if not finished_scenes(partial):
                        shutil.rmtree(partial)
                    raise
                _write_common_files(config, partial)
            _clear_traces(partial)
            if root.is_dir():
                root.rmdir()
            partial.rename(root)
    except OutputError as error:
        hint = "put that right and run the same command again: it goes on where it stopped"
        raise OutputError(f"{error}\n{hint}") from error
    return root


def partial_folder(root: Path) -> Path:
    """Folder that holds a world until it is complete."""
    return Path(os.path.abspath(root.expanduser())).with_name(f".{root.name}.partial")


def finished_scenes(partial: Path) -> int:
    """Number of scenes of an unfinished world that need not be made again."""
    return len(list((partial / RECORDS).glob("*.json")))


def _is_there(root: Path, config: WorldConfig) -> bool:
    """Whether this very world is complete at its place.

    Raises:
        DataError: if the place is taken by anything else.
    """
    if not root.exists():
        return False
    if not root.is_dir():
        raise DataError(f"{root} is a file; choose another folder")
    if not any(root.iterdir()):
        return False
    marker = root / MARKER
    if not marker.is_file():
        raise DataError(f"{root} holds something else than a world; choose a new or empty folder")
    if other := _other_settings(_read_marker(marker), config):
        raise DataError(
            f"{root} holds a world of other settings; choose another folder or remove it\n"
            f"it has {other}\nto remove it: {_removal(root)}"
        )
    return True


def _open_partial(partial: Path, config: WorldConfig, root: Path) -> None:
    """Begin an unfinished world or take it over; one of other settings gives way if no scene is finished."""
    marker = partial / MARKER
    if marker.is_file():
        settings = _read_marker(marker)
        other = _other_settings(settings, config)
        if not other:
            return
        finished = finished_scenes(partial)
        if finished or not (partial / RECORDS).is_dir():
            made_by = WorldConfig.of_record(settings)
            raise DataError(
                f"{partial} is an unfinished world of other settings ({finished} finished scenes): {other}\n"
                + (f"to finish it: {made_by.command(root)}\n" if made_by else "")
                + f"to remove it: {_removal(partial)}"
            )
        for path in partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    (partial / RECORDS).mkdir(exist_ok=True)
    _write_json(marker, config.record())


def _read_marker(marker: Path) -> dict[str, Any]:
    try:
        content = read_json(marker, str(marker), DataError)
    except DataError as error:
        raise DataError(f"{error}\nto remove the world: {_removal(marker.parent)}") from error
    return content if isinstance(content, dict) else {}


def _other_settings(settings: dict[str, Any], config: WorldConfig) -> str:
    """In which settings a world is another one than is wanted; empty if in none."""
    wanted = config.record()
    names = [name for name in wanted if settings.get(name) != wanted[name]]
    return ", ".join(f"{name} {settings.get(name)} instead of {wanted[name]}" for name in names)


def _removal(folder: Path) -> str:
    return f"rm -r {shlex.quote(str(folder))}"


@contextmanager
def _opened(partial: Path, config: WorldConfig, root: Path) -> Iterator[None]:
    with _locked(partial):
        _open_partial(partial, config, root)
        yield


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Make the folder if need be and hold it, so that no second process works in it."""
    partial.mkdir(parents=True, exist_ok=True)
    # A run that was killed at once leaves the folder without its marker, or with a part of it.
    begun = (LOCK, RECORDS)
    others = [p for p in partial.iterdir() if p.name not in begun and not p.name.startswith(f".{MARKER}.")]
    if others and not (partial / MARKER).is_file():
        raise DataError(f"{partial} holds something else than an unfinished world; remove it")
    with os.fdopen(open_lock(partial / LOCK), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is making {partial}; wait for it") from error
        yield


def _make_scenes(config: WorldConfig, partial: Path, workers: int, progress: bool) -> None:
    todo = [n for n, name in enumerate(config.scene_names) if not _record(partial, name).is_file()]
    done = config.scenes - len(todo)
    with tqdm(total=config.scenes, initial=done, desc="world", unit="scene", disable=not progress) as bar:
        if workers == 0:
            threads = cv2.getNumThreads()
            cv2.setNumThreads(1)
            try:
                for number in todo:
                    _make_scene(config, number, partial)
                    bar.update()
            finally:
                cv2.setNumThreads(threads)
        elif todo:
            _make_in_pool(config, todo, partial, workers, bar)


def _make_in_pool(config: WorldConfig, todo: list[int], partial: Path, workers: int, bar: Any) -> None:
    try:
        with WorkerPool(min(workers, len(todo)), _use_one_thread) as pool:
            waiting = {pool.submit(_make_scene, config, number, partial) for number in todo}
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    bar.update()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that rendered scenes was killed (out of memory?)\n"
            "run the same command again, with fewer workers if need be: it goes on where it stopped"
        ) from error


def _use_one_thread() -> None:
    cv2.setNumThreads(1)


def _make_scene(config: WorldConfig, number: int, partial: Path) -> None:
    rows = write_scene(config, number, partial)
    _write_json(_record(partial, config.scene_names[number]), rows)


def _record(partial: Path, name: str) -> Path:
    return partial / RECORDS / f"{name}.json"


def _write_common_files(config: WorldConfig, partial: Path) -> None:
    tables: Tables = {table: [] for table in SCENE_TABLES}
    for name in config.scene_names:
        rows = json.loads(_record(partial, name).read_text())
        for table in SCENE_TABLES:
            tables[table] += rows[table]
    tables |= shared_tables(config, tables["log"])
    for location in LOCATIONS[: config.scenes]:
        town, _ = furnished_town(config.seed, location)
        _write_json(partial / "maps" / "expansion" / f"{location}.json", map_expansion(town, config.seed))
        done, picture = cv2.imencode(".png", map_image(town), [cv2.IMWRITE_PNG_COMPRESSION, 1])
        if not done:
            raise RuntimeError("OpenCV could not encode a map as PNG")
        write_bytes(partial / map_filename(location), picture.tobytes())
    for table in TABLES:
        _write_json(partial / config.version / f"{table}.json", tables[table])
    _write_json(partial / config.version / "splits.json", config.splits)


def _clear_traces(partial: Path) -> None:
    # Renamed first: with a part of the records, a run that goes on would make the other scenes again.
    if (partial / RECORDS).is_dir():
        (partial / RECORDS).rename(partial / DONE)
    if (partial / DONE).is_dir():
        shutil.rmtree(partial / DONE)
    (partial / LOCK).unlink()


def _write_json(path: Path, content: Any) -> None:
    write_json(path, content, separators=(",", ":"))
