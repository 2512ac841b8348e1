"""Published checkpoints as files: which of their tensors are the model's, and what stands around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from torch import Tensor

from bevperception.checkpoints.tensors import count_tensors, named_tensors
from bevperception.checkpoints.torch_files import read_torch_file
from bevperception.errors import CheckpointError

Copy = Literal["auto", "averaged", "training"]
"""Which of two copies of the weights to take; see :func:`read_official`."""

_WRAPPERS = ("state_dict", "model", "module")
"""Keys under which training programs keep a model's tensors."""
_AVERAGED_WRAPPERS = ("model_ema", "state_dict_ema", "ema_state_dict")
"""The same for a moving average of the weights."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers of a module put before every name: data parallelism, compilation, HuggingFace's classes."""
_TWIN = "ema_"
"""Beginning of the names of mmcv's EMA hook: ``ema_backbone_conv1_weight`` for ``backbone.conv1.weight``."""


@dataclass(frozen=True)
class OfficialFile:
    """The model's tensors in a published file.

    Attributes:
        state: tensors by name, without ``prefix``; from a file of ``torch.save`` they are memory-mapped.
        path: the file.
        wrapper: key that the tensors stand under; None where they are the file itself.
        prefix: stood before every name.
        averaged: whether these are a moving average of the weights.
        classes: order of classes that the file names; None where it names none.
        left_out: how many tensors of which other parts of the file were not taken.
    """

    state: dict[str, Tensor]
    path: Path
    wrapper: str | None = None
    prefix: str = ""
    averaged: bool = False
    classes: tuple[str, ...] | None = None
    left_out: dict[str, int] = field(default_factory=dict)


def read_official(path: str | Path, copy: Copy = "auto") -> OfficialFile:
    """Find a model's tensors in a published file; no code of the file runs.

    Args:
        path: a file of ``torch.save`` or safetensors.
        copy: of files that hold the weights twice, ``averaged`` takes the moving average and ``training`` the
            weights that the optimiser worked on. ``auto`` takes what published numbers are of: the average
            under a key of its own (``model_ema``), and the plain names beside ``ema_...`` ones, since mmcv's
            EMA hook has swapped the two when an epoch's checkpoint is written.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else than tensors by name.
    """
    path = Path(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path, mmap=True)
    classes = _classes(content)
    left_out: Counter[str] = Counter()
    wrapper, averaged = None, False
    order = _WRAPPERS if copy == "training" else (*_AVERAGED_WRAPPERS, *_WRAPPERS)
    while isinstance(content, Mapping):
        key = next((k for k in order if isinstance(content.get(k), Mapping)), None)
        if key is None:
            break
        averaged |= key in _AVERAGED_WRAPPERS
        left_out.update({str(k): n for k, v in content.items() if k != key and (n := count_tensors(v))})
        content, wrapper = content[key], wrapper or key
    state = named_tensors(_tensors_alone(content), str(path))
    if not state:
        raise CheckpointError(
            f"{path} holds no weights by name\n"
            f"published files hold them directly or under {', '.join(_WRAPPERS)}"
        )
    state, prefix = _without_prefix(state)
    state, of_twins, dropped = _one_of_twins(state, copy)
    if dropped:
        left_out["training copy" if of_twins else _TWIN + "..."] = dropped
    return OfficialFile(state, path, wrapper, prefix, averaged or of_twins, classes, dict(left_out))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except PermissionError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # a damaged file leads to errors of several types
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {str(error)[:160]}") from None


def _tensors_alone(content: object) -> object:
    """A mapping's tensors; numbers and texts that a training program has put beside them are left aside."""
    if not isinstance(content, Mapping):
        return content
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _classes(content: object) -> tuple[str, ...] | None:
    """The class names that mmcv writes beside the weights."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    names = meta.get("CLASSES") if isinstance(meta, Mapping) else None
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _without_prefix(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Names without what stands before every one of them."""
    whole = ""
    while True:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            return state, whole
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        whole += prefix


def _one_of_twins(state: dict[str, Tensor], copy: Copy) -> tuple[dict[str, Tensor], bool, int]:
    """One copy of weights that stand there twice, by plain and by ``ema_`` names.

    Returns:
        The copy by plain names, whether it is that of the ``ema_`` names, and how many tensors were dropped.
    """
    twins = {name.removeprefix(_TWIN): value for name, value in state.items() if name.startswith(_TWIN)}
    plain = {name: value for name, value in state.items() if not name.startswith(_TWIN)}
    if not twins:
        return state, False, 0
    if not plain:
        return twins, True, 0
    if copy != "averaged":
        return plain, False, len(twins)
    taken = {name: twins.get(name.replace(".", "_"), twins.get(name)) for name in plain}
    chosen = {name: plain[name] if twin is None else twin for name, twin in taken.items()}
    return chosen, True, sum(twin is not None for twin in taken.values())
