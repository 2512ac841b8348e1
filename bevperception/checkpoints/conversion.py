"""Published checkpoints to this project's weights, and back without the change of a bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bevperception.checkpoints.card import Card
from bevperception.checkpoints.official_file import Copy, OfficialFile, read_official
from bevperception.checkpoints.official_models import OfficialModel, official_table, recognise
from bevperception.checkpoints.origin import KEPT_PREFIX, ORIGIN_KEY, Origin, read_origin
from bevperception.checkpoints.tensors import check_values, parts_of, some
from bevperception.checkpoints.weights import CARD_NAME, FORMAT, WEIGHTS_NAME, read_weights
from bevperception.config import ExperimentConfig
from bevperception.config_files import config_path
from bevperception.config_io import config_to_dict, load_config
from bevperception.errors import CheckpointError
from bevperception.files import write_text, writing
from bevperception.models.backbones import build_backbone
from bevperception.models.build import build_model

_LAYER_SCALES = (".scale1", ".scale2")
"""Parameters that published detectors have at 1 and the classifiers of the same size do not have."""


@dataclass(frozen=True)
class Match:
    """A published model's tensors in their places.

    Attributes:
        model: the published model.
        config: that builds it here.
        own: tensors by their names here.
        kept: tensors by published name that are no weights here.
        added: weights that the file does not have and that have one right value.
        expected: all weights of the model, without values.
        notes: what else its user should know.
    """

    model: OfficialModel
    config: ExperimentConfig
    own: dict[str, Tensor]
    kept: dict[str, Tensor]
    added: dict[str, Tensor]
    expected: dict[str, Tensor]
    notes: list[str]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        match: the model and its tensors.
        file: the published file.
        path: of the new weights.
    """

    match: Match
    file: OfficialFile
    path: Path


def convert_official(
    official: str | Path, out: str | Path, copy: Copy = "auto", configs: Sequence[str] = ()
) -> Conversion:
    """Write a published checkpoint as weights of this project.

    Every tensor is passed on as it is. Those that are no weights here (weights of the loss, a classifier) are
    kept under names of their own for the way back. Memory: the file is mapped, not read.

    Args:
        official: the published file.
        out: a new file (``.safetensors``) or a folder.
        copy: see :func:`~bevperception.checkpoints.official_file.read_official`.
        configs: configuration files of a variation of a published model; none takes the published ones.

    Raises:
        CheckpointError: the file cannot be read, is of no known model, or does not fit its configuration.
        ConfigError: a configuration is wrong.
    """
    file = read_official(official, copy)
    found = match_official(file, configs)
    # A backbone's neck is of any shape, so nothing is expected of it but real numbers.
    check_values(found.own, found.own | found.expected, str(file.path))
    origin = Origin(
        prefix=file.prefix,
        # What goes back is the model: a reader of published files does not look for it under the average.
        wrapper="model" if file.averaged and file.wrapper else file.wrapper,
        parts=found.model.prefixes,
        added=tuple(sorted(found.added)),
    )
    source = f"{file.path.name}: {found.model.title}"
    card = Card(config_to_dict(found.config), averaged=file.averaged, source=source)
    state = found.own | found.added | {KEPT_PREFIX + name: value for name, value in found.kept.items()}
    path = _write(Path(out), state, card, origin)
    return Conversion(found, file, path)


def match_official(file: OfficialFile, configs: Sequence[str] = ()) -> Match:
    """Find the model of published tensors and the place of each in it; values are not looked at.

    Args:
        file: as read.
        configs: see :func:`convert_official`.

    Raises:
        CheckpointError: the tensors are of no known model, or do not fit its configuration.
        ConfigError: a configuration is wrong.
    """
    model = recognise(file.state, str(file.path))
    config, notes = _config(model, file, configs)
    table = official_table(config.model.backbone.variant, model.prefixes)
    names = {name: table.to_own(name) for name in file.state}
    own = {new: file.state[name] for name, new in names.items() if new is not None}
    kept = {name: file.state[name] for name, new in names.items() if new is None}
    expected = _expected(config, whole=model.prefixes is None)
    added = _missing_layer_scales(own, expected)
    _check(own | added, expected, model, file)
    return Match(model, config, own, kept, added, expected, notes)


