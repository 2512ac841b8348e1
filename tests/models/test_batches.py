"""A training batch is its samples: whatever they hold, however they are shared among processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bevperception.config_model import CentreConfig, ModelConfig, PerspectiveConfig, TemporalConfig
from bevperception.data.dataset import collate
from bevperception.models.bevformer import BEVFormer
from bevperception.structures import Batch, Boxes3D, CameraFrames, Targets
from bevperception.training.module import memory_from_history
from tests.models.builders import random_frames, take, tiny_config, tiny_model
from tests.models.perspective.scenes import some_boxes
from tests.processes import as_processes

GROUPS, QUERIES = 2, 5
# Of each sample: cameras that are there, earlier frames that are there, boxes.
CAMERAS = ([False, True, True], [True, False, False], [False, False, False], [True, True, False])
HISTORIES = ([True, True], [False, True], [False, False], [False, True])
BOXES = (3, 0, 1, 14)  # the last are more than a group has queries


def v1() -> ModelConfig:
    config = tiny_config(x_range_m=(-14.0, 30.0), y_range_m=(-12.0, 16.0))
    return replace(
        config,
        detection=replace(config.detection, queries=QUERIES, velocity="cells"),
        centres=CentreConfig(True, compare=True),
    )


def v2() -> ModelConfig:
    config = v1()
    perspective = PerspectiveConfig(
        enabled=True,
        score_threshold=0.007,
        size_limits_px=(20.0,),
        mean_depth_m=(150.0, 100.0),  # of a long lens: some proposals lie beyond the BEV
        std_depth_m=(80.0, 50.0),
    )
    return replace(
        config,
        temporal=TemporalConfig(mode="fusion", past=2, interval_s=0.5),
        perspective=perspective,
        detection=replace(config.detection, query_mode="hybrid", groups=GROUPS),
    )


CONFIGS = pytest.mark.parametrize("config", [v1(), v2()], ids=["v1", "v2"])


def training_model(config: ModelConfig) -> BEVFormer:
    """In training mode, with parts that begin with nothing doing something."""
    model = tiny_model(config)
    nn.init.normal_(model.centres.motion[-1].weight, 0, 0.1)
    if model.fusion is not None:
        nn.init.normal_(model.fusion.projection.weight, 0, 0.2)
    if model.perspective is not None:
        # A mean over a process's places that weights multiply, as published, does not add up over processes.
        nn.init.zeros_(model.perspective.head.attributes.weight)
    return model.train()


def frames_at(seed: int) -> CameraFrames:
    """Frames at times of each sample's own."""
    frames = random_frames(4, seed=seed)
    times_s = torch.tensor([0.5, 0.4, 0.55, 0.61], dtype=torch.float64) * seed + torch.arange(4.0)
    return replace(frames, camera_mask=torch.tensor(CAMERAS), timestamps_s=times_s)


def boxes_of(sample: int) -> Boxes3D:
    """Some boxes, one of them of unknown velocity, one without an attribute, one beyond the BEV."""
    boxes = some_boxes(BOXES[sample], seed=sample)
    boxes.values[1:2, 7:] = torch.nan
    boxes.values[2:3, 0] = 80.0
    boxes.attributes[0:1] = -1
    return boxes


def singles() -> list[Batch]:
    torch.manual_seed(0)
    queue, maps = [frames_at(seed) for seed in range(3)], (torch.rand(4, 7, 10, 10) > 0.6).double()
    present = torch.rand(4, 7) > 0.4
    maps[~present] = torch.nan
    return [
        Batch(
            history=[take(frames, b) for frames in queue[:2]],
            history_valid=torch.tensor([HISTORIES[b]]),
            frames=take(queue[2], b),
            targets=Targets([boxes_of(b)], maps[b : b + 1], present[b : b + 1]),
            tokens=[f"token-{b}"],
            scene_tokens=[f"scene-{b}"],
        )
        for b in range(4)
    ]


def outputs_of(model: BEVFormer, batch: Batch) -> Any:
    with torch.no_grad():
        return model(batch.frames, memory_from_history(model, batch, model.config.temporal))[0]


@CONFIGS
def test_a_training_batch_equals_its_samples(config: ModelConfig) -> None:
    model = training_model(config)
    parts = singles()
    together = outputs_of(model, collate(parts))
    proposals = []
    for b, part in enumerate(parts):
        alone = outputs_of(model, part)
        for name in ("bev", "segmentation_logits"):
            torch.testing.assert_close(getattr(together, name)[b], getattr(alone, name)[0])
        for name in ("heat_logits", "velocity"):
            torch.testing.assert_close(getattr(together.centres, name)[b], getattr(alone.centres, name)[0])
        groups = together.detection.groups
        assert groups == alone.detection.groups == config.detection.groups
        for group in range(groups):
            mine, its = together.detection.group(group), alone.detection.group(group)
            there = slice(None) if mine.valid is None else mine.valid[b]
            for name in ("class_logits", "box_codes"):
                found, expected = getattr(mine, name)[:, b][:, there], getattr(its, name)[:, 0]
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        proposals.append(alone.detection.class_logits.shape[2] // groups - QUERIES)
    if config.perspective.enabled:
        assert len(set(proposals)) == 4, "different numbers of proposals"


@CONFIGS
@pytest.mark.parametrize("shares", [[[0], [1], [2], [3]], [[1, 3], [2, 0]]], ids=["one each", "two each"])
def test_losses_do_not_depend_on_the_number_of_processes(
    config: ModelConfig, shares: list[list[int]]
) -> None:
    """The mean over processes is what one process with the whole batch gets, loss by loss."""
    model = training_model(config)
    parts = singles()

    def losses(samples: list[int], reduce_mean: Any) -> dict[str, Tensor]:
        batch = collate([parts[b] for b in samples])
        return model.losses(found[tuple(samples)], batch.targets, reduce_mean)

    found = {tuple(s): outputs_of(model, collate([parts[b] for b in s])) for s in [*shares, [0, 1, 2, 3]]}
    whole = losses([0, 1, 2, 3], lambda value: value)
    shared = as_processes([lambda mean, s=samples: losses(s, mean) for samples in shares])
    assert len(whole) == (18 if config.perspective.enabled else 8)
    for name, value in whole.items():
        mean = torch.stack([of_process[name] for of_process in shared]).mean()
        torch.testing.assert_close(mean, value, rtol=1e-6, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
        assert value > 0, name


@CONFIGS
def test_losses_of_a_compiled_graph_are_those_of_eager_mode(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a graph cannot know how many cameras or proposals there are, it takes padding along."""
    model = training_model(config)
    batch = collate(singles())
    eager = model.losses(outputs_of(model, batch), batch.targets)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        outputs = outputs_of(model, batch)
    assert (outputs.perspective is None) or not bool(outputs.perspective.present.all())
    if outputs.detection.valid is not None:
        valid = outputs.detection.valid[:, : outputs.detection.valid.shape[1] // GROUPS].long()
        assert (valid.diff(dim=1) > 0).any(), "a hole"
    compiled = model.losses(outputs, batch.targets)
    assert compiled.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(
            compiled[name], value, rtol=1e-6, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )
