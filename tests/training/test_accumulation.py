"""What counts optimiser steps and what counts micro-batches, where a step is made of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bevperception.checkpoints.weights import AVERAGE_KEY, read_checkpoint
from bevperception.errors import NonFiniteLossError
from bevperception.structures import Batch, ModelOutputs, Targets
from bevperception.training import module as training_module
from bevperception.training.averaging import UPDATES_KEY
from bevperception.training.module import TrainingModule
from bevperception.training.run import train
from tests.training.standin import TinyModel, TinySource, no_evaluation, tiny_config

ACCUMULATE = 3


def test_the_average_moves_once_a_step(tmp_path: Path) -> None:
    """By its recurrence over the weights that every step ends with."""
    config = tiny_config(
        steps=5, accumulate=ACCUMULATE, ema_decay=0.8, checkpoint_every=1, keep_checkpoints=0
    )
    train(config, TinyModel(), TinySource(), no_evaluation, tmp_path)
    expected: dict[str, Tensor] = {}
    for step in range(1, 6):
        checkpoint = read_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}.ckpt")
        weights = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
        decay = min(0.8, step / (9 + step))
        expected = {n: decay * expected.get(n, w) + (1 - decay) * w for n, w in weights.items()}
        assert checkpoint[UPDATES_KEY] == step
        for name, value in checkpoint[AVERAGE_KEY].items():
            torch.testing.assert_close(value, expected[name], msg=f"{name} after step {step}")


def test_a_step_is_evaluated_and_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated: list[str] = []

    def evaluate(model: nn.Module, device: torch.device, folder: Path) -> dict[str, Any]:
        evaluated.append(folder.name)
        return no_evaluation(model, device, folder)

    config = tiny_config(steps=6, accumulate=ACCUMULATE, validate_every=2, log_every=3)
    train(config, TinyModel(), TinySource(), evaluate, tmp_path)
    assert evaluated == ["step-00000002", "step-00000004", "step-00000006"]
    lines = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines == ["1/6", "3/6", "6/6"]


class FailsLate(TinyModel):
    """The gradient, not the loss, stops being finite in the second step's last micro-batch."""

    calls = 0

    def losses(self, outputs: ModelOutputs, targets: Targets, reduce_mean: Any) -> dict[str, Tensor]:
        self.calls += 1
        losses = super().losses(outputs, targets, reduce_mean)
        if self.calls == 2 * ACCUMULATE:
            losses["root"] = torch.sqrt((outputs.bev * 0.0).sum().abs())
        return losses


def test_a_message_names_all_samples_of_the_step_and_no_others(tmp_path: Path) -> None:
    config = tiny_config(batch_size=1, accumulate=ACCUMULATE)
    drawn: list[str] = []

    class Noting(TinySource):
        def __getitem__(self, item: tuple[int, int]) -> Any:
            drawn.append(f"token-{item[0]}")
            return super().__getitem__(item)

    with pytest.raises(NonFiniteLossError, match="gradient is NaN or infinite at step 2") as caught:
        train(config, FailsLate(), Noting(), no_evaluation, tmp_path)
    step = drawn[ACCUMULATE : 2 * ACCUMULATE]
    assert f"sample {', '.join(step)}\n" in str(caught.value)


def test_processes_and_micro_batches_drop_out_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = TinySource()[0, 0]
    assert isinstance(batch, Batch)

    def drawn(module: TrainingModule, rank: int, micro_batch: int) -> tuple[float, ...]:
        monkeypatch.setattr(training_module, "rank", lambda: rank)
        module.on_train_batch_start(batch, micro_batch)
        return tuple(torch.rand(3).tolist())

    one, other = (TrainingModule(tiny_config(accumulate=ACCUMULATE, seed=s), TinyModel()) for s in (0, 1))
    draws = [drawn(m, rank, k) for m in (one, other) for rank in range(3) for k in range(ACCUMULATE)]
    assert len(set(draws)) == len(draws) == 6 * ACCUMULATE
    assert drawn(one, 0, 0) == draws[0], "and a resumed run draws the same"


class Products(TinyModel):
    """Losses with a product of matrices, which autocast would make in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self.given: list[tuple[ModelOutputs, Targets]] = []

    def losses(self, outputs: ModelOutputs, targets: Targets, reduce_mean: Any) -> dict[str, Tensor]:
        assert outputs.segmentation_logits is not None
        logits = outputs.segmentation_logits
        self.given.append((outputs._map(lambda x: x.detach()), targets))
        self.found.append((logits @ (logits.mT + 0.123)).square().mean())
        return {"product": self.found[-1]}


def test_losses_are_made_outside_of_autocast(tmp_path: Path) -> None:
    model = Products()
    train(tiny_config(steps=1, precision="bf16-mixed"), model, TinySource(), no_evaluation, tmp_path)
    (found,), ((outputs, targets),) = list(model.found), list(model.given)
    assert outputs.segmentation_logits.dtype == torch.float32
    assert outputs.bev.dtype == torch.float32
    assert found.dtype == torch.float32
    again = model.losses(outputs, targets, lambda value: value)["product"]
    assert torch.equal(found.detach(), again)
