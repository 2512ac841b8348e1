"""Look up the scenes of a split: predefined by nuScenes, or named in the data set's ``splits.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nuscenes.utils.splits import create_splits_scenes

from bevperception.documents import MOST_JSON_BYTES, read_json
from bevperception.errors import ConfigError, DataError
from bevperception.names import has_file

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
    """Read the splits that a data set defines in ``splits.json``.

    Args:
        version_folder: folder of the tables, which may hold ``splits.json``.

    Returns:
        split name to scene names; empty without the file.

    Raises:
        DataError: if the file is not JSON of the form {"name": ["scene-...", ...]}.
    """
    path = version_folder / "splits.json"
    if not has_file(path, MOST_JSON_BYTES, f"splits {path}"):
        return {}
    content = read_json(path, str(path), DataError)
    if not isinstance(content, dict) or not all(
        isinstance(v, list) and all(isinstance(name, str) for name in v) for v in content.values()
    ):
        raise DataError(f'{path} must hold {{"split": ["scene name", ...], ...}}')
    for name in content:
        if not name.isprintable() or not name:  # a surrogate could not even be printed
            raise DataError(f"{path}: the name of a split must have printable characters, got {name!a}")
    return content


def usable_splits(version_folder: Path, scenes_present: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The splits that name a scene of the tables and that the devkit evaluates on their version.

    Args:
        version_folder: folder of the tables.
        scenes_present: scene names in the tables.

    Returns:
        split name to (scenes of it in the tables, scenes of it in all).

    Raises:
        DataError: if ``splits.json`` is damaged.
    """
    present = set(scenes_present)
    predefined = create_splits_scenes()
    usable: dict[str, tuple[int, int]] = {}
    for name, scenes in {**custom_splits(version_folder), **predefined}.items():
        if name in predefined and not version_folder.name.endswith(_VERSION_SUFFIX[name]):
            continue
        here = len(present.intersection(scenes))
        if here:
            usable[name] = (here, len(set(scenes)))
    return usable


def describe_splits(version_folder: Path, scenes_present: Sequence[str]) -> str:
    """One line for a message: the splits of :func:`usable_splits`, or how to make one.

    Args:
        version_folder: folder of the tables.
        scenes_present: scene names in the tables.
    """
    usable = usable_splits(version_folder, scenes_present)
    if usable:
        return "splits here: " + ", ".join(
            f"{name} ({here} of {all_})" for name, (here, all_) in usable.items()
        )
    example = scenes_present[0] if scenes_present else "scene-0001"
    return f'no split has a scene here; write {version_folder / "splits.json"}: {{"my_split": ["{example}"]}}'


def scenes_of_split(split: str, version_folder: Path, scenes_present: list[str]) -> list[str]:
    """Names of a split's scenes that are in the tables, in the tables' order.

    Args:
        split: predefined split (train, val, test, mini_train, mini_val, ...) or one of ``splits.json``.
        version_folder: folder of the tables.
        scenes_present: scene names in the tables.

    Raises:
        ConfigError: if no such split exists, or ``splits.json`` gives a predefined name to other scenes.
        DataError: if none of its scenes is in the tables.
    """
    predefined = create_splits_scenes()
    custom = custom_splits(version_folder)
    if split not in predefined and split not in custom:
        raise ConfigError(f"unknown split {split!r}\n{describe_splits(version_folder, scenes_present)}")
    names = set(predefined[split] if split in predefined else custom[split])
    if split in predefined and split in custom:
        _refuse_other_meaning(split, custom[split], names, version_folder, scenes_present)
    scenes = [name for name in scenes_present if name in names]
    if not scenes:
        shown = ", ".join(scenes_present[:8]) + (" ..." if len(scenes_present) > 8 else "")
        raise DataError(
            f"split {split!r} has no scene in {version_folder}; scenes there: {shown or 'none'}\n"
            f"{describe_splits(version_folder, scenes_present)}"
        )
    return scenes


def _refuse_other_meaning(
    split: str, custom: Sequence[str], names: set[str], version_folder: Path, scenes_present: Sequence[str]
) -> None:
    """Raise if ``splits.json`` gives a predefined name to other scenes than the devkit's."""
    present = set(scenes_present)
    if present.intersection(custom) != present.intersection(names):
        raise ConfigError(
            f"split {split!r} of {version_folder / 'splits.json'} names other scenes than nuScenes' own "
            f"{split!r}, which the devkit takes instead; give it another name there\n"
            f"{describe_splits(version_folder, scenes_present)}"
        )


def check_evaluable(split: str, version_folder: Path, scenes_present: Sequence[str]) -> None:
    """Refuse a predefined split that the devkit does not evaluate on a version.

    Args:
        split: name of the split.
        version_folder: folder of the tables, for example data/nuscenes/v1.0-trainval.
        scenes_present: scene names in the tables.

    Raises:
        ConfigError: saying which version the split belongs to.
    """
    suffix = _VERSION_SUFFIX.get(split)
    if suffix is not None and not version_folder.name.endswith(suffix):
        raise ConfigError(
            f"split {split!r} is evaluated on a version that ends in {suffix!r}, but data.version is "
            f"{version_folder.name!r}\n{describe_splits(version_folder, scenes_present)}"
        )
