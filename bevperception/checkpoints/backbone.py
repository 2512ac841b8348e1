"""Starting a backbone from pre-trained weights: this project's, or published InternImage and ResNet files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from bevperception.checkpoints.official_names import internimage_table
from bevperception.checkpoints.tensors import converted, count_tensors, named_tensors, parts_of, some
from bevperception.checkpoints.torch_files import read_torch_file
from bevperception.errors import CheckpointError
from bevperception.models.backbones import internimage

BACKBONE_PREFIXES = ("backbone.", "img_backbone.")
_PARALLEL_PREFIX = "module."
_BLOCK = re.compile(r"((?:stages\.\d+\.blocks|layer\d+)\.)\d+\.")
_STAGE = re.compile(r"(?:(?:stages|downsamples)\.\d+|[^.]+)")
"""A piece of a backbone that is built as a whole or not at all: a stage, the stem, a classifier."""
_WRAPPERS = ("state_dict", "model", "module")
_MAY_BE_MISSING = ("num_batches_tracked", ".scale1", ".scale2")
"""Counters; and layer scales, which some published detectors add at 1 to a classifier without any."""


def load_backbone(backbone: nn.Module, variant: str, path: str | Path) -> dict[str, int]:
    """Fill a backbone with pre-trained weights.

    Every parameter of the backbone has to be there with its shape, and no stage that is built may have others
    in the file. What else the file holds is left aside: a classifier, a detector's other parts, later stages.

    Args:
        backbone: changed in place.
        variant: its name in the configuration.
        path: safetensors of this project, or a published .pth or safetensors file.

    Returns:
        How many tensors of which parts of the file were left aside.

    Raises:
        CheckpointError: the file is missing, damaged, of another variant, or holds NaN, infinity or numbers
            that are no real ones.
    """
    path = Path(path)
    tensors, aside = _tensors(path)
    found = {_own_name(name, variant): value for name, value in tensors.items()}
    expected = backbone.state_dict()
    problem = _misfit(found, expected)
    if problem is not None:
        raise CheckpointError(
            f"{path} does not fit the backbone {variant}: {problem}\n"
            "set model.backbone.variant to the one the weights are of"
        )
    state = converted({n: found[n] for n in expected if n in found}, expected, str(path))
    backbone.load_state_dict(expected | state)
    unused = Counter(_stage(name) for name in found if name not in expected)
    return dict(unused + Counter(aside))


def _misfit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Why the tensors of a file are not a backbone's, in words; None where they are."""
    missing = [n for n in expected if n not in found and not n.endswith(_MAY_BE_MISSING)]
    if missing:
        return f"{len(missing)} of {len(expected)} parameters are missing ({some(missing)})"
    reshaped = [n for n, value in expected.items() if n in found and found[n].shape != value.shape]
    if reshaped:
        name = reshaped[0]
        shapes = f"{list(found[name].shape)} instead of {list(expected[name].shape)}"
        return f"{len(reshaped)} parameters have another shape ({name} {shapes})"
    deeper = sorted(_surplus_blocks(found, expected))
    if deeper:
        return f"it has {len(deeper)} blocks more ({some(deeper)})"
    built = {_stage(name) for name in expected}
    unknown = [n for n in found if n not in expected and _stage(n) in built]
    if unknown:
        return f"it has {len(unknown)} tensors that the backbone has no use for ({some(unknown)})"
    partial = [end for end in (".scale1", ".scale2") if _is_partial(end, found, expected)]
    return f"only some blocks have {partial[0][1:]}" if partial else None


def _is_partial(end: str, found: Iterable[str], expected: Iterable[str]) -> bool:
    """Whether the file has some, but not all, of the expected names with an end."""
    there = set(found)
    return len({name in there for name in expected if name.endswith(end)}) == 2


def _stage(name: str) -> str:
    match = _STAGE.match(name)
    return match[0] if match else name


def _surplus_blocks(found: Iterable[str], expected: Iterable[str]) -> set[str]:
    """Blocks of the file in stages that the backbone has without them."""
    in_file, own = ({m for name in names if (m := _BLOCK.match(name))} for names in (found, expected))
    blocks, stages = {m[0] for m in own}, {m[1] for m in own}
    return {m[0].rstrip(".") for m in in_file if m[1] in stages and m[0] not in blocks}


def _own_name(name: str, variant: str) -> str:
    if variant in internimage.VARIANTS:
        return internimage_table(internimage.VARIANTS[variant].post_norm).to_own(name) or name
    return name


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors of a file, or of a detector's backbone alone, and how many its other parts have."""
    if path.suffix == ".safetensors":
        try:
            content: object = load_file(path)
        except Exception as error:  # a damaged file leads to errors of several types
            raise CheckpointError(f"cannot read the backbone weights {path}: {error}") from None
    else:
        content = read_torch_file(path)
    aside: Counter[str] = Counter()
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            aside.update({str(k): n for k, v in content.items() if k != key and (n := count_tensors(v))})
            content = content[key]
    values = content.items() if isinstance(content, dict) else ()
    named = {k: v for k, v in values if isinstance(v, Tensor)}
    if not named:
        raise CheckpointError(f"{path} holds no weights by name")
    named = {k.removeprefix(_PARALLEL_PREFIX): v for k, v in named_tensors(named, str(path)).items()}
    for prefix in BACKBONE_PREFIXES:
        part = {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}
        if part:
            aside.update(parts_of(name for name in named if not name.startswith(prefix)))
            return part, dict(aside)
    return named, dict(aside)
