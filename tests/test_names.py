"""Names and file names from data stay inside the data's folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bevperception.config import DataConfig
from bevperception.data.map_labels import expansion_path
from bevperception.data.nuscenes import NuScenesReader, SceneRecord
from bevperception.data.table_rules import file_name, is_good
from bevperception.errors import ConfigError, DataError, SampleError
from bevperception.evaluation.predictions import ChosenSamples, write_predictions
from bevperception.names import check_name, is_inside, read_file
from tests.fixtures.tiny_nuscenes import VERSION
from tests.streaming.helpers import micro_config

HOSTILE = [
    "",
    ".",
    "..",
    ".hidden",
    "../../x",
    "a/b",
    "/etc/x",
    "a\\b",
    "a\x00b",
    "a\nb",
    "x" * 201,
    "é" * 150,
    5,
]


@pytest.mark.parametrize("value", HOSTILE)
def test_what_would_be_a_path_is_no_name(value: object) -> None:
    with pytest.raises(ConfigError, match=r"the token .* is not a valid name"):
        check_name(value, "the token", ConfigError)


@pytest.mark.parametrize(
    "value", ["ca9a282c9e77460f8360f564131a8af5", "scene-0061", "a..b", "x" * 200, "größe 1"]
)
def test_names_are_names(value: str) -> None:
    assert check_name(value, "the token") == value


@pytest.mark.parametrize("name", ["", "..", "../x", "a/../../x", "/etc/passwd", "a/\x00", "a\n", "."])
def test_a_file_name_does_not_leave_its_root(name: str) -> None:
    assert not is_inside(name)
    assert not is_good(file_name(), ["samples/a.jpg", name])
    assert is_good(file_name(), ["samples/a.jpg", "samples/..a..b/c.jpg"])


def test_links_in_the_root_may_lead_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.jpg").write_bytes(b"image")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "samples").symlink_to(tmp_path / "disk")
    assert is_inside("samples/a.jpg")
    assert read_file(tmp_path / "root" / "samples" / "a.jpg", 5, "image") == b"image"
    with pytest.raises(DataError, match="No such file"):
        read_file(tmp_path / "none", 5, "image")


def test_a_pipe_of_the_data_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="a pipe or a device"):
        read_file(tmp_path / "pipe", 5, "image")


def test_images_outside_the_root_are_not_read(tiny_nuscenes: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(tiny_nuscenes / VERSION, root / VERSION)
    for folder in ("samples", "maps"):
        (root / folder).symlink_to(tiny_nuscenes / folder)
    table = root / VERSION / "sample_data.json"
    records = json.loads(table.read_text())
    (first, second) = [r for r in records if "CAM_FRONT/" in r["filename"]][:2]
    first["filename"] = f"../{tiny_nuscenes.name}/{first['filename']}"
    table.write_text(json.dumps(records))
    reader = NuScenesReader(DataConfig(root=str(root), version=VERSION))
    with pytest.raises(
        SampleError, match=r"filename must be the name of a file inside the data root, .* got '\.\./"
    ) as caught:
        reader.sample(first["sample_token"])
    assert caught.value.token == first["sample_token"]
    path = next(c.path for c in reader.sample(second["sample_token"]).cameras if c.channel == "CAM_FRONT")
    assert read_file(path, 10**6, "image") == (tiny_nuscenes / second["filename"]).read_bytes()


def test_maps_of_hostile_names_are_not_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"map name '\.\./x' is not a valid name"):
        expansion_path(tmp_path, "../x")


def test_a_hostile_token_is_refused_before_anything_is_predicted(tmp_path: Path) -> None:
    token = "../../../x"
    chosen = ChosenSamples([SceneRecord("s", "s", "l", (token,))], [token], frozenset([token]))
    model: Any = None
    config = micro_config(tmp_path)
    reader: Any = None
    with pytest.raises(DataError, match=r"sample token '\.\./\.\./\.\./x' is not a valid name"):
        write_predictions(model, config, reader, chosen, torch.device("cpu"), tmp_path, segmentation=True)
