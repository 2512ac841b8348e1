"""Shipped weights perceive the same, whatever the size of the network's input leaves of the last cells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
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
from bevperception.models.bevformer import BEVFormer
from bevperception.structures import Boxes3D


@dataclass(frozen=True)
class Seen:
    """What a model made of one frame: features (C, rows, columns) and boxes."""

    bev: Tensor
    boxes: Boxes3D


@lru_cache(maxsize=1)
def shipped(root: Path) -> tuple[ExperimentConfig, NuScenesReader, BEVFormer]:
    """The configuration inside shipped weights over a world's data, and what is read once for all sizes."""
    weights = read_weights("world_v2")
    config = typed_config(ConfigSource(weights.card.config, name="world_v2"))
    config = replace(config, data=replace(config.data, root=str(root), version="v1.0-world"))
    return config, NuScenesReader(config.data), load_model(weights, config)


def perceive(root: Path, size: tuple[int, int], frames: int) -> list[Seen]:
    """The first frames of a scene, one after the other."""
    config, reader, model = shipped(root)
    config = replace(config, data=replace(config.data, image_size=size))
    dataset = build_dataset(reader, config, "world_val", training=False)
    predictor = StreamingPredictor(model)
    seen = []
    for index in range(frames):
        outputs = predictor.observe(dataset.load(index).frames, "scene")
        seen.append(Seen(outputs.bev[0], predictor.decode(outputs)[0]))
    return seen


@pytest.mark.parametrize(
    ("height", "width", "frames", "least"),
    [(225, 400, 2, 0.94), (450, 800, 2, 0.96), (900, 1600, 1, 0.987)],  # the last one takes 16 times as long
)
def test_heights_between_two_multiples_of_the_stride(
    world: Path, height: int, width: int, frames: int, least: float
) -> None:
    """The images' own height, the multiple of 32 below (a row or four cut off), and the one above (blank).

    Pixels that are looked for at a share of the input's height, where the maps have a cell more, lie up to
    a cell beside: the features then have a cosine similarity of 0.89, 0.94 and 0.98.

    Args:
        world: images of 225 x 400.
        height, width: of the input.
        frames: one after the other, with memory.
        least: mean cosine similarity of the features of ``height`` and of the multiple below.
    """
    cut, own, padded = (
        perceive(world, (rows, width), frames) for rows in (height // 32 * 32, height, -(-height // 32) * 32)
    )
    for lower, middle, upper in zip(cut, own, padded, strict=True):
        torch.testing.assert_close(middle.bev, upper.bev, rtol=0, atol=1e-3)
        assert torch.equal(middle.boxes.labels, upper.boxes.labels)
        torch.testing.assert_close(middle.boxes.values, upper.boxes.values, rtol=0, atol=1e-2)
        assert torch.nn.functional.cosine_similarity(lower.bev, middle.bev, dim=0).mean() > least
