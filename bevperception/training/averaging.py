"""Exponential moving average of the weights: what is evaluated and exported.

Own code instead of Lightning's EMAWeightAveraging: that one keeps a copy of the whole module on the
CPU, has no warm-up of the decay (a short run would export its first steps), and writes the average where
a checkpoint's training weights belong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from bevperception.checkpoints.weights import AVERAGE_KEY

UPDATES_KEY = "bevperception_average_updates"
"""Key of a checkpoint for the number of updates of the average."""


def warmed_up_decay(decay: float, updates: int) -> float:
    """Decay of the next update: short averages first, so that early weights are soon forgotten.

    Args:
        decay: of a long run, in [0, 1).
        updates: updates made before.

    Returns:
        ``min(decay, (1 + updates) / (10 + updates))``, the rule of TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1.0 + updates) / (10.0 + updates))


class WeightAverage:
    """Moving average of a module's trainable floating-point parameters.

    Args:
        decay: see :func:`warmed_up_decay`.
    """

    def __init__(self, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's weights; the first call starts it at them."""
        weights = self._weights(module)
        if not self.average:
            self.average = {name: weight.detach().clone() for name, weight in weights.items()}
        self._move_to(weights)
        share = 1.0 - warmed_up_decay(self.decay, self.updates)
        names = list(weights)
        torch._foreach_lerp_([self.average[n] for n in names], [weights[n] for n in names], share)
        self.updates += 1

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Swap the averaged weights into the module inside the block; the trained ones return after it."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        weights = self._weights(module)
        self._move_to(weights)
        for name, average in self.average.items():
            kept = weights[name].detach().clone()
            weights[name].copy_(average)
            average.copy_(kept)

    def _move_to(self, weights: dict[str, Tensor]) -> None:
        # A restored average begins on the CPU.
        self.average = {name: value.to(weights[name].device) for name, value in self.average.items()}

    @staticmethod
    def _weights(module: nn.Module) -> dict[str, Tensor]:
        return {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and parameter.is_floating_point()
        }


class WeightAveraging(Callback):
    """Keeps a :class:`WeightAverage` of the trained model, in checkpoints too.

    Args:
        decay: 0 keeps none; then :meth:`applied` changes nothing.
    """

    def __init__(self, decay: float) -> None:
        self.weights = WeightAverage(decay)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after every optimiser step."""
        if self.weights.decay > 0.0 and trainer.global_step > self.weights.updates:
            self.weights.update(model_of(pl_module))

    @contextmanager
    def applied(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Swap the averaged weights into the training module's model inside the block."""
        if not self.weights.average:
            yield
            return
        with self.weights.applied(model_of(pl_module)):
            yield

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average beside the training weights."""
        checkpoint[AVERAGE_KEY] = dict(self.weights.average)
        checkpoint[UPDATES_KEY] = self.weights.updates

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the average."""
        self.weights.average = dict(checkpoint[AVERAGE_KEY])
        self.weights.updates = int(checkpoint[UPDATES_KEY])


def model_of(pl_module: pl.LightningModule) -> nn.Module:
    """The network inside a training module."""
    model = pl_module.model
    assert isinstance(model, nn.Module)
    return model
