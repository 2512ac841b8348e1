"""The centre head: its targets against a slow drawing, its losses, its place in the model."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from bevperception.config_model import BEVConfig, CentreConfig
from bevperception.geometry import BEVGrid
from bevperception.models.heads.centres import CentreHead, CentreLoss, CentreTargets, centre_targets
from bevperception.structures import Boxes3D, CentreOutputs, Targets
from tests.models.builders import random_frames, tiny_config, tiny_model

GRID = BEVGrid(-20.0, 22.0, -9.0, 9.0, 9, 7)  # cells of 6 m by 2 m


def boxes(*rows: tuple[float, ...], labels: tuple[int, ...] = ()) -> Boxes3D:
    """Boxes of (x, y, length, width, vx, vy)."""
    values = torch.zeros(len(rows), 9, dtype=torch.float64)
    for row, (x, y, length, width, vx, vy) in zip(values, rows, strict=True):
        row[:] = torch.tensor([x, y, 0.5, length, width, 1.5, 0.3, vx, vy])
    return Boxes3D(values, torch.tensor(labels, dtype=torch.int64), torch.ones(len(rows)))


SAMPLE = boxes(
    (3.2, 1.1, 4.5, 1.9, 6.0, -1.0),
    (3.9, 3.0, 0.7, 0.6, 0.0, 1.4),
    (-19.9, -8.9, 11.0, 2.9, math.nan, math.nan),  # no known velocity
    (21.9, 8.9, 4.0, 2.0, 2.0, 0.0),
    (23.0, 0.0, 4.0, 2.0, 9.0, 9.0),  # beyond the grid
    labels=(0, 2, 1, 0, 2),
)


def slowly_drawn(sample: Boxes3D, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heat, velocity and weight, cell by cell and box by box."""
    heat = torch.zeros(classes, 9, 7, dtype=torch.float64)
    velocity, weight = torch.zeros(2, 9, 7, dtype=torch.float64), torch.zeros(9, 7, dtype=torch.float64)
    for row in range(9):
        for column in range(7):
            best, moving = 0.0, (0.0, 0.0)
            for value, label in zip(sample.values.tolist(), sample.labels.tolist(), strict=True):
                x, y, length, width, vx, vy = (value[i] for i in (0, 1, 3, 4, 7, 8))
                if not (-20 <= x <= 22 and -9 <= y <= 9):
                    continue
                own = min(max(round((x + 20) / 6 - 0.5), 0), 6), min(max(round((y + 9) / 2 - 0.5), 0), 8)
                away = math.hypot(6 * (column - own[0]), 2 * (row - own[1]))
                bell = math.exp(-0.5 * (away / (max(math.sqrt(length * width), 6.0) / 3)) ** 2)
                heat[label, row, column] = max(heat[label, row, column].item(), bell)
                if bell > best:
                    best, moving = bell, (vx, vy)
            if best >= 0.1 and not math.isnan(moving[0]):
                velocity[:, row, column] = torch.tensor(moving)
                weight[row, column] = best * (3 if math.hypot(*moving) >= 0.5 else 1)
    return heat, velocity, weight


def test_targets_are_those_drawn_slowly() -> None:
    none = boxes()
    targets = centre_targets([SAMPLE, none], GRID, 3)
    for index, sample in enumerate((SAMPLE, none)):
        heat, velocity, weight = slowly_drawn(sample, 3)
        torch.testing.assert_close(targets.heat[index], heat, rtol=0, atol=1e-12)
        torch.testing.assert_close(targets.velocity[index], velocity, rtol=0, atol=1e-12)
        torch.testing.assert_close(targets.weight[index], weight, rtol=0, atol=1e-12)
    assert targets.objects == 4
    assert targets.weight[0].count_nonzero() > 3


def outputs_of(targets: CentreTargets, sure: float) -> CentreOutputs:
    """Predictions that are right, and as sure as the logit says."""
    return CentreOutputs(torch.where(targets.heat == 1, sure, -sure), targets.velocity.clone())


