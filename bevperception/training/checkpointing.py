"""Write training checkpoints, never half of one, and check which run may resume from which."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from bevperception.checkpoints.tensors import converted, some
from bevperception.checkpoints.weights import (
    CONFIG_KEY,
    MODEL_PREFIX,
    check_fit,
    differing_keys,
    read_checkpoint,
    weights_of,
)
from bevperception.config import ExperimentConfig
from bevperception.config_io import config_from_dict, config_to_dict, flatten
from bevperception.config_migration import migrate_config
from bevperception.distributed import together
from bevperception.errors import CheckpointError, ConfigError, OutputError
from bevperception.files import writing
from bevperception.training.optimizer import build_optimizer

CHECKPOINT_FOLDER = "checkpoints"
AUTO = "auto"

MAY_DIFFER = frozenset(
    {
        "data.root",
        "data.workers",
        "data.val_split",
        "training.steps",
        "training.devices",
        "training.nodes",
        "training.batch_size",
        "training.strategy",
        "training.accelerator",
        "training.initial_weights",
        "training.checkpoint_every",
        "training.keep_checkpoints",
        "training.validate_every",
        "training.log_every",
        "training.tensorboard",
        "model.backbone.weights",
        "model.backbone.checkpointing",
    }
)
"""Settings that a resumed run may change; batch size, devices and nodes only with an equal product, and steps
to no fewer than have been taken."""

_STATE_OF_TRAINING = {"optimizer_states": list, "lr_schedulers": list, "loops": dict, "callbacks": dict}
"""What Lightning needs of a checkpoint beside the weights, and as what."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, see :func:`bevperception.files.writing`.

    Lightning's own writes to the system's temporary folder, from where a move to another disk may be
    interrupted halfway.

    Attributes:
        error: that kept a checkpoint from being written. It is not raised here, as Lightning lets the other
            processes wait for this one: see :class:`StepCheckpoint`.
    """

    error: OutputError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint atomically."""
        try:
            with writing(path) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
        except OutputError as error:
            self.error = error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU without running any code in it."""
        return read_checkpoint(Path(path))


class StepCheckpoint(Checkpoint):
    """A checkpoint every so many optimiser steps and at the last one.

    Args:
        folder: of the checkpoints.
        every: optimiser steps between them.
        keep: so many newest stay; 0 keeps all.
        last_step: the run's last step.
    """

    def __init__(self, folder: Path, every: int, keep: int, last_step: int) -> None:
        self.folder, self.every, self.keep, self.last_step = folder, every, keep, last_step
        self._saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the step that the run resumes from: it has its checkpoint."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after an optimiser step whose turn it is."""
        step = trainer.global_step
        if step != self._saved_step and (step % self.every == 0 or step == self.last_step):
            trainer.save_checkpoint(checkpoint_path(self.folder, step))
            self._raise_error(trainer, pl_module)
            self._saved_step = step
            if trainer.is_global_zero:
                self._remove_old()

    @staticmethod
    def _raise_error(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise in every process what kept the first from writing; the older checkpoints all stay."""
        writer = trainer.strategy.checkpoint_io
        assert isinstance(writer, AtomicCheckpointIO)
        with together(pl_module.device):
            if writer.error is not None:
                raise writer.error

    def _remove_old(self) -> None:
        if self.keep:
            for path in list_checkpoints(self.folder)[: -self.keep]:
                path.unlink(missing_ok=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return folder / f"step-{step:08d}.ckpt"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder by step, oldest first."""
    return sorted(p for p in folder.glob("step-*.ckpt") if re.fullmatch(r"step-\d+\.ckpt", p.name))


def find_resume(resume: str | None, out: Path) -> Path | None:
    """Find the checkpoint that ``--resume`` names.

    Args:
        resume: None to start afresh, 'auto' for the run folder's newest checkpoint (afresh if it has
            none), or a checkpoint's path.
        out: run folder.

    Raises:
        CheckpointError: a path that is no file; or checkpoints in the run folder that the run would
            mix with its own.
    """
    present = list_checkpoints(out / CHECKPOINT_FOLDER)
    if resume is None:
        if present:
            raise CheckpointError(
                f"{out} holds checkpoints of an earlier run ({present[-1].name})\n"
                "go on with --resume auto, or choose another --out"
            )
        return None
    if resume == AUTO:
        return present[-1] if present else None
    path = Path(resume)
    if not path.is_file():
        raise CheckpointError(f"cannot resume: no checkpoint at {path}")
    if present and path.resolve() != present[-1].resolve():
        raise CheckpointError(
            f"{out} holds other checkpoints than the one to resume from (newest: {present[-1].name})\n"
            "go on with --resume auto, or choose another --out"
        )
    return path


def check_resumable(path: Path, config: ExperimentConfig, model: nn.Module) -> int:
    """Refuse to go on with a checkpoint under settings that would make another run of it.

    Args:
        path: training checkpoint.
        config: of the run that wants to go on.
        model: of the run, with the parts frozen that do not learn; left as it is.

    Returns:
        Optimiser steps that it has taken.

    Raises:
        CheckpointError: it is missing, damaged or not one of this project's, its weights or its optimiser's
            state are not the model's, or it holds no more than weights.
        ConfigError: the differing keys, or settings inside the checkpoint that this version does not know, or
            fewer steps than have been taken.
    """
    checkpoint = read_checkpoint(path)
    # Typed first: it may be damaged or of an older version, and settings that came later have their defaults.
    migrated, dropped = migrate_config(checkpoint[CONFIG_KEY], str(path))
    saved, here = config_to_dict(config_from_dict(migrated, str(path))), config_to_dict(config)
    differing = [f"{key} ({value} there, no setting now)" for key, value in dropped.items()]
    differing += [key for key in differing_keys(saved, here) if key not in MAY_DIFFER]
    if _global_batch(saved) != _global_batch(here):
        differing.append("training.batch_size x devices x nodes")
    if differing:
        old, new = dict(flatten(saved)), dict(flatten(here))
        shown = [f"{k} ({old[k]} there, {new[k]} now)" if k in old and k in new else k for k in differing]
        more = f", and {len(shown) - 4} more" if len(shown) > 4 else ""
        raise ConfigError(
            f"cannot resume {path} with other settings: {', '.join(shown[:4])}{more}\n"
            "set them back, or start a new run from it with --training.initial_weights"
        )
    done = int(checkpoint["global_step"])
    if config.training.steps < done:
        raise ConfigError(
            f"cannot resume {path} with training.steps {config.training.steps}: it has taken {done} already\n"
            f"set training.steps to {done} or more, or resume from an earlier checkpoint into another --out"
        )
    lacking = [key for key, kind in _STATE_OF_TRAINING.items() if not isinstance(checkpoint.get(key), kind)]
    if lacking:
        raise CheckpointError(
            f"cannot resume {path}: it has no {', '.join(lacking)}, so it does not say how training went on\n"
            "start a new run from its weights with --training.initial_weights"
        )
    expected, weights = model.state_dict(), weights_of(checkpoint, path)
    for state in (checkpoint["state_dict"], weights.state):  # as trained, and averaged
        model_state = {name.removeprefix(MODEL_PREFIX): value for name, value in state.items()}
        fitting = check_fit(expected, replace(weights, state=model_state), config)
        converted(fitting, expected, str(path))
    problem = _optimizer_problem(checkpoint["optimizer_states"], model, config, path)
    if problem:
        raise CheckpointError(
            f"cannot resume {path}: the state of its optimiser does not belong to this model: {problem}\n"
            "start a new run from its weights with --training.initial_weights"
        )
    return done


def _optimizer_problem(
    states: Sequence[Any], model: nn.Module, config: ExperimentConfig, path: Path
) -> str | None:
    """The reason why saved AdamW states do not belong to a run's parameters; None if they do.

    PyTorch compares numbers of parameters only: with moments of another shape the next step would fail, and
    without them AdamW would start anew.

    Raises:
        CheckpointError: moments are NaN, infinite or no real numbers.
    """
    optimizer, _ = build_optimizer(model, config.training)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    try:
        (saved,) = states
        saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
        moments = {
            f"{moment} of parameter {index}": (state[moment], parameters[index])
            for index, state in saved["state"].items()
            for moment in ("exp_avg", "exp_avg_sq")
        }
        steps = [float(state["step"]) for state in saved["state"].values()]
        reshaped = [name for name, (value, parameter) in moments.items() if value.shape != parameter.shape]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        return f"it is not one of AdamW ({type(error).__name__}: {error})"
    if saved_sizes != sizes:
        return f"it has groups of {saved_sizes} parameters instead of {sizes}"
    none_yet = not steps and config.training.precision == "16-mixed"  # loss scaling skips its first steps
    if len(steps) != len(parameters) and not none_yet:
        return f"it has moments of {len(steps)} parameters instead of {len(parameters)}"
    if not all(step >= 1 for step in steps):
        return "a number of steps is less than 1"
    if reshaped:
        return f"other shapes in {some(reshaped)}"
    tensors = {name: value for name, (value, _) in moments.items()}
    converted(tensors, {name: parameter for name, (_, parameter) in moments.items()}, str(path))
    return None


def _global_batch(config: Mapping[str, Any]) -> int:
    training = config["training"]
    return int(training["batch_size"] * training["devices"] * training["nodes"])
