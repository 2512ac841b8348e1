"""Run a training from configuration to exported weights."""

from __future__ import annotations

import importlib.util
import logging
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn

from bevperception.checkpoints.tensors import left_aside
from bevperception.checkpoints.weights import CARD_NAME, WEIGHTS_NAME, load_into, read_weights
from bevperception.config import ExperimentConfig
from bevperception.config_io import dump_config
from bevperception.data.loading import SampleSource
from bevperception.distributed import is_first_process, leave_at_exit
from bevperception.errors import ConfigError
from bevperception.models.precision import resolve_precision
from bevperception.training.announce import start_line
from bevperception.training.averaging import WeightAveraging
from bevperception.training.callbacks import (
    EVALUATION_FOLDER,
    SKIPPED_NAME,
    Evaluate,
    Evaluation,
    SkippedReport,
    progress,
)
from bevperception.training.checkpointing import (
    CHECKPOINT_FOLDER,
    AtomicCheckpointIO,
    StepCheckpoint,
    check_resumable,
    find_resume,
)
from bevperception.training.loader import TrainingData
from bevperception.training.logs import RunLogger
from bevperception.training.module import TrainingModule

_NOISE = (
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    ".*lr_scheduler.step\\(\\).* before .*optimizer.step\\(\\)",  # a step that loss scaling skipped
)

CONFIG_NAME, LOGS_FOLDER = "config.yaml", "logs"
RUN_FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, SKIPPED_NAME)
RUN_FOLDERS = (CHECKPOINT_FOLDER, LOGS_FOLDER, EVALUATION_FOLDER)
"""Files that a run writes into its folder."""


def train(
    config: ExperimentConfig,
    model: nn.Module,
    source: SampleSource,
    evaluate: Evaluate,
    out: Path,
    resume: str | None = None,
) -> dict[str, Any]:
    """Train, checkpoint, evaluate and export.

    The run folder gets ``config.yaml``, ``checkpoints/``, ``logs/``, ``evaluation/``, and at the end
    ``weights.safetensors`` with ``card.json``.

    Args:
        config: of the run.
        model: with its first weights.
        source: training samples.
        evaluate: see :data:`~bevperception.training.callbacks.Evaluate`.
        out: run folder.
        resume: see :func:`~bevperception.training.checkpointing.find_resume`.

    Returns:
        Metrics of the last evaluation; empty if a resumed run had no steps left.

    Raises:
        BevError: the checkpoint does not fit, a sample cannot be read, or the loss is not finite.
    """
    quieten_lightning()
    freeze(model, config.training.frozen_parts)
    checkpoint = find_resume(resume, out)
    done = 0 if checkpoint is None else check_resumable(checkpoint, config, model)
    if is_first_process():
        dump_config(config, out / CONFIG_NAME)
        if checkpoint is not None:
            print(f"resuming {checkpoint} at step {done} of {config.training.steps}", flush=True)
    if config.training.initial_weights and checkpoint is None:
        weights = read_weights(config.training.initial_weights)
        aside = load_into(model, weights, config, config.training.initial_parts)
        if is_first_process():
            print(f"initial weights from {weights.path}; left aside in it: {left_aside(aside)}")
    averaging = WeightAveraging(config.training.ema_decay)
    evaluation = Evaluation(evaluate, out, config.training.validate_every, averaging)
    try:
        trainer = build_trainer(config, out, averaging, evaluation)
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"training.accelerator, devices or strategy: {' '.join(str(error).split())}"
        ) from None
    if is_first_process() and done < config.training.steps:
        where, precision = trainer.strategy.root_device.type, str(trainer.precision)
        print(start_line(config, model, len(source), where, precision), flush=True)
    leave_at_exit()
    module = TrainingModule(config, model)
    data = TrainingData(config, source)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        # What Lightning makes of an interrupt from the keyboard, after which it ignores further ones.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from None
    if done >= config.training.steps:
        print(f"nothing left to train; the weights are those of {checkpoint}")
    return evaluation.metrics


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Freeze parts of a model: no gradients, no drop paths, no updates of batch statistics.

    Args:
        model: changed in place.
        parts: names of its children.

    Raises:
        ConfigError: the model has no such part, or nothing would be left to learn.
    """
    children = {name: child for name, child in model.named_children() if list(child.parameters())}
    for part in parts:
        if part not in children:
            raise ConfigError(
                f"training.frozen_parts: the model has no part {part!r}; it has {', '.join(sorted(children))}"
            )
        children[part].eval().requires_grad_(False)
    if parts and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"training.frozen_parts ({', '.join(parts)}) leave nothing to train")


def build_trainer(
    config: ExperimentConfig, out: Path, averaging: WeightAveraging, evaluation: Evaluation
) -> pl.Trainer:
    """Lightning's trainer for a run counted in steps: the whole run is one of its epochs."""
    training = config.training
    checkpoints = StepCheckpoint(
        out / CHECKPOINT_FOLDER, training.checkpoint_every, training.keep_checkpoints, training.steps
    )
    device = likely_device(training.accelerator)
    if training.precision == "16-mixed" and device.type == "cpu":
        # Lightning would take bfloat16 instead.
        raise ConfigError("training.precision 16-mixed needs a GPU; a CPU trains in bf16-mixed or 32-true")
    shown = progress(training.log_every)
    return pl.Trainer(
        accelerator=training.accelerator,
        devices=training.devices,
        num_nodes=training.nodes,
        strategy=build_strategy(config),
        precision=resolve_precision(training.precision, device),
        max_steps=training.steps,
        max_epochs=-1,
        accumulate_grad_batches=training.accumulate,
        log_every_n_steps=training.log_every,
        logger=build_loggers(config, out),
        callbacks=[averaging, evaluation, SkippedReport(out), shown, checkpoints],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=out,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_progress_bar=isinstance(shown, ProgressBar),
        enable_model_summary=False,
    )


def likely_device(accelerator: str) -> torch.device:
    """Predict the device that Lightning will train on."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def build_strategy(config: ExperimentConfig) -> str | Strategy:
    """Choose Lightning's strategy; 'auto' is one process, or DistributedDataParallel over several."""
    training = config.training
    if training.strategy == "auto" and training.devices * training.nodes > 1:
        # Every parameter gets a gradient: see TrainingModule.training_step.
        return DDPStrategy(find_unused_parameters=False)
    return training.strategy


def build_loggers(config: ExperimentConfig, out: Path) -> list[Logger]:
    """Build the loggers of a run: CSV always, TensorBoard by setting and if it is installed.

    A resumed run gets a version of its own.
    """
    csv = RunLogger(out, name=LOGS_FOLDER, flush_logs_every_n_steps=config.training.log_every)
    loggers: list[Logger] = [csv]
    if config.training.tensorboard and importlib.util.find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(out, name=LOGS_FOLDER, version=csv.version))
    return loggers


def quieten_lightning() -> None:
    """Drop the hints of Lightning, which are for programmers and name settings that this project has not.

    Its errors stay errors. What a user has to know, this project says itself.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"lightning\.")
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