def test_right_predictions_cost_nothing_and_wrong_ones_what_they_are_off() -> None:
    targets = centre_targets([SAMPLE], GRID, 3)
    right = CentreLoss(0.5, 2.0)(outputs_of(targets, 40.0), targets, lambda x: x)
    assert right["heat"].item() == pytest.approx(0.0, abs=1e-9)
    assert right["velocity"].item() == 0.0
    off = outputs_of(targets, -40.0)
    off.velocity[:, 0] += 1.5  # m/s
    wrong = CentreLoss(0.5, 2.0)(off, targets, lambda x: x)
    assert wrong["velocity"].item() == pytest.approx(3.0)
    assert wrong["heat"].item() > 0.5 * 40  # every centre is missed by 40


def test_loss_of_a_batch_is_the_mean_of_its_samples_by_objects() -> None:
    other = boxes((0.0, 0.0, 4.0, 2.0, 1.0, 1.0), labels=(1,))
    torch.manual_seed(0)
    guess = CentreOutputs(
        torch.randn(2, 3, 9, 7, dtype=torch.float64), torch.randn(2, 2, 9, 7, dtype=torch.float64)
    )
    loss = CentreLoss(1.0, 1.0)
    together = loss(guess, centre_targets([SAMPLE, other], GRID, 3), lambda x: x)
    heat = velocity = weights = 0.0
    for index, sample in enumerate((SAMPLE, other)):
        targets = centre_targets([sample], GRID, 3)
        alone = CentreOutputs(guess.heat_logits[index : index + 1], guess.velocity[index : index + 1])
        found = loss(alone, targets, lambda x: x)
        heat += found["heat"].item() * targets.objects
        velocity += found["velocity"].item() * targets.weight.sum().item()
        weights += targets.weight.sum().item()
    assert together["heat"].item() == pytest.approx(heat / 5)
    assert together["velocity"].item() == pytest.approx(velocity / weights)


def test_nothing_to_find_gives_a_finite_loss_and_no_velocity() -> None:
    targets = centre_targets([boxes()], GRID, 3)
    guess = CentreOutputs(torch.zeros(1, 3, 9, 7), torch.ones(1, 2, 9, 7))
    found = CentreLoss(1.0, 1.0)(guess, targets, lambda x: x)
    assert found["heat"].isfinite()
    assert found["heat"] > 0
    assert found["velocity"] == 0


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    head = CentreHead(settings=CentreConfig(), bev=BEVConfig(channels=3)).double()
    bev = torch.randn(2, 3, 7, 9, dtype=torch.float64).mT.requires_grad_()  # not contiguous
    targets = centre_targets([SAMPLE, boxes()], GRID, 10)

    def total(features: Tensor) -> Tensor:
        return torch.stack(list(CentreLoss(0.7, 1.3)(head(features), targets, lambda x: x).values())).sum()

    assert torch.autograd.gradcheck(total, (bev,))


def test_the_model_has_it_in_training_alone_unless_boxes_read_it() -> None:
    config = dataclasses.replace(tiny_config(), centres=CentreConfig(True))
    model = tiny_model(config, dtype=torch.float32)
    frames = random_frames(2, dtype=torch.float32)
    plain = tiny_model(dtype=torch.float32)
    missing, surplus = model.load_state_dict(plain.state_dict(), strict=False)
    assert not surplus
    assert {name.split(".")[0] for name in missing} == {"centres"}
    assert model(frames)[0].centres is None  # see test_velocities.py for boxes that do
    torch.testing.assert_close(
        model(frames)[0].detection.box_codes, plain(frames)[0].detection.box_codes, rtol=0, atol=0
    )
    outputs, _ = model.train()(frames)
    outputs = dataclasses.replace(outputs, segmentation_logits=None)
    losses = model.losses(outputs, Targets([SAMPLE, boxes()]))
    assert {"centres.heat", "centres.velocity"} < set(losses)
    losses["centres.velocity"].backward()
    assert model.bev_queries.weight.grad is not None
    assert model.bev_queries.weight.grad.abs().sum() > 0
