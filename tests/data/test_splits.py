"""Which scenes a split names, and what an error about a split lists."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from nuscenes.utils.splits import create_splits_scenes

from bevperception.cli.make_world import EXAMPLES
from bevperception.config import DataConfig
from bevperception.data.nuscenes import NuScenesReader
from bevperception.data.splits import check_evaluable, describe_splits, scenes_of_split, usable_splits
from bevperception.errors import ConfigError, DataError
from bevperception.world import WorldConfig
from bevperception.world.settings import MINI_VERSION
from tests.fixtures.tiny_nuscenes import TRAIN_SPLIT, VAL_SPLIT, VERSION

NAMES = ["scene-9001", "scene-9002", "scene-9003"]
HERE = f"splits here: {TRAIN_SPLIT} (2 of 2), {VAL_SPLIT} (1 of 1)"


@pytest.fixture
def folder(tiny_nuscenes: Path, tmp_path: Path) -> Path:
    """The version folder of a copy of the tables."""
    return Path(shutil.copytree(tiny_nuscenes / VERSION, tmp_path / VERSION))


def write(folder: Path, splits: object) -> None:
    (folder / "splits.json").write_text(json.dumps(splits))


def test_errors_list_the_splits_that_exist_here(tiny_nuscenes: Path) -> None:
    reader = NuScenesReader(DataConfig(root=str(tiny_nuscenes), version=VERSION))
    with pytest.raises(ConfigError, match=re.escape(f"unknown split 'dev'\n{HERE}")):
        reader.scenes("dev")
    with pytest.raises(
        DataError, match=r"split 'val' has no scene in .*; scenes there: scene-9001"
    ) as caught:
        reader.scenes("val")
    assert str(caught.value).endswith(HERE)
    with pytest.raises(
        ConfigError, match=r"'val' is evaluated on a version that ends in 'trainval'"
    ) as caught_:
        check_evaluable("val", tiny_nuscenes / VERSION, NAMES)
    assert str(caught_.value).endswith(HERE)
    check_evaluable(VAL_SPLIT, tiny_nuscenes / VERSION, NAMES)


def test_only_splits_with_scenes_here_and_of_this_version_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "v1.0-mini"
    folder.mkdir()
    # 0061 and 0103 are scenes of mini_train and mini_val, and of nuScenes' own train and val too.
    present = ["scene-0061", "scene-0103", "scene-0553"]
    write(folder, {"own": ["scene-0061"], "elsewhere": ["scene-0001"], "none": []})
    assert usable_splits(folder, present) == {"own": (1, 1), "mini_train": (2, 8), "mini_val": (1, 2)}
    write(folder, {})
    nothing = describe_splits(folder, ["street-1"])
    assert "no split has a scene here" in nothing
    assert '{"my_split": ["street-1"]}' in nothing


def test_a_reserved_name_must_not_mean_other_scenes(folder: Path) -> None:
    write(folder, {"val": ["scene-9003"], "mine": ["scene-9003"]})
    with pytest.raises(ConfigError, match=r"'val' of .*splits.json names other scenes than nuScenes' own"):
        scenes_of_split("val", folder, NAMES)
    assert usable_splits(folder, NAMES) == {"mine": (1, 1)}
    own = create_splits_scenes()["val"]
    present = [*NAMES, own[0], own[1]]
    with pytest.raises(ConfigError, match="give it another name"):
        scenes_of_split("val", folder, present)
    write(folder, {"val": [own[1], own[0]]})
    assert scenes_of_split("val", folder, present) == own[:2], "the same scenes, so nothing is unclear"


@pytest.mark.parametrize("content", ['{"tiny_val": "scene-9003"}', "[1]", "{", '{"tiny_val": [3]}', "\\xff"])
def test_damaged_splits_file(folder: Path, content: str) -> None:
    (folder / "splits.json").write_text(content)
    with pytest.raises(DataError, match=r"splits\.json"):
        scenes_of_split(VAL_SPLIT, folder, NAMES)


@pytest.mark.parametrize("name", ["\ud800x", "a\nb", "\x1b[2J", ""])
def test_names_of_splits_can_be_printed(folder: Path, name: str) -> None:
    write(folder, {"mine": ["scene-9003"], name: ["scene-9003"]})
    with pytest.raises(DataError, match=r"splits\.json: the name of a split must have printable") as caught:
        usable_splits(folder, NAMES)
    assert str(caught.value).isascii()


def test_splits_that_are_a_pipe(folder: Path) -> None:
    (folder / "splits.json").unlink()
    os.mkfifo(folder / "splits.json")
    with pytest.raises(DataError, match=r"cannot read splits .*splits\.json: it is a pipe"):
        scenes_of_split(VAL_SPLIT, folder, NAMES)


def test_no_splits_file(folder: Path) -> None:
    (folder / "splits.json").unlink()
    with pytest.raises(
        ConfigError, match=r"unknown split 'tiny_val'\nno split has a scene here; write .*splits\.json"
    ):
        scenes_of_split(VAL_SPLIT, folder, NAMES)


@pytest.mark.parametrize("version", ["v1.0-world", MINI_VERSION])
def test_a_world_offers_no_split_that_the_devkit_reads_otherwise(version: str) -> None:
    config = WorldConfig(scenes=10, version=version)
    predefined = create_splits_scenes()
    assert set(config.splits["world_train" if version != MINI_VERSION else "mini_train"]) <= set(
        config.scene_names
    )
    for name, scenes in config.splits.items():
        assert set(scenes) == set(predefined.get(name, scenes)) & set(config.scene_names)
        check_evaluable(name, Path(version), config.scene_names)


def test_make_world_teaches_splits_that_it_makes() -> None:
    taught = re.findall(r"(?:--split|_split) (\w+)", EXAMPLES)
    assert len(taught) == 3
    assert set(taught) <= set(WorldConfig(scenes=2).splits)
    for name in re.search(r"has the splits (\w+) and (\w+)", EXAMPLES).groups():  # type: ignore[union-attr]
        assert name in WorldConfig(scenes=2, version=MINI_VERSION).splits
