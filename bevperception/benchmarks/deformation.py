"""Contribution of deformation to a trained InternImage.

How far they have left the plain 3x3 average that they start as, and what the model loses if set back to it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bevperception.benchmarks.trained import detect, load_trained, parse_trained
from bevperception.data.nuscenes import NuScenesReader
from bevperception.errors import ConfigError
from bevperception.evaluation.runner import SplitEvaluator
from bevperception.files import output_folder
from bevperception.models.backbones.internimage import DCNv3, InternImage

SET_BACK: dict[str, tuple[str, ...]] = {
    "as trained": (),
    "offsets 0": ("offset",),
    "masks even": ("mask",),
    "both: an average": ("offset", "mask"),
}
"""Name of a row: the layers of every deformable convolution that are set to zero."""


class Sampling:
    """Means over all that a deformable convolution samples, gathered while it runs.

    Args:
        name: of the convolution in its backbone.
        convolution: watched until :meth:`close`.

    Attributes:
        name: as given.
        outputs: output places seen so far, each in every group.
    """

    def __init__(self, name: str, convolution: DCNv3) -> None:
        self.name, self.outputs = name, 0
        self._groups, self._scale = convolution.groups, convolution.offset_scale
        self._length_sum, self._points_sum = 0.0, 0.0
        self._handles = [
            convolution.offset.register_forward_hook(self._see_offsets),
            convolution.mask.register_forward_hook(self._see_masks),
        ]

    def _see_offsets(self, layer: nn.Module, inputs: tuple[Tensor, ...], offsets: Tensor) -> None:
        lengths = offsets.detach().float().unflatten(-1, (self._groups, -1, 2)).norm(dim=-1)  # N H W G K
        self._length_sum += float(lengths.mean(-1).double().sum()) * self._scale
        self.outputs += lengths[..., 0].numel()

    def _see_masks(self, layer: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        logs = logits.detach().float().unflatten(-1, (self._groups, -1)).log_softmax(-1)  # N H W G K
        self._points_sum += float((-(logs.exp() * logs).sum(-1)).exp().double().sum())

    @property
    def offset_px(self) -> float:
        """Mean length of the offsets, in pixels of the map; NaN before anything ran."""
        return self._length_sum / self.outputs if self.outputs else float("nan")

    @property
    def points(self) -> float:
        """Mean number of points that count: exp of the masks' entropy, all of them for even masks."""
        return self._points_sum / self.outputs if self.outputs else float("nan")

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()


@contextlib.contextmanager
def watched(backbone: InternImage) -> Iterator[list[Sampling]]:
    """Watch every deformable convolution of a backbone, in the order of its blocks.

    Args:
        backbone: an InternImage.

    Yields:
        A :class:`Sampling` per convolution.
    """
    found = [Sampling(name, m) for name, m in backbone.named_modules() if isinstance(m, DCNv3)]
    try:
        yield found
    finally:
        for sampling in found:
            sampling.close()


def set_back(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """A copy of a model whose deformable convolutions sample as at the start of training.

    Args:
        model: holds DCNv3 modules.
        layers: of every DCNv3: "offset" (the plain grid), "mask" (every point counts alike), or both.
    """
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, DCNv3):
            for name in layers:
                layer = getattr(module, name)
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
    return plain


def measure(evaluator: SplitEvaluator, model: nn.Module, device: torch.device, out: Path) -> list[Sampling]:
    """Evaluate a model as it is and set back, print a row for each.

    Args:
        evaluator: of the split.
        model: a BEVFormer on an InternImage.
        device: where it runs.
        out: folder for the submissions and metrics, one below it for every row.

    Returns:
        What the convolutions of the model as it is sampled.
    """
    backbone = getattr(model, "backbone", None)
    assert isinstance(backbone, InternImage)
    with watched(backbone) as sampled:
        print(_evaluate(evaluator, model, device, out, "as trained"), flush=True)
    for name, layers in SET_BACK.items():
        if layers:
            print(_evaluate(evaluator, set_back(model, layers), device, out, name), flush=True)
    return sampled


def _evaluate(evaluator: SplitEvaluator, model: nn.Module, device: torch.device, out: Path, name: str) -> str:
    folder = out / name.replace(":", "").replace(" ", "_")
    overall = detect(evaluator, model, device, folder)
    return f"{name:<18}{overall.NDS:>8.4f}{overall.mAP:>8.4f}"


def format_sampling(sampled: Sequence[Sampling]) -> str:
    """A line per convolution."""
    rows = [f"{one.name:<22}{one.offset_px:>12.2f}{one.points:>10.1f}" for one in sampled]
    return "\n".join([f"{'convolution':<22}{'offset, px':>12}{'points':>10}", *rows])


def main(argv: Sequence[str] | None = None) -> int:
    """The program ``tools/benchmark.py deformation``.

    Args:
        argv: arguments after ``deformation``; None takes the program's own.

    Raises:
        BevError: a setting, the weights or the data set do not suffice.
    """
    about = (
        "NDS of a model on an InternImage as it is, and with its deformable convolutions set back to the "
        "plain 3x3 average that they start as; for each convolution the mean length of its offsets in pixels "
        "of its map, and how many of its 9 points count (exp of the masks' entropy)."
    )
    config, options = parse_trained(argv, "deformation", about, writes=True)
    if not config.model.detection.enabled or config.model.perspective.only:
        raise ConfigError("what deformation is worth is measured on a model with a detection head")
    if not config.model.backbone.variant.startswith("internimage"):
        raise ConfigError(
            f"model.backbone.variant must be an InternImage, got {config.model.backbone.variant}: "
            "others have no deformable convolutions of this kind"
        )
    with output_folder(options.out) as out:
        model, device = load_trained(config, options.weights)
        evaluator = SplitEvaluator(config, NuScenesReader(config.data), options.split)
        print(f"{'convolutions':<18}{'NDS':>8}{'mAP':>8}")
        sampled = measure(evaluator, model, device, out)
    print(format_sampling(sampled))
    return 0
