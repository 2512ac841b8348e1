"""The reader on a real nuScenes key frame, against the devkit's own arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nuscenes.utils.geometry_utils import BoxVisibility, view_points

from bevperception.config import DataConfig
from bevperception.data.dataset import NuScenesDataset, collate
from bevperception.data.nuscenes import NuScenesReader
from bevperception.geometry import project_points, transform_points
from bevperception.structures import Batch
from tests.golden.case import Case


def config_for(root: Path, **settings: object) -> DataConfig:
    return DataConfig(root=str(root), version="v1.0-mini", train_split="mini_train", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("bev_frame", ["ego", "lidar"])
def test_box_centres_project_where_the_devkit_puts_them(real_keyframe: Path, bev_frame: str) -> None:
    reader = NuScenesReader(config_for(real_keyframe, bev_frame=bev_frame, min_points=0))
    token = reader.nusc.sample[0]["token"]
    sample = reader.sample(token)
    annotations = reader.annotations(sample)
    seen = 0
    for camera in sample.cameras:
        data_token = reader.nusc.get("sample", token)["data"][camera.channel]
        _, boxes, intrinsics = reader.nusc.get_sample_data(data_token, box_vis_level=BoxVisibility.ANY)
        by_token = {box.token: box for box in boxes}
        matrix = camera.projection(sample.bev_to_global)
        pixels, depth = project_points(annotations.boxes.values[:, :3].double(), matrix)
        for index, box_token in enumerate(annotations.tokens):
            if box_token not in by_token:
                continue
            box = by_token[box_token]
            expected = view_points(box.center[:, None], intrinsics, normalize=True)[:2, 0]
            np.testing.assert_allclose(depth[index], box.center[2], atol=1e-4)
            np.testing.assert_allclose(pixels[index].numpy(), expected, atol=0.02)
            seen += 1
    assert seen >= 60


@pytest.mark.parametrize("bev_frame", ["ego", "lidar"])
def test_boxes_return_to_the_annotations(real_keyframe: Path, bev_frame: str) -> None:
    reader = NuScenesReader(config_for(real_keyframe, bev_frame=bev_frame))
    sample = reader.sample(reader.nusc.sample[0]["token"])
    annotations = reader.annotations(sample)
    assert len(annotations.boxes) == 65
    centres = transform_points(annotations.boxes.values[:, :3].double(), sample.bev_to_global)
    for index, token in enumerate(annotations.tokens):
        box = reader.nusc.get_box(token)
        np.testing.assert_allclose(centres[index].numpy(), box.center, atol=1e-4)
        width, length, height = box.wlh
        np.testing.assert_allclose(
            annotations.boxes.values[index, 3:6].numpy(), [length, width, height], rtol=1e-6
        )
    assert annotations.boxes.values[:, 7:].isnan().all()


def test_projection_matches_the_published_pipeline(real_keyframe: Path, pytestconfig: pytest.Config) -> None:
    # The golden case holds lidar2img of the same key frame; the tables were rebuilt in float32.
    case = Case.load(pytestconfig.getoption("--golden-dir") / "data_v1_a.npz")
    reader = NuScenesReader(config_for(real_keyframe, bev_frame="lidar"))
    sample = reader.sample(reader.nusc.sample[0]["token"])
    matrices = torch.stack([c.projection(sample.bev_to_global) for c in sample.cameras])
    expected = case.array("out.lidar2img")
    assert float((matrices - expected).abs().max() / expected.abs().max()) < 1e-6


def test_dataset_gives_the_keyframe(real_keyframe: Path) -> None:
    config = config_for(real_keyframe)
    dataset = NuScenesDataset(NuScenesReader(config), "mini_train", config)
    batch = collate([dataset[0], dataset[(0, 3)]])
    assert isinstance(batch, Batch)
    assert batch.frames.images.shape == (2, 6, 3, 448, 800)
    assert batch.frames.images.dtype == torch.float32
    assert torch.equal(batch.frames.images[0], batch.frames.images[1])
    assert batch.targets is not None
    assert [len(b) for b in batch.targets.boxes] == [65, 65]
    assert batch.skipped == []
