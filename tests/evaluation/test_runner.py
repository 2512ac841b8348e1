"""Sharing scenes among processes; samples that cannot be read."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from bevperception.evaluation.runner import perceive, share_scenes
from bevperception.inference import StreamingPredictor
from bevperception.structures import BEVMemory, CameraFrames, ModelOutputs
from tests.training.standin import TinyModel, TinyScenes


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 9))
def test_every_scene_goes_to_one_process_and_loads_are_even(lengths: list[int], processes: int) -> None:
    shares = share_scenes(lengths, processes)
    assert len(shares) == processes
    assert sorted(scene for share in shares for scene in share) == list(range(len(lengths)))
    loads = [sum(lengths[scene] for scene in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    assert all(share == sorted(share) for share in shares)


class Diary(TinyModel):
    """Notes the instants of every frame and of its memory, None where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, float | None]] = []

    def forward(
        self, frames: CameraFrames, memory: BEVMemory | None = None
    ) -> tuple[ModelOutputs, BEVMemory]:
        remembered = None if memory is None or not memory.valid.any() else float(memory.timestamps_s)
        self.seen.append((float(frames.timestamps_s), remembered))
        return super().forward(frames, memory)


def test_memory_goes_on_over_samples_that_cannot_be_read() -> None:
    """In evaluation as in training streams: first, middle and last ones of a scene, two in a row."""
    dataset: Any = TinyScenes(12, bad=frozenset({2, 3, 6, 11}), scene_lengths=(6, 6))
    dataset.tokens = [f"token-{index}" for index in range(12)]
    model = Diary()
    predictor = StreamingPredictor(model, torch.device("cpu"), "32-true")
    found = list(perceive(predictor, dataset, dataset.tokens, workers=0))
    assert [seen.token for seen in found] == dataset.tokens
    assert [seen.token for seen in found if seen.bad is not None] == [f"token-{i}" for i in (2, 3, 6, 11)]
    assert all((seen.outputs is None) == (seen.bad is not None) for seen in found)
    first = [(0.0, None), (0.5, 0.0), (2.0, 0.5), (2.5, 2.0)]
    second = [(0.5, None), (1.0, 0.5), (1.5, 1.0), (2.0, 1.5)]
    assert model.seen == first + second
