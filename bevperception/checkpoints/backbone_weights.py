"""Starting an image backbone from published weights: ImageNet classifiers, COCO detectors, BEVFormers."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bevperception.checkpoints.published import internimage_key
from bevperception.errors import CheckpointError
from bevperception.models.backbones.internimage import InternImage

_CONTAINERS = ("state_dict", "model")
_PREFIXES = ("module.", "img_backbone.", "backbone.")
_HEADS = ("fc.", "head.", "conv_head.", "dcnv3_head_x", "clip_projector.", "fc_norm.")
_SHOWN = 3


def load_backbone_weights(backbone: nn.Module, path: str | Path) -> None:
    """Fill a backbone with published weights, or with those of this project.

    Parts of the file that are no backbone (a classifier, necks and heads of a detector) and stages
    after the last one that the backbone has are left out; of the rest every name and shape has to fit.

    Args:
        backbone: of ``models.backbones.build_backbone``; changed in place.
        path: .safetensors, or .pth / .pt / .ckpt, which is read without running code.

    Raises:
        CheckpointError: the file is missing or damaged, or holds another architecture.
    """
    state = _backbone_part(_read(Path(path)))
    if isinstance(backbone, InternImage) and any(key.startswith("levels.") for key in state):
        state = {internimage_key(key, backbone.spec.post_norm): value for key, value in state.items()}
    expected = backbone.state_dict()
    later = _later_stages(expected, state)
    state = {key: value for key, value in state.items() if not key.startswith(later)}
    _check(expected, state, path)
    backbone.load_state_dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"no backbone weights at {path}; check backbone.weights")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise CheckpointError(f"{path} is damaged or holds more than tensors: {reason}") from None
    for name in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), Mapping):
            content = content[name]
    tensors = (
        {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    )
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors by name: it is no file of weights")
    return tensors


def _backbone_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's tensors without prefixes; heads of a classifier left out."""
    for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    return {key: value for key, value in state.items() if not key.startswith(_HEADS)}


def _later_stages(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Prefixes of whole stages that the file has and the backbone, asked for fewer, has not."""

    def stage_of(key: str) -> str:
        parts = key.split(".")
        return ".".join(parts[:2]) + "." if parts[0] in ("stages", "downsamples") else parts[0] + "."

    stages = {stage_of(key) for key in state if key.startswith(("stages.", "downsamples.", "layer"))}
    return tuple(stages - {stage_of(key) for key in expected})


def _check(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str | Path) -> None:
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    reshaped = [
        f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    found = [
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for kind, names in kinds
        if names
    ]
    if found:
        raise CheckpointError(
            f"{path} does not fit the backbone: {'; '.join(found)}\n"
            "likely cause: backbone.variant names another size or style than the weights are of"
        )
    if damaged := [key for key, value in state.items() if not bool(value.isfinite().all())]:
        raise CheckpointError(f"{path} holds NaN or infinite weights in {', '.join(damaged[:_SHOWN])}")
