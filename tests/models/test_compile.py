"""``torch.compile`` of the whole model for prediction: one graph, the values of eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bevperception.models.bevformer import BEVFormer
from bevperception.structures import BEVMemory, CameraFrames
from tests.models.builders import random_frames, tiny_model

Seen = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    # How many queries a camera sees is a shape that only the data knows.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch.compiler.reset()


def looking(model: BEVFormer) -> Callable[[CameraFrames, BEVMemory | None], Seen]:
    def look(frames: CameraFrames, memory: BEVMemory | None) -> Seen:
        outputs, kept = model(frames, memory)
        found = outputs.detection
        return outputs.bev, found.class_logits, found.box_codes, outputs.segmentation_logits, kept.features

    return look


def compiled(look: Any, backend: str) -> Any:
    return torch.compile(look, fullgraph=True, backend=backend)


def assert_close(found: Seen, expected: Seen, tolerance: float) -> None:
    for mine, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, eager, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_the_whole_model_is_one_graph(batch: int) -> None:
    """First frame, then with memory that one sample may lack, then with a missing camera."""
    model = tiny_model()
    look, graph = looking(model), compiled(looking(model), "aot_eager")
    first, second = random_frames(batch, seed=0), random_frames(batch, seed=1)
    assert_close(graph(first, None), look(first, None), 1e-9)
    _, memory = model(first)
    memory = memory.keep(torch.arange(batch) == 0)
    memory.features[1:] = float("nan")
    assert_close(graph(second, memory), look(second, memory), 1e-9)
    second.camera_mask = torch.ones(second.images.shape[:2], dtype=torch.bool)
    second.camera_mask[0, 1] = False
    second.images[0, 1] = float("nan")
    assert_close(graph(second, memory), look(second, memory), 1e-9)


@pytest.mark.slow
@torch.no_grad()
def test_generated_code_of_the_whole_model() -> None:
    model = tiny_model().float()
    frames = random_frames(1, seed=3)
    frames.images, frames.bev_to_image = frames.images.float(), frames.bev_to_image.float()
    assert_close(compiled(looking(model), "inductor")(frames, None), looking(model)(frames, None), 1e-3)
