"""Lightning callbacks: evaluation, progress, and the report of skipped samples."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from torch import nn

from bevperception.checkpoints.weights import Card, code_commit, save_weights
from bevperception.config_io import config_to_dict, flatten
from bevperception.distributed import gather_objects, together
from bevperception.files import write_json
from bevperception.training.averaging import WeightAveraging, model_of
from bevperception.training.module import TrainingModule, evaluation_mode

Evaluate = Callable[[nn.Module, torch.device, Path], dict[str, Any]]
"""(model, device, folder for results) to nested metrics, called in every process; all get the same."""

SKIPPED_NAME = "skipped.json"
EVALUATION_FOLDER = "evaluation"


class Evaluation(Callback):
    """Evaluates every so many steps and at the end, where it exports the weights, too.

    Args:
        evaluate: see :data:`Evaluate`.
        out: run folder; results go to ``evaluation/step-...``, weights beside it.
        every: optimiser steps between evaluations; 0 for the end alone.
        averaging: gives the weights that are evaluated and exported.
    """

    def __init__(self, evaluate: Evaluate, out: Path, every: int, averaging: WeightAveraging) -> None:
        self.evaluate, self.out, self.every, self.averaging = evaluate, out, every, averaging
        self.metrics: dict[str, Any] = {}
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the step that the run resumes from: it has been evaluated."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate after an optimiser step whose turn it is; the last step's comes at the end."""
        step = trainer.global_step
        if self.every and step % self.every == 0 and self._last_step < step < trainer.max_steps:
            self._last_step = step
            self._run(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the weights, evaluate them, and put the metrics on their card."""
        self._export(trainer, pl_module)
        self._run(trainer, pl_module)
        self._export(trainer, pl_module)

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        model = model_of(pl_module)
        folder = self.out / EVALUATION_FOLDER / f"step-{step:08d}"
        with self.averaging.applied(pl_module), evaluation_mode(model):
            self.metrics = self.evaluate(model, pl_module.device, folder)
        numbers = {f"val/{k}": v for k, v in flatten(self.metrics) if isinstance(v, (int, float))}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step)

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        with together(pl_module.device):
            if trainer.is_global_zero:
                self._save(trainer.global_step, pl_module)

    def _save(self, step: int, pl_module: TrainingModule) -> None:
        card = Card(
            config=config_to_dict(pl_module.config),
            step=step,
            averaged=bool(self.averaging.weights.average),
            metrics=self.metrics,
            commit=code_commit(),
        )
        with self.averaging.applied(pl_module):
            save_weights(self.out, model_of(pl_module).state_dict(), card)


class SkippedReport(Callback):
    """Reports the skipped samples at the end, and writes ``skipped.json``.

    Args:
        out: run folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect from all processes, write ``skipped.json`` and print a line."""
        assert isinstance(pl_module, TrainingModule)
        skipped: dict[str, str] = {}
        for part in gather_objects(pl_module.skipped):
            skipped |= part
        with together(pl_module.device):
            if skipped and trainer.is_global_zero:
                path = self.out / SKIPPED_NAME
                write_json(path, skipped, indent=2)
                print(f"{len(skipped)} unreadable samples were skipped; see {path}")


class StepBar(TQDMProgressBar):
    """Progress bar over the micro-batches of the whole run, which is one epoch to Lightning."""

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Show the bar, at the batch that a resumed run goes on from."""
        super().on_train_start(trainer)
        bar = self.train_progress_bar
        bar.total = trainer.num_training_batches
        bar.initial = bar.n = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        bar.set_description("training")

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Do nothing, since Lightning would reset the bar."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The loss, without the logger's version number."""
        metrics = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        return metrics


class StepLines(Callback):
    """Progress as lines, for output that is no terminal: the first step, then one line every so many.

    Args:
        every: optimiser steps between lines.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._first, self._step, self._time_s = 1, 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._step, self._time_s = trainer.global_step, time.monotonic()
        self._first = self._step + 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print step, loss, rate and speed."""
        step = trainer.global_step
        due = step % self.every == 0 or step in (self._first, trainer.max_steps)
        if step == self._step or not due or not trainer.is_global_zero:
            return
        now = time.monotonic()
        speed = (now - self._time_s) / (step - self._step)
        shown = {name: float(trainer.callback_metrics[name]) for name in ("loss", "train/learning_rate")}
        print(
            f"step {step}/{trainer.max_steps}  loss {shown['loss']:.4f}  "
            f"rate {shown['train/learning_rate']:.2e}  {speed:.2f} s/step",
            flush=True,
        )
        self._step, self._time_s = step, now


def progress(every: int) -> Callback:
    """Choose the progress bar on a terminal, and lines elsewhere."""
    return StepBar() if sys.stdout.isatty() else StepLines(every)
