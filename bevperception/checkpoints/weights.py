"""Weights to and from disk: safetensors with a card, training checkpoints, and strict loading.

No code runs on load: safetensors, or ``torch.load(weights_only=True)`` for training checkpoints.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bevperception.checkpoints.card import Card as Card
from bevperception.checkpoints.card import card_from_json, card_from_values
from bevperception.checkpoints.official_file import read_official
from bevperception.checkpoints.official_models import recognise
from bevperception.checkpoints.origin import KEPT_PREFIX
from bevperception.checkpoints.tensors import converted, named_tensors, parts_of, some
from bevperception.checkpoints.torch_files import read_torch_file
from bevperception.config import ExperimentConfig
from bevperception.config_io import ConfigSource, config_from_dict, config_to_dict, flatten
from bevperception.errors import CheckpointError, ConfigError
from bevperception.files import write_text, writing
from bevperception.models.build import Model, build_model

WEIGHTS_NAME = "weights.safetensors"
CARD_NAME = "card.json"
FORMAT = "bevperception-1"

SHIPPED_FOLDER = Path(__file__).resolve().parents[1] / "weights"
"""Weights that come with the package: a folder each."""

CONFIG_KEY = "bevperception_config"
"""Key of a training checkpoint for the run's configuration, as plain containers."""
AVERAGE_KEY = "bevperception_average"
"""Key for the averaged weights by name; empty without averaging."""
MODEL_PREFIX = "model."
"""Prefix of the model's parameters in a training checkpoint's ``state_dict``."""

_BACKBONE_ALONE = (
    "\nit holds a backbone alone: name it in model.backbone.weights, "
    "or training.initial_parts=[backbone] beside training.initial_weights"
)

MEANINGS = ("detection.classes", "detection.yaw_convention", "perspective.classes", "segmentation.classes")
"""Settings that say what a part's outputs mean; its weights would fit under others."""


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
    return weights_of(read_checkpoint(path), path)