def convert_back(weights: str | Path, out: str | Path) -> int:
    """Write weights of this project under published names: what was converted comes back as it was.

    Args:
        weights: ``weights.safetensors``, its folder, a training checkpoint or the name of shipped weights.
        out: a new file of ``torch.save``.

    Returns:
        How many tensors were written.

    Raises:
        CheckpointError: they cannot be read, or have parts that no published model has.
    """
    read = read_weights(weights)
    origin, kept = read_origin(read.path)
    variant = read.config().model.backbone.variant
    table = official_table(variant, origin.parts)
    names = {name: table.to_official(name) for name in read.state if name not in origin.added}
    foreign = [name for name, new in names.items() if new is None]
    if foreign:
        raise CheckpointError(
            f"{read.path} has {len(foreign)} of {len(names)} tensors that no published model has: "
            f"{some(foreign)}\nonly the parts of the published BEVFormer can be written so"
        )
    state = {str(new): read.state[name] for name, new in names.items()} | kept
    state = {origin.prefix + name: value for name, value in state.items()}
    with writing(out) as partial:
        torch.save(state if origin.wrapper is None else {origin.wrapper: state}, partial)
    return len(state)


def _config(
    model: OfficialModel, file: OfficialFile, configs: Sequence[str]
) -> tuple[ExperimentConfig, list[str]]:
    """The configuration of a published model with the file's own order of classes, and what to say of it."""
    settings: dict[str, object] = dict(model.settings)
    notes = []
    files = [config_path(name) for name in (configs or model.configs)]
    config = load_config(files, settings)
    order = config.model.detection.classes
    if model.prefixes is None and file.classes is not None and tuple(file.classes) != tuple(order):
        if sorted(file.classes) != sorted(order):
            raise CheckpointError(
                f"{file.path} was trained for other classes: {', '.join(file.classes[:12])}\n"
                f"this project detects {', '.join(sorted(order))}"
            )
        notes.append("the file's order of classes differs from the published one; the file's is taken")
        settings["model.detection.classes"] = list(file.classes)
        if config.model.perspective.enabled:
            settings["model.perspective.classes"] = list(file.classes)
        config = load_config(files, settings)
    return config, notes


def _expected(config: ExperimentConfig, whole: bool) -> dict[str, Tensor]:
    """Names, shapes and kinds of the weights, without memory for their values."""
    with torch.device("meta"):
        if whole:
            return build_model(config.model).state_dict()
        return {f"backbone.{n}": v for n, v in build_backbone(config.model.backbone).state_dict().items()}


def _missing_layer_scales(own: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer scales of 1 for a classifier's backbone without any: published detectors start so from it."""
    scales = [name for name in expected if name.endswith(_LAYER_SCALES)]
    if any(name in own for name in scales):
        return {}
    return {name: torch.ones(expected[name].shape) for name in scales}


def _check(
    own: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: OfficialModel, file: OfficialFile
) -> None:
    """Refuse tensors that are not exactly a model's, with a report by part."""
    whole = model.prefixes is None
    missing = [name for name in expected if name not in own]
    surplus = [name for name in own if name not in expected and (whole or name.startswith("backbone."))]
    reshaped = [
        f"{name} {list(own[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in own and own[name].shape != value.shape
    ]
    kinds = (("missing", missing), ("too many", surplus), ("of another shape", reshaped))
    report = [
        f"{len(names)} {kind}: {', '.join(f'{p} {n}' for p, n in parts_of(names).items())} ({some(names)})"
        for kind, names in kinds
        if names
    ]
    if report:
        raise CheckpointError(
            f"{file.path} looks like {model.title}, but does not fit it: {'; '.join(report)}\n"
            "the file may be cut short, or of a variation of that model: "
            "then name its configuration with --config"
        )


def _write(out: Path, state: Mapping[str, Tensor], card: Card, origin: Origin) -> Path:
    """Write weights with card and origin; the tensors go from the mapped file to the disk without a copy."""
    alone = out.suffix == ".safetensors"
    path = out if alone else out / WEIGHTS_NAME
    text = json.dumps(asdict(card), indent=2, sort_keys=True)
    metadata = {"format": FORMAT, "card": text, ORIGIN_KEY: origin.to_json()}
    with writing(path) as partial:
        save_file(_apart(state), partial, metadata=metadata)
    if not alone:
        write_text(out / CARD_NAME, text + "\n")
    return path


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: contiguous, and no two of the same memory."""
    taken: set[int] = set()
    apart = {}
    for name, value in state.items():
        value = value.contiguous()
        if value.data_ptr() in taken:
            value = value.clone()
        taken.add(value.data_ptr())
        apart[name] = value
    return apart
