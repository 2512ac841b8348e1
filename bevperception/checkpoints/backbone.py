"""Starting a backbone from pre-trained weights: this project's, or published InternImage and ResNet files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bevperception.checkpoints.published import internimage_key
from bevperception.checkpoints.weights import read_torch_file
from bevperception.errors import CheckpointError
from bevperception.models.backbones import internimage

BACKBONE_PREFIXES = ("backbone.", "img_backbone.")
_PARALLEL_PREFIX = "module."
_BLOCK = re.compile(r"((?:stages\.\d+\.blocks|layer\d+)\.)\d+\.")
_WRAPPERS = ("state_dict", "model", "module")
_MAY_BE_MISSING = ("num_batches_tracked", ".scale1", ".scale2")
"""Counters; and layer scales, which some published detectors add at 1 to a classifier without any."""


def load_backbone(backbone: nn.Module, variant: str, path: str | Path) -> int:
    """Fill a backbone with pre-trained weights.

    Every parameter of the backbone has to be there with its shape, and no stage may have more blocks in
    the file; what else the file holds (a classifier, a detector's other parts, later stages) is left aside.

    Args:
        backbone: changed in place.
        variant: its name in the configuration.
        path: safetensors of this project, or a published .pth or safetensors file.

    Returns:
        How many tensors of the file were left aside.

    Raises:
        CheckpointError: the file is missing, damaged, holds NaN or infinity, or is of another variant.
    """
    path = Path(path)
    found = {_own_name(name, variant): value for name, value in _tensors(path).items()}
    expected = backbone.state_dict()
    missing = [n for n in expected if n not in found and not n.endswith(_MAY_BE_MISSING)]
    reshaped = [n for n, value in expected.items() if n in found and found[n].shape != value.shape]
    deeper = sorted(_surplus_blocks(found, expected))
    if missing or reshaped or deeper:
        if missing:
            what = f"{len(missing)} of {len(expected)} parameters are missing ({', '.join(missing[:3])})"
        elif reshaped:
            name = reshaped[0]
            shapes = f"{list(found[name].shape)} instead of {list(expected[name].shape)}"
            what = f"{len(reshaped)} parameters have another shape ({name} {shapes})"
        else:
            what = f"it has {len(deeper)} blocks more ({', '.join(deeper[:3])})"
        raise CheckpointError(
            f"{path} does not fit the backbone {variant}: {what}\n"
            "set model.backbone.variant to the one the weights are of"
        )
    broken = [n for n in expected if n in found and not _is_finite(found[n])]
    if broken:
        raise CheckpointError(f"{path} holds NaN or infinity in {broken[0]} and {len(broken) - 1} others")
    backbone.load_state_dict({n: found.get(n, value) for n, value in expected.items()})
    return len(found.keys() - expected.keys())


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _surplus_blocks(found: Iterable[str], expected: Iterable[str]) -> set[str]:
    """Blocks of the file in stages that the backbone has without them."""
    in_file, own = ({m for name in names if (m := _BLOCK.match(name))} for names in (found, expected))
    blocks, stages = {m[0] for m in own}, {m[1] for m in own}
    return {m[0].rstrip(".") for m in in_file if m[1] in stages and m[0] not in blocks}


def _own_name(name: str, variant: str) -> str:
    if variant in internimage.VARIANTS:
        return internimage_key(name, internimage.VARIANTS[variant].post_norm)
    return name


def _tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file; of a detector's, only those of its backbone."""
    if path.suffix == ".safetensors":
        try:
            content: object = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read the backbone weights {path}: {error}") from None
    else:
        content = read_torch_file(path)
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    named = content.items() if isinstance(content, dict) else ()
    tensors = {k.removeprefix(_PARALLEL_PREFIX): v for k, v in named if isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no weights by name")
    for prefix in BACKBONE_PREFIXES:
        part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if part:
            return part
    return tensors
