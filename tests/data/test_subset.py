"""Cutting a small data set from a large one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nuscenes.nuscenes import NuScenes

from bevperception.config import DataConfig
from bevperception.data.dataset import NuScenesDataset
from bevperception.data.nuscenes import NuScenesReader
from bevperception.data.subset import write_subset
from bevperception.errors import DataError
from tests.fixtures.tiny_nuscenes import VERSION


def test_subset_holds_the_same_samples(tiny_nuscenes: Path, tmp_path: Path) -> None:
    whole = NuScenes(VERSION, str(tiny_nuscenes), verbose=False)
    tokens = write_subset(whole, "scene-9002", 2, tmp_path / "cut", "v1.0-cut", "demo")
    assert len(tokens) == 2
    cut = NuScenesDataset(
        NuScenesReader(DataConfig(root=str(tmp_path / "cut"), version="v1.0-cut")), "demo", DataConfig()
    )
    source = NuScenesDataset(
        NuScenesReader(DataConfig(root=str(tiny_nuscenes), version=VERSION)), "tiny_train", DataConfig()
    )
    assert cut.tokens == tokens
    for index, token in enumerate(tokens):
        a, b = cut.load(index), source.load(source.tokens.index(token))
        assert torch.equal(a.frames.images, b.frames.images)
        assert torch.equal(a.frames.bev_to_image, b.frames.bev_to_image)
        assert torch.equal(a.targets.boxes[0].values[:, :7], b.targets.boxes[0].values[:, :7])
    records = cut.reader.nusc
    assert {r["scene_token"] for r in records.sample} == {records.scene[0]["token"]}
    assert all(r["nbr_annotations"] == 2 for r in records.instance)


def test_subset_is_replaced_but_nothing_else_is(tiny_nuscenes: Path, tmp_path: Path) -> None:
    whole = NuScenes(VERSION, str(tiny_nuscenes), verbose=False)
    target = tmp_path / "cut"
    assert len(write_subset(whole, "scene-9001", 9, target, "v1.0-cut", "demo")) == 4
    assert len(write_subset(whole, "scene-9003", 1, target, "v1.0-cut", "demo")) == 1
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    with pytest.raises(DataError, match="is no subset"):
        write_subset(whole, "scene-9003", 1, other, "v1.0-cut", "demo")
    assert (other / "precious").read_text() == "x"
    with pytest.raises(DataError, match="no scene 'scene-1'"):
        write_subset(whole, "scene-1", 1, target, "v1.0-cut", "demo")
    assert (tiny_nuscenes / VERSION / "sample.json").is_file()
