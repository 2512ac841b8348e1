"""Weights to and from disk: safetensors with a card, training checkpoints, and strict loading.

No code runs on load: safetensors, or ``torch.load(weights_only=True)`` for training checkpoints.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bevperception.config import ExperimentConfig
from bevperception.config_io import ConfigSource, config_from_dict, config_to_dict, flatten
from bevperception.errors import CheckpointError, ConfigError
from bevperception.files import write_text, writing
from bevperception.models.bevformer import BEVFormer

WEIGHTS_NAME = "weights.safetensors"
CARD_NAME = "card.json"
FORMAT = "bevperception-1"

SHIPPED_FOLDER = Path(__file__).resolve().parents[1] / "weights"
"""Weights that come with the package: a folder each."""

CONFIG_KEY = "bevperception_config"
"""Where a training checkpoint holds the run's configuration, as plain containers."""
AVERAGE_KEY = "bevperception_average"
"""Where it holds the averaged weights by name; empty without averaging."""
MODEL_PREFIX = "model."
"""What the model's parameters are called under in a training checkpoint's ``state_dict``."""

_SHOWN = 3


@dataclass(frozen=True)
class Card:
    """What weights are: enough to build their model and to know where they come from.

    Args:
        config: of the run, as :func:`~bevperception.config_io.config_to_dict` gives it.
        step: optimiser steps taken; None for converted weights.
        averaged: whether these are the moving average.
        metrics: of the evaluation of these weights, if there was one.
        commit: of the code that wrote them, if known.
        source: file they were converted from, if any.
    """

    config: dict[str, Any]
    step: int | None = None
    averaged: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Weights:
    """Weights as read.

    Args:
        state: tensors by parameter name, on the CPU.
        card: what they are.
        path: file they were read from.
    """

    state: dict[str, Tensor]
    card: Card
    path: Path

    def config(self) -> ExperimentConfig:
        """The configuration they were trained with.

        Raises:
            CheckpointError: it does not fit this version of the project.
        """
        try:
            return config_from_dict(self.card.config, str(self.path))
        except ConfigError as error:
            raise CheckpointError(f"the configuration inside the weights does not fit: {error}") from None


def save_weights(folder: Path, state: Mapping[str, Tensor], card: Card) -> Path:
    """Write ``weights.safetensors`` (the card inside) and ``card.json`` beside it, atomically.

    Args:
        folder: made if need be.
        state: a model's ``state_dict``.
        card: what the weights are.

    Returns:
        The weights' path.
    """
    text = json.dumps(asdict(card), indent=2, sort_keys=True)
    path = folder / WEIGHTS_NAME
    # clone: safetensors refuses tensors that share memory.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    with writing(path) as partial:
        save_file(tensors, partial, metadata={"format": FORMAT, "card": text})
    write_text(folder / CARD_NAME, text + "\n")
    return path


def shipped_weights() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(p.parent.name for p in SHIPPED_FOLDER.glob(f"*/{WEIGHTS_NAME}"))


def absolute_weights(path: str) -> str:
    """Weights as a process that runs in another folder finds them: the name of shipped ones stays a name."""
    shipped = path in shipped_weights() and not Path(path).exists()
    return path if shipped else str(Path(path).expanduser().resolve())


