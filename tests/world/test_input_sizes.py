"""Shipped weights perceive the same, whatever the size of the network's input leaves of the last cells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bevperception.checkpoints.weights import load_model, read_weights
from bevperception.config import ExperimentConfig
from bevperception.config_io import ConfigSource, typed_config
from bevperception.data.dataset import build_dataset
from bevperception.data.nuscenes import NuScenesReader
from bevperception.inference import StreamingPredictor
from bevperception.structures import Boxes3D

FRAMES = 2


@dataclass(frozen=True)
class Seen:
    """What a model made of one frame: features (C, rows, columns) and boxes."""

    bev: Tensor
    boxes: Boxes3D


def shipped_config(root: Path, size: tuple[int, int]) -> ExperimentConfig:
    weights = read_weights("world_v2")
    config = typed_config(ConfigSource(weights.card.config, name="world_v2"))
    data = replace(config.data, root=str(root), version="v1.0-world", image_size=size)
    return replace(config, data=data)


def perceive(root: Path, size: tuple[int, int]) -> list[Seen]:
    """The first frames of a scene, one after the other."""
    config = shipped_config(root, size)
    dataset = build_dataset(NuScenesReader(config.data), config, "world_val", training=False)
    predictor = StreamingPredictor(load_model(read_weights("world_v2"), config))
    seen = []
    for index in range(FRAMES):
        outputs = predictor.observe(dataset.load(index).frames, "scene")
        seen.append(Seen(outputs.bev[0], predictor.decode(outputs)[0]))
    return seen


@pytest.mark.parametrize(
    ("height", "width", "least"), [(225, 400, 0.94), (450, 800, 0.96), (900, 1600, 0.987)]
)
def test_heights_between_two_multiples_of_the_stride(
    world: Path, height: int, width: int, least: float
) -> None:
    """The images' own height, the multiple of 32 below (a row or four cut off), and the one above (blank).

    Pixels that are looked for at a share of the input's height, where the maps have a cell more, lie up to
    a cell beside: the features then have a cosine similarity of 0.89, 0.94 and 0.98.

    Args:
        world: images of 225 x 400.
        height, width: of the input.
        least: mean cosine similarity of the features of ``height`` and of the multiple below.
    """
    cut, own, padded = (
        perceive(world, (rows, width)) for rows in (height // 32 * 32, height, -(-height // 32) * 32)
    )
    for lower, middle, upper in zip(cut, own, padded, strict=True):
        torch.testing.assert_close(middle.bev, upper.bev, rtol=0, atol=1e-3)
        assert torch.equal(middle.boxes.labels, upper.boxes.labels)
        torch.testing.assert_close(middle.boxes.values, upper.boxes.values, rtol=0, atol=1e-2)
        assert torch.nn.functional.cosine_similarity(lower.bev, middle.bev, dim=0).mean() > least
