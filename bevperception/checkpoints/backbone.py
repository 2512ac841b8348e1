"""Starting a backbone from pre-trained weights: this project's, or published InternImage and ResNet files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bevperception.checkpoints.published import internimage_key
from bevperception.checkpoints.weights import read_torch_file
from bevperception.errors import CheckpointError
from bevperception.models.backbones import internimage

BACKBONE_PREFIX = "backbone."
_WRAPPERS = ("state_dict", "model", "module")
_MAY_BE_MISSING = ("num_batches_tracked", ".scale1", ".scale2")
"""Counters; and layer scales, which some published detectors add at 1 to a classifier without any."""


def load_backbone(backbone: nn.Module, variant: str, path: str | Path) -> int:
    """Fill a backbone with pre-trained weights.

    Every parameter of the backbone has to be there with its shape; what else the file holds (a
    classifier, a detector's other parts) is left aside.

    Args:
        backbone: changed in place.
        variant: its name in the configuration.
        path: safetensors of this project, or a published .pth or safetensors file.

    Returns:
        How many tensors of the file were left aside.

    Raises:
        CheckpointError: the file is missing, damaged, or of another variant.
    """
    path = Path(path)
    found = {_own_name(name, variant): value for name, value in _tensors(path).items()}
    expected = backbone.state_dict()
    missing = [n for n in expected if n not in found and not n.endswith(_MAY_BE_MISSING)]
    reshaped = [n for n, value in expected.items() if n in found and found[n].shape != value.shape]
    if missing or reshaped:
        what = f"{len(missing)} of {len(expected)} parameters are missing ({', '.join(missing[:3])})"
        if not missing:
            name = reshaped[0]
            shapes = f"{list(found[name].shape)} instead of {list(expected[name].shape)}"
            what = f"{len(reshaped)} parameters have another shape ({name} {shapes})"
        raise CheckpointError(
            f"{path} does not fit the backbone {variant}: {what}\n"
            "set model.backbone.variant to the one the weights are of"
        )
    backbone.load_state_dict({n: found.get(n, value) for n, value in expected.items()})
    return len(found.keys() - expected.keys())


def _own_name(name: str, variant: str) -> str:
    name = name.removeprefix(BACKBONE_PREFIX)
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
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path} holds no weights by name")
    of_backbone = {k: v for k, v in tensors.items() if k.startswith(BACKBONE_PREFIX)}
    return of_backbone or tensors