def weights_of(checkpoint: Mapping[str, Any], path: Path) -> Weights:
    """The model's weights in a training checkpoint, averaged where it has an average.

    Args:
        checkpoint: of :func:`read_checkpoint`.
        path: it was read from.

    Raises:
        CheckpointError: it holds something else than a model's weights there.
    """
    state = named_tensors(checkpoint["state_dict"], f"state_dict of {path}")
    other = [name for name in state if not name.startswith(MODEL_PREFIX)]
    if other:
        raise CheckpointError(
            f"{path} holds {len(other)} tensors that are none of the model's: {some(other)}"
        )
    state = {name.removeprefix(MODEL_PREFIX): value for name, value in state.items()}
    average = named_tensors(checkpoint.get(AVERAGE_KEY, {}), f"{AVERAGE_KEY} of {path}")
    values = {"config": checkpoint[CONFIG_KEY], "step": checkpoint["global_step"], "averaged": bool(average)}
    return Weights({**state, **average}, card_from_values(values, str(path)), path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The plain containers and tensors of a training checkpoint, on the CPU.

    What has to be there is of the right type; whether tensors fit a model is for :func:`check_fit` to say.

    Raises:
        CheckpointError: it is missing, damaged or not one of this project's.
    """
    checkpoint: Any = read_torch_file(Path(path))
    wanted = ("state_dict", "global_step", CONFIG_KEY)
    lacking = [key for key in wanted if not isinstance(checkpoint, dict) or key not in checkpoint]
    if lacking:
        raise CheckpointError(
            f"{path} is not a training checkpoint of this project: it has no {', '.join(lacking)}\n"
            f"{_advice(Path(path))}"
        )
    plain: dict[str, Any] = checkpoint
    if isinstance(plain["global_step"], np.integer):
        plain["global_step"] = int(plain["global_step"])
    named_tensors(plain["state_dict"], f"state_dict of {path}")
    card_from_values({"config": plain[CONFIG_KEY], "step": plain["global_step"]}, str(path))
    return plain


def load_into(
    model: nn.Module, weights: Weights, config: ExperimentConfig | None = None, parts: Sequence[str] = ()
) -> dict[str, int]:
    """Fill a model with weights; every name, shape and kind of number has to fit.

    Args:
        model: changed in place.
        weights: as read.
        config: what the model was built from.
        parts: fill these parts of the model alone ("backbone", "neck", ...); none named fills all.

    Returns:
        How many tensors of which other parts of the file were left aside.

    Raises:
        CheckpointError: as :func:`check_fit`, or a weight is NaN, infinite or no real number.
    """
    expected = model.state_dict()
    state = check_fit(expected, weights, config, parts)
    model.load_state_dict(converted(state, expected, str(weights.path)), strict=not parts)
    return parts_of(name for name in weights.state if name not in state)


def check_fit(
    expected: Mapping[str, Tensor],
    weights: Weights,
    config: ExperimentConfig | None = None,
    parts: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Refuse weights of another architecture, or whose outputs mean something else.

    Args:
        expected: ``state_dict`` of the model; only names and shapes count.
        weights: as read.
        config: what the model was built from: its :data:`MEANINGS` have to be those of the weights, and
            differences may explain a misfit. None looks at names and shapes alone.
        parts: of the model; see :func:`load_into`.

    Returns:
        The weights of these parts.

    Raises:
        CheckpointError: names, shapes or meanings differ, or a part is not there.
    """
    found = weights.state
    if parts:
        expected = _of_parts(expected, parts, "the model")
        found = _of_parts(found, parts, str(weights.path))
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    reshaped = [
        f"{name} {list(found[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if missing or unexpected or reshaped:
        kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        differences = "; ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in kinds if names)
        cause = _BACKBONE_ALONE if _is_backbone_alone(found, expected) else ""
        cause = cause or _likely_cause(weights.card.config, config)
        raise CheckpointError(f"{weights.path} is of another architecture: {differences}{cause}")
    if config is not None:
        _check_meanings(parts_of(found), weights, config)
    return dict(found)


def _is_backbone_alone(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return set(parts_of(found)) <= {"backbone", "neck"} < set(parts_of(expected))


def _check_meanings(parts: Mapping[str, int], weights: Weights, config: ExperimentConfig) -> None:
    """Refuse weights whose classes are in another order than the model's, say."""
    defaults, ours = (dict(flatten(config_to_dict(c.model))) for c in (ExperimentConfig(), config))
    theirs = dict(flatten(_model_section(weights.card.config)))
    for key in MEANINGS:
        # Cards from before a setting was there are of its default.
        there = _plain(theirs.get(key, defaults[key]))
        if key.split(".")[0] in parts and there != ours[key]:
            raise CheckpointError(
                f"{weights.path}: model.{key} is {there} in the weights, but {ours[key]} is asked for\n"
                "what they predict would be taken for something else; leave the setting as it is there"
            )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _model_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section = config.get("model")
    return section if isinstance(section, Mapping) else {}


def _of_parts(state: Mapping[str, Tensor], parts: Sequence[str], owner: str) -> dict[str, Tensor]:
    """The tensors of some parts; a part is what a name begins with, up to the first dot."""
    there = parts_of(state)
    for part in parts:
        if part not in there:
            raise CheckpointError(f"{owner} has no part {part!r}; it has {', '.join(sorted(there))}")
    return {name: value for name, value in state.items() if name.split(".", 1)[0] in parts}


def load_model(weights: Weights, config: ExperimentConfig) -> Model:
    """Build the model of a configuration and fill it.

    Raises:
        CheckpointError: the weights are of another architecture.
    """
    # A first time without memory: sizes in a damaged card must not ask for more than the file holds.
    with torch.device("meta"):
        expected = build_model(config.model).state_dict()
    # Version 0.1 kept the parts of the BEV beside a perspective head alone.
    parts = tuple(parts_of(expected)) if config.model.perspective.only else ()
    check_fit(expected, weights, config, parts)
    model = build_model(config.model)
    load_into(model, weights, config, parts)
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
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # else a virtual environment inside another project gave that one's
        return None
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=root,
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
            names = [name for name in file.keys() if not name.startswith(KEPT_PREFIX)]  # noqa: SIM118
            state = {name: file.get_tensor(name) for name in names}
    except PermissionError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # a damaged file, or one of strange dtypes, leads to errors of several types
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {str(error)[:160]}") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was not written by this project: its metadata has no format {FORMAT!r}\n{_advice(path)}"
        )
    if "card" not in metadata:
        raise CheckpointError(
            f"{path} has no card in its metadata, so the model that it belongs to is unknown"
        )
    return Weights(state, card_from_json(metadata["card"], str(path)), path)


def _advice(path: Path) -> str:
    """What to do with a file that is not this project's."""
    try:
        title = recognise(read_official(path).state, str(path)).title
    except CheckpointError:
        return "it is no published checkpoint that can be converted either: see bevperception convert --help"
    return (
        f"it is the published {title}: convert it once, and use what comes out\n"
        f"  bevperception convert {shlex.quote(str(path))} {shlex.quote(path.stem)}"
    )


def _likely_cause(there: Mapping[str, Any], here: ExperimentConfig | None) -> str:
    if here is None:
        return ""
    ours, theirs = config_to_dict(here.model), _model_section(there)
    first, second = dict(flatten(ours)), dict(flatten(theirs))
    keys = [key for key in differing_keys(ours, theirs) if key in first and key in second]
    if not keys:
        return "\nlikely cause: the code of the model has changed since they were written"
    shown = [f"model.{k} is {first[k]} here, {str(second[k])[:80]} there" for k in keys[:3]]
    return f"\nlikely cause: {'; '.join(shown)}"