def read_weights(path: str | Path) -> Weights:
    """Read weights.

    Args:
        path: ``weights.safetensors`` of this project, its folder, a training checkpoint (``.ckpt``), whose
            averaged weights are taken if it has any, or the name of shipped weights.

    Raises:
        CheckpointError: there is no such file, or it is damaged or not one of this project's.
    """
    path = Path(path)
    if str(path) in shipped_weights() and not path.exists():
        path = SHIPPED_FOLDER / path
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if not path.is_file():
        names = ", ".join(shipped_weights()) or "none"
        raise CheckpointError(
            f"no weights at {path}; give a {WEIGHTS_NAME}, its folder or a .ckpt file, "
            f"or the name of shipped weights ({names})"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    checkpoint = read_checkpoint(path)
    prefix = len(MODEL_PREFIX)
    state = {k[prefix:]: v for k, v in checkpoint["state_dict"].items() if k.startswith(MODEL_PREFIX)}
    average = checkpoint.get(AVERAGE_KEY, {})
    card = Card(checkpoint[CONFIG_KEY], int(checkpoint["global_step"]), averaged=bool(average))
    return Weights({**state, **average}, card, path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The plain containers and tensors of a training checkpoint, on the CPU.

    Raises:
        CheckpointError: it is missing, damaged or not one of this project's.
    """
    checkpoint: Any = read_torch_file(Path(path))
    wanted = ("state_dict", "global_step", CONFIG_KEY)
    lacking = [key for key in wanted if not isinstance(checkpoint, dict) or key not in checkpoint]
    if lacking:
        raise CheckpointError(
            f"{path} is not a training checkpoint of this project: it has no {', '.join(lacking)}\n"
            "published weights have to be converted first"
        )
    plain: dict[str, Any] = checkpoint
    return plain


def read_torch_file(path: Path) -> object:
    """Plain containers and tensors of a file of ``torch.save``, on the CPU; no code of it runs.

    Raises:
        CheckpointError: it is missing, damaged or holds something else.
    """
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except pickle.UnpicklingError:  # whose text advises to let its code run
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint: no file of torch.save, or one that holds more than "
            "plain containers and tensors"
        ) from None
    except Exception as error:  # a damaged file leads the unpickler to errors of any type
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason}") from None
    return content


def load_into(
    model: nn.Module, weights: Weights, config: ExperimentConfig | None = None, parts: Sequence[str] = ()
) -> None:
    """Fill a model with weights; every name and shape has to fit.

    Args:
        model: changed in place.
        weights: as read.
        config: what the model was built from, for the message's likely cause.
        parts: fill these parts of the model alone ("backbone", "neck", ...); none named fills all.

    Raises:
        CheckpointError: names or shapes differ, a part is not there, or a weight is NaN or infinite.
    """
    expected = model.state_dict()
    if parts:
        expected = _of_parts(expected, parts, "the model")
        weights = replace(weights, state=_of_parts(weights.state, parts, str(weights.path)))
    missing = [name for name in expected if name not in weights.state]
    unexpected = [name for name in weights.state if name not in expected]
    reshaped = [
        f"{name} {list(weights.state[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in weights.state and weights.state[name].shape != value.shape
    ]
    if missing or unexpected or reshaped:
        kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        found = "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds if names)
        cause = _likely_cause(weights.card.config, config)
        raise CheckpointError(f"{weights.path} is of another architecture: {found}{cause}")
    damaged = [n for n, value in weights.state.items() if not bool(value.isfinite().all())]
    if damaged:
        raise CheckpointError(f"{weights.path} holds NaN or infinite weights in {_some(damaged)}")
    model.load_state_dict(weights.state, strict=not parts)


def _of_parts(state: Mapping[str, Tensor], parts: Sequence[str], owner: str) -> dict[str, Tensor]:
    """The tensors of some parts; a part is what a name begins with, up to the first dot."""
    by_part: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        by_part.setdefault(name.split(".", 1)[0], {})[name] = value
    for part in parts:
        if part not in by_part:
            raise CheckpointError(f"{owner} has no part {part!r}; it has {', '.join(sorted(by_part))}")
    return {name: value for part in parts for name, value in by_part[part].items()}


def load_model(weights: Weights, config: ExperimentConfig) -> BEVFormer:
    """Build the model of a configuration and fill it.

    Raises:
        CheckpointError: the weights are of another architecture.
    """
    model = BEVFormer(config.model)
    load_into(model, weights, config)
    return model


def config_inside(options: argparse.Namespace) -> ConfigSource:
    """The configuration inside the weights that a command line names, for programs without ``--config``.

    Args:
        options: ``weights`` is a path or None.

    Raises:
        ConfigError: None.
        CheckpointError: as :func:`read_weights`.
    """
    if options.weights is None:
        raise ConfigError(f"--weights PATH is needed: {WEIGHTS_NAME}, a run folder or a .ckpt file")
    weights = read_weights(options.weights)
    return ConfigSource(weights.card.config, name=str(weights.path))


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two plain configurations, or that only one has."""
    first, second = dict(flatten(one)), dict(flatten(other))
    absent = object()
    return [k for k in {**first, **second} if first.get(k, absent) != second.get(k, absent)]


def code_commit() -> str | None:
    """Commit of the checkout this code runs from; None for an installed package."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was not written by this project: its metadata has no format {FORMAT!r}\n"
            "published weights have to be converted first"
        )
    try:
        card = Card(**json.loads(metadata["card"]))
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"the card inside {path} cannot be read: {error}") from None
    return Weights(state, card, path)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _likely_cause(there: Mapping[str, Any], here: ExperimentConfig | None) -> str:
    if here is None:
        return ""
    ours, theirs = config_to_dict(here)["model"], there.get("model", {})
    keys = differing_keys(ours, theirs)
    if not keys:
        return "\nlikely cause: the code of the model has changed since they were written"
    first, second = dict(flatten(ours)), dict(flatten(theirs))
    shown = [f"model.{k} is {first.get(k)} here, {second.get(k)} there" for k in keys[:_SHOWN]]
    return f"\nlikely cause: {'; '.join(shown)}"
