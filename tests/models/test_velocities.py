"""Velocities from two BEVs compared, and boxes that read them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from bevperception.config_model import BEVConfig, CentreConfig, ModelConfig, TemporalConfig
from bevperception.errors import ConfigError
from bevperception.models.bevformer import BEVFormer
from bevperception.models.heads.centres import CentreHead, velocities_at
from bevperception.structures import BEVMemory, Targets
from tests.models.builders import random_frames, take, tiny_config, tiny_model
from tests.models.test_centres import SAMPLE


def reading_config(temporal: TemporalConfig | None = None) -> ModelConfig:
    """A model whose boxes read the velocities of cells that compare two BEVs."""
    config = tiny_config()
    detection = dataclasses.replace(config.detection, velocity="cells")
    return dataclasses.replace(
        config,
        detection=detection,
        centres=CentreConfig(True, compare=True),
        temporal=temporal or TemporalConfig(),
    )


def reading_model(config: ModelConfig | None = None) -> BEVFormer:
    """The same with a comparison that does something; its first one adds nothing."""
    model = tiny_model(config or reading_config())
    torch.manual_seed(1)
    torch.nn.init.normal_(model.centres.motion[-1].weight, 0, 0.1)
    return model


def boxes_differ(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-6)


def test_velocities_are_read_bilinearly_and_at_the_border_beyond_it() -> None:
    torch.manual_seed(0)
    velocity = torch.randn(2, 5, 4, 2, dtype=torch.float64).permute(0, 3, 1, 2)  # not contiguous
    cells = torch.tensor([[1.25, 2.5], [0.0, 0.0], [3.0, 4.0], [-7.0, 1.0], [9.0, 9.0]], dtype=torch.float64)
    read = velocities_at(velocity, cells.expand(2, 1, -1, -1))
    assert read.shape == (2, 1, 5, 2)
    for sample in range(2):
        v = velocity[sample]
        between = 0.5 * (0.75 * v[:, 2, 1] + 0.25 * v[:, 2, 2] + 0.75 * v[:, 3, 1] + 0.25 * v[:, 3, 2])
        slow = torch.stack((between, v[:, 0, 0], v[:, 4, 3], v[:, 1, 0], v[:, 4, 3]))
        torch.testing.assert_close(read[sample, 0], slow, rtol=0, atol=1e-12)
    assert velocities_at(velocity, cells[:0].expand(2, 1, -1, -1)).shape == (2, 1, 0, 2)


def test_no_gradient_reaches_the_places() -> None:
    velocity = torch.randn(1, 2, 3, 3, requires_grad=True)
    cells = torch.rand(1, 1, 4, 2, requires_grad=True)
    velocities_at(velocity, cells).sum().backward()
    assert cells.grad is None
    assert velocity.grad.sum() == pytest.approx(8.0)  # every sample's weights sum to one


def centre_head(channels: int, compare: bool = False) -> CentreHead:
    return CentreHead(settings=CentreConfig(compare=compare), bev=BEVConfig(channels=channels))


def test_a_comparison_begins_with_nothing() -> None:
    torch.manual_seed(0)
    head, plain = centre_head(4, compare=True), centre_head(4)
    plain.load_state_dict({k: v for k, v in head.state_dict().items() if not k.startswith("motion")})
    bev, before = torch.randn(2, 4, 5, 7), torch.randn(2, 4, 5, 7)
    for earlier in (None, (before, torch.ones(2, 5, 7))):
        found, expected = head(bev, earlier), plain(bev)
        torch.testing.assert_close(found.velocity, expected.velocity, rtol=0, atol=0)
        torch.testing.assert_close(found.heat_logits, expected.heat_logits, rtol=0, atol=0)


def test_gradients_of_a_comparison_by_finite_differences() -> None:
    torch.manual_seed(0)
    head = centre_head(2, compare=True).double()
    torch.nn.init.normal_(head.motion[-1].weight)
    bev = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    before = torch.randn(2, 2, 5, 3, dtype=torch.float64).mT.requires_grad_()
    coverage = torch.rand(2, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: head(a, (b, coverage)).velocity, (bev, before))


def test_it_learns_what_one_bev_does_not_tell() -> None:
    """A blob that stood a cell to the left or to the right before, seen after it moved."""

    def mean_error(compare: bool) -> float:
        torch.manual_seed(0)
        head = centre_head(4, compare)
        optimizer = torch.optim.Adam(head.parameters(), 0.01)
        rows, columns = torch.randint(7, (64,)), torch.randint(1, 8, (64,))
        side = torch.randint(2, (64,)) * 2 - 1
        now, before = torch.zeros(64, 4, 7, 9), torch.zeros(64, 4, 7, 9)
        sample = torch.arange(64)
        now[sample, 0, rows, columns] = before[sample, 0, rows, columns - side] = 1.0
        for _ in range(150):
            velocity = head(now, (before, torch.ones(64, 7, 9))).velocity[sample, 0, rows, columns]
            loss = (velocity - side).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert mean_error(compare=True) < 0.1
    assert mean_error(compare=False) > 0.4


@torch.no_grad()
def test_boxes_take_the_velocity_at_their_centres_and_nothing_else() -> None:
    model = reading_model()
    memory = model(random_frames(2, seed=0))[1]
    frames = random_frames(2, seed=1)
    outputs, _ = model(frames, memory)
    config = dataclasses.replace(
        reading_config(), detection=dataclasses.replace(reading_config().detection, velocity="queries")
    )
    plain = tiny_model(config)
    plain.load_state_dict(model.state_dict())
    without, _ = plain(frames, memory)
    found, own = outputs.detection.box_codes, without.detection.box_codes
    assert torch.equal(found[..., :8], own[..., :8])
    layers, batch, queries = found.shape[:3]
    for layer in range(layers):
        for sample in range(batch):
            for query in range(queries):
                cell = model.config.bev.grid.to_cells(own[layer, sample, query, :2])
                read = velocities_at(
                    outputs.centres.velocity[sample : sample + 1], cell.view(1, 1, 1, 2)
                ).view(2)
                added = found[layer, sample, query, 8:] - own[layer, sample, query, 8:]
                torch.testing.assert_close(added, read)
    assert boxes_differ(found[..., 8:], own[..., 8:])


@torch.no_grad()
def test_a_batch_with_mixed_history_equals_singles() -> None:
    model = reading_model()
    first, second = random_frames(2, seed=0), random_frames(2, seed=1)
    memory = model(first)[1]
    spoiled = memory.features.clone()
    spoiled[1] = torch.nan  # what is forgotten may hold anything
    memory = dataclasses.replace(memory, features=spoiled, valid=torch.tensor([True, False]))
    together = model(second, memory)[0].detection.box_codes
    kept = BEVMemory(memory.features[:1], memory.bev_to_global[:1], memory.timestamps_s[:1], memory.valid[:1])
    torch.testing.assert_close(together[:, :1], model(take(second, 0), kept)[0].detection.box_codes)
    torch.testing.assert_close(together[:, 1:], model(take(second, 1))[0].detection.box_codes)
    assert boxes_differ(together[:, :1], model(take(second, 0))[0].detection.box_codes)


@torch.no_grad()
def test_the_earlier_bev_is_brought_into_the_current_frame() -> None:
    model = reading_model()
    frames = random_frames(2, seed=0)
    memory = model(frames)[1]
    features, coverage = model.temporal.previous_bev(frames, memory)
    assert torch.equal(features, memory.features)  # the car stood
    assert bool((coverage == 1).all())
    moved = frames.bev_to_global.clone()
    cell_m = model.config.bev.grid.cell_x_m
    moved[:, :2, 3] += cell_m * frames.bev_to_global[:, :2, 0]  # one cell forward
    features, coverage = model.temporal.previous_bev(dataclasses.replace(frames, bev_to_global=moved), memory)
    torch.testing.assert_close(features[..., :-1], memory.features[..., 1:], rtol=0, atol=1e-5)
    assert bool((coverage[..., -1].abs() < 1e-5).all())
    assert model.temporal.previous_bev(frames, None) is None


@torch.no_grad()
def test_a_single_frame_model_compares_with_nothing() -> None:
    model = reading_model(reading_config(TemporalConfig(mode="fusion", past=0)))
    memory = model(random_frames(2, seed=0))[1]
    frames = random_frames(2, seed=1)
    alone, after = model(frames)[0], model(frames, memory)[0]
    assert torch.equal(alone.detection.box_codes, after.detection.box_codes)


def test_both_losses_teach_the_comparison() -> None:
    model = reading_model().float().train()
    frames = random_frames(2, dtype=torch.float32)
    memory = model(frames)[1].detach()
    outputs, _ = model(random_frames(2, seed=1, dtype=torch.float32), memory)
    losses = model.losses(dataclasses.replace(outputs, segmentation_logits=None), Targets([SAMPLE, SAMPLE]))
    for name in ("centres.velocity", "detection.box"):
        model.zero_grad()
        losses[name].backward(retain_graph=True)
        assert model.centres.motion[0].weight.grad.abs().sum() > 0


def test_reading_needs_the_centre_head() -> None:
    config = tiny_config()
    with pytest.raises(ConfigError, match=r"velocity=cells needs centres\.enabled"):
        dataclasses.replace(config, detection=dataclasses.replace(config.detection, velocity="cells"))
