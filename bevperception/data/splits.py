"""Which scenes a split names: the predefined splits of nuScenes or the data set's own ``splits.json``."""

from __future__ import annotations

import json
from pathlib import Path

from nuscenes.utils.splits import create_splits_scenes

from bevperception.errors import ConfigError, DataError

_VERSION_SUFFIX = {
    "train": "trainval",
    "val": "trainval",
    "train_detect": "trainval",
    "train_track": "trainval",
    "mini_train": "mini",
    "mini_val": "mini",
    "test": "test",
}
"""Predefined split to the ending of the versions that the devkit evaluates it on."""


def custom_splits(version_folder: Path) -> dict[str, list[str]]:
    """The splits that a data set defines itself.

    Args:
        version_folder: folder of the tables, which may hold ``splits.json``.

    Returns:
        split name to scene names; empty without the file.

    Raises:
        DataError: if the file is not JSON of the form {"name": ["scene-...", ...]}.
    """
    path = version_folder / "splits.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not all(
        isinstance(v, list) and all(isinstance(name, str) for name in v) for v in content.values()
    ):
        raise DataError(f'{path} must hold {{"split": ["scene name", ...], ...}}')
    return content


def scenes_of_split(split: str, version_folder: Path, scenes_present: list[str]) -> list[str]:
    """Names of a split's scenes that are in the tables, in the tables' order.

    Args:
        split: predefined split (train, val, test, mini_train, mini_val, ...) or one of ``splits.json``;
            a predefined name wins, as in the devkit.
        version_folder: folder of the tables.
        scenes_present: scene names in the tables.

    Raises:
        ConfigError: if no such split exists.
        DataError: if none of its scenes is in the tables.
    """
    predefined = create_splits_scenes()
    custom = custom_splits(version_folder)
    if split in predefined:
        names = set(predefined[split])
    elif split in custom:
        names = set(custom[split])
    else:
        own = ", ".join(custom) if custom else f"none, as {version_folder / 'splits.json'} does not exist"
        raise ConfigError(
            f"unknown split {split!r}\npredefined splits: {', '.join(predefined)}\n"
            f"splits of the data set: {own}"
        )
    found = [name for name in scenes_present if name in names]
    if not found:
        shown = ", ".join(scenes_present[:8]) + (" ..." if len(scenes_present) > 8 else "")
        raise DataError(
            f"split {split!r} has no scene in {version_folder}\nscenes there: {shown or 'none'}\n"
            f"choose another split or version"
        )
    return found


def check_evaluable(split: str, version: str) -> None:
    """Refuse a predefined split that the devkit does not evaluate on a version.

    Args:
        split: name of the split.
        version: for example v1.0-trainval.

    Raises:
        ConfigError: saying which version the split belongs to.
    """
    suffix = _VERSION_SUFFIX.get(split)
    if suffix is not None and not version.endswith(suffix):
        raise ConfigError(
            f"split {split!r} is evaluated on a version that ends in {suffix!r}, but data.version is "
            f"{version!r}\nchoose the split of that version, or name own splits in splits.json"
        )
