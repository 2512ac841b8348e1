"""``torch.compile`` of the whole model for prediction: one graph, the values of eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from bevperception.config_model import ModelConfig, TemporalConfig
from bevperception.models.bevformer import BEVFormer
from bevperception.structures import BEVMemory, CameraFrames
from tests.models.builders import random_frames, tiny_config, tiny_model
from tests.models.test_bevformer_v2 import v2_config

Seen = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    # How many queries a camera sees is a shape that only the data knows.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch.compiler.reset()


class PlainBackbone(nn.Module):
    """Maps of the micro backbone's sizes by one convolution each.

    Tracing the real one takes as long as all the rest; the first test has it in its first graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(3, channels, 3, stride, 1) for channels, stride in ((64, 16), (128, 32))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        return [torch.tanh(stage(images)) for stage in self.stages]


def put_plain_backbone(model: BEVFormer) -> None:
    sizes = [f.shape for f in model.backbone(torch.zeros(1, 3, 67, 101).double())]
    model.backbone = PlainBackbone().double()  # type: ignore[assignment]
    assert [f.shape for f in model.backbone(torch.zeros(1, 3, 67, 101).double())] == sizes


def quick_model(config: ModelConfig, detects: bool = True) -> BEVFormer:
    """A tiny model of one layer each, behind the plain backbone."""
    detection = replace(config.detection, layers=1, enabled=detects)
    model = tiny_model(replace(config, bev=replace(config.bev, layers=1), detection=detection))
    put_plain_backbone(model)
    return model


def looking(model: BEVFormer) -> Callable[[CameraFrames, BEVMemory | None], Seen]:
    def look(frames: CameraFrames, memory: BEVMemory | None) -> Seen:
        outputs, kept = model(frames, memory)
        found = outputs.detection
        maps = () if outputs.segmentation_logits is None else (outputs.segmentation_logits,)
        return outputs.bev, found.class_logits, found.box_codes, *maps, kept.features

    return look


def streaming(model: BEVFormer) -> Callable[[CameraFrames, BEVMemory | None], tuple[Seen, BEVMemory]]:
    def look(frames: CameraFrames, memory: BEVMemory | None) -> tuple[Seen, BEVMemory]:
        outputs, kept = model(frames, memory)
        boxes = () if outputs.detection is None else (outputs.detection.box_codes,)
        return (outputs.bev, *boxes, outputs.segmentation_logits), kept

    return look


def compiled(look: Any, backend: Any) -> Any:
    return torch.compile(look, fullgraph=True, backend=backend)


def assert_close(found: Seen, expected: Seen, tolerance: float) -> None:
    for mine, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, eager, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_the_whole_model_is_one_graph(batch: int) -> None:
    """First frame, then with memory that one sample may lack, then with a missing camera."""
    model = tiny_model() if batch > 1 else quick_model(tiny_config())
    look, graph = looking(model), compiled(looking(model), "aot_eager")
    first, second = random_frames(batch, seed=0), random_frames(batch, seed=1)
    assert_close(graph(first, None), look(first, None), 1e-9)
    if batch > 1:
        put_plain_backbone(model)
    _, memory = model(first)
    memory = memory.keep(torch.arange(batch) == 0)
    memory.features[1:] = float("nan")
    assert_close(graph(second, memory), look(second, memory), 1e-9)
    second.camera_mask = torch.ones(second.images.shape[:2], dtype=torch.bool)
    second.camera_mask[0, 1] = False
    second.images[0, 1] = float("nan")
    assert_close(graph(second, memory), look(second, memory), 1e-9)


MEMORIES = {
    "recurrent, by time": TemporalConfig(interval_s=0.5),
    "fusion": TemporalConfig(mode="fusion", past=2),
    "fusion, by time": TemporalConfig(mode="fusion", past=2, interval_s=0.5),
    "fusion, published": TemporalConfig(mode="fusion_published", past=2),
}


@pytest.mark.parametrize("temporal", MEMORIES.values(), ids=list(MEMORIES))
@torch.no_grad()
def test_a_stream_is_two_graphs(temporal: TemporalConfig) -> None:
    """The first frame, and all others: frames at no fixed rate, a gap, a sample lost.

    The decoder is traced with one of the memories: it sees no more of any than the BEV features.
    """
    model = quick_model(replace(tiny_config(), temporal=temporal), detects=temporal.mode == "recurrent")
    if model.fusion is not None:
        model.fusion.projection.weight.normal_(0, 0.2)
    look = streaming(model)
    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(look, counter)
    mine: BEVMemory | None = None
    eager: BEVMemory | None = None
    for step, time_s in enumerate((0.0, 0.5, 0.7, 1.05, 1.2, 4.0, 4.4, 4.6)):
        stamps = torch.tensor([time_s, 2 * time_s]).double()
        frames = replace(random_frames(2, seed=step), timestamps_s=stamps)
        seen, mine = graph(frames, mine)
        expected, eager = look(frames, eager)
        assert_close(seen, expected, 1e-9)
        if step == 4:
            mine, eager = (m.keep(torch.tensor([True, False])) for m in (mine, eager))
    assert counter.frame_count == 2


@pytest.mark.parametrize("threshold", [0.007, 1.0])
@torch.no_grad()
def test_hybrid_queries_are_part_of_the_graph(threshold: float) -> None:
    """Proposals for some samples, for none; a camera that is not there; what is padded is not looked at."""
    config = v2_config(threshold, limit=15)
    model = quick_model(replace(config, segmentation=replace(config.segmentation, enabled=False)))
    look, graph = looking(model), compiled(looking(model), "aot_eager")
    frames = random_frames(2, seed=0)
    frames.camera_mask = torch.tensor([[True, False, True], [False, False, False]])
    frames.images[0, 1] = float("nan")
    queries = model.propose(model.perspective(model.image_features(frames), frames))
    assert queries.padding.shape[1] == (0 if threshold == 1.0 else (~queries.padding[0]).sum())
    eager, found = model(frames)[0].detection, graph(frames, None)
    everything = (eager.class_logits, eager.box_codes)
    for b in range(2):
        valid = 11 + (0 if threshold == 1.0 else int((~queries.padding[b]).sum()))
        for mine, expected in zip(found[1:3], everything, strict=True):
            torch.testing.assert_close(mine[:, b, :valid], expected[:, b, :valid], rtol=1e-9, atol=1e-9)
    # Without a mask it is another graph, which takes long to trace: with proposals only.
    mask = torch.ones(2, 3, dtype=torch.bool) if threshold == 1.0 else None
    full = replace(frames, camera_mask=mask, images=frames.images.nan_to_num())
    assert_close(graph(full, None)[0:1], look(full, None)[0:1], 1e-9)


@pytest.mark.slow
@torch.no_grad()
def test_generated_code_of_the_whole_model() -> None:
    model = tiny_model().float()
    frames = random_frames(1, seed=3)
    frames.images, frames.bev_to_image = frames.images.float(), frames.bev_to_image.float()
    assert_close(compiled(looking(model), "inductor")(frames, None), looking(model)(frames, None), 1e-3)
