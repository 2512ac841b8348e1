"""Loss of the detection head: every decoder layer is matched to the ground truth on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bevperception.config_model import DetectionConfig
from bevperception.models.heads.box_code import BoxCodec
from bevperception.models.heads.focal_loss import ReduceMean, sigmoid_focal_loss
from bevperception.models.heads.matching import assign_all, matching_cost
from bevperception.models.padding import pad_rows
from bevperception.structures import Boxes3D, DetectionOutputs


@dataclass(frozen=True)
class PaddedBoxes:
    """Ground truth of B samples, padded to the longest.

    Attributes:
        labels: (B, G) int64, 0 in the padding.
        codes: (B, G, 10) box codes, float32 or wider, 0 in the padding.
        counts: boxes of each sample.
    """

    labels: Tensor
    codes: Tensor
    counts: list[int]

    @classmethod
    def of(cls, boxes: Sequence[Boxes3D], codec: BoxCodec) -> PaddedBoxes:
        """Pad and encode at least one sample's boxes, each possibly none."""
        counts = [len(b) for b in boxes]
        labels = torch.cat([b.labels for b in boxes])
        codes = codec.encode(torch.cat([b.values for b in boxes]))
        return cls(pad_rows(labels, counts), pad_rows(codes, counts), counts)


@dataclass(frozen=True)
class Matches:
    """Pairs of prediction and ground truth; (M,) int64 each.

    Attributes:
        sets, samples, queries: which prediction.
        truths: which of its sample's boxes.
    """

    sets: Tensor
    samples: Tensor
    queries: Tensor
    truths: Tensor


@dataclass(frozen=True)
class DetectionLoss:
    """Focal classification and box losses of all decoder layers, each matched on its own.

    Both are divided by the number of matched boxes in all processes' batches (at least 1). A
    ground-truth box with an unknown (NaN) velocity is matched and classified, but its row leaves the
    box loss, as in the published code, unless ``keep_unknown_velocity``: then only its velocity does.

    Attributes:
        codec: boxes to codes.
        box_weight, class_weight: of the losses.
        box_cost, class_cost: of the matching.
        code_weights: of the code's ten entries.
        alpha, gamma: of the focal loss.
        smooth: smooth L1 in the loss.
        smooth_cost: smooth L1 in the matching.
        smooth_beta: where the smooth L1 loss turns linear.
        keep_unknown_velocity: see above.
    """

    codec: BoxCodec
    box_weight: float
    box_cost: float
    code_weights: Sequence[float]
    class_weight: float = 2.0
    class_cost: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0
    smooth: bool = False
    smooth_cost: bool = False
    smooth_beta: float = 1.0
    keep_unknown_velocity: bool = False

    @classmethod
    def of(cls, settings: DetectionConfig, codec: BoxCodec) -> DetectionLoss:
        """The loss that a head's settings ask for."""
        smooth = settings.box_loss == "smooth_l1"
        return cls(
            codec=codec,
            box_weight=settings.box_loss_weight,
            box_cost=settings.box_loss_weight,
            code_weights=settings.code_weights,
            smooth=smooth,
            smooth_cost=smooth,
            keep_unknown_velocity=settings.unknown_velocity == "velocity",
        )

    def match(
        self, class_logits: Tensor, box_codes: Tensor, targets: PaddedBoxes, valid: Tensor | None = None
    ) -> Matches:
        """Assign predictions to ground truth in every set of predictions on its own.

        All costs are made at once and leave the device in one copy.

        Args:
            class_logits: (S, B, Q, classes) of S sets, the decoder's layers times the groups of queries.
            box_codes: (S, B, Q, 10).
            targets: ground truth of the B samples.
            valid: (B, Q) bool, False for predictions that are padding; None for none.
        """
        with torch.no_grad():
            cost = matching_cost(
                class_logits.float() if class_logits.dtype.itemsize < 4 else class_logits,
                box_codes.float() if box_codes.dtype.itemsize < 4 else box_codes,
                targets.labels,
                targets.codes.to(torch.promote_types(box_codes.dtype, torch.float32)),
                self.class_cost,
                self.box_cost,
                self.alpha,
                self.gamma,
                self.smooth_cost,
            )
        pairs = assign_all(cost, targets.counts, None if valid is None else valid.cpu().numpy())
        columns = torch.from_numpy(pairs).to(cost.device, non_blocking=True).unbind(-1)
        return Matches(*columns)

    def _box_losses(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        """Box loss of each of M matched pairs of codes, both (M, 10): (M,)."""
        known = wanted.isfinite()
        if not self.keep_unknown_velocity:
            known = known.all(-1, keepdim=True).expand_as(wanted)
        difference = (predicted - torch.where(known, wanted, predicted.detach())).abs()
        if self.smooth:
            beta = self.smooth_beta
            difference = torch.where(difference < beta, 0.5 * difference**2 / beta, difference - 0.5 * beta)
        weights = predicted.new_tensor(list(self.code_weights))
        return torch.where(known, difference * weights, 0.0).sum(-1)

    def _class_losses(
        self, class_logits: Tensor, targets: PaddedBoxes, matches: Matches, valid: Tensor | None
    ) -> Tensor:
        """Focal loss of every set: (S,)."""
        wanted = torch.zeros_like(class_logits)
        labels = targets.labels[matches.samples, matches.truths]
        wanted[matches.sets, matches.samples, matches.queries, labels] = 1.0
        focal = sigmoid_focal_loss(class_logits, wanted, self.alpha, self.gamma)
        if valid is not None:
            focal = torch.where(valid[..., None], focal, 0.0)
        return focal.flatten(1).sum(-1)  # (S, B, Q, classes) -> (S,)

    def __call__(
        self, outputs: DetectionOutputs, targets: Sequence[Boxes3D], reduce_mean: ReduceMean
    ) -> dict[str, Tensor]:
        """Weighted losses: ``class`` and ``box`` of the last layer, ``layerK.class`` ... of earlier ones.

        Groups of queries are matched each on its own; their losses are averaged.

        Args:
            outputs: all layers' predictions.
            targets: ground truth of the B samples.
            reduce_mean: over processes.
        """
        layers, groups = outputs.class_logits.shape[0], outputs.groups
        logits, codes = (_by_set(x, groups) for x in (outputs.class_logits, outputs.box_codes))
        queries = logits.shape[2]
        # Every group has the same padding.
        valid = None if outputs.valid is None else outputs.valid[:, :queries]
        truth = PaddedBoxes.of(targets, self.codec)
        matches = self.match(logits, codes, truth, valid)
        places = [queries] * len(targets) if valid is None else valid.sum(-1).tolist()
        matched = sum(min(count, place) for count, place in zip(truth.counts, places, strict=True))
        positives = reduce_mean(logits.new_tensor(float(matched))).clamp_min(1.0)
        class_losses = self._class_losses(logits, truth, matches, valid)
        pairs = self._box_losses(
            codes[matches.sets, matches.samples, matches.queries],
            truth.codes[matches.samples, matches.truths].to(codes),
        )
        box_losses = codes.sum((1, 2, 3)) * 0.0  # a gradient, though zero, where nothing is matched
        box_losses = box_losses.index_add(0, matches.sets, pairs)
        losses = {}
        for index in range(layers):
            prefix = "" if index == layers - 1 else f"layer{index}."
            for name, weight, of_sets in (
                ("class", self.class_weight, class_losses),
                ("box", self.box_weight, box_losses),
            ):
                of_groups = of_sets[index * groups : (index + 1) * groups]
                losses[f"{prefix}{name}"] = weight * of_groups.mean() / positives
        return losses


def _by_set(values: Tensor, groups: int) -> Tensor:
    """(layers, B, groups * Q, c) to (layers * groups, B, Q, c)."""
    layers, batch, queries, columns = values.shape
    # (layers, B, groups*Q, c) -> (layers, B, groups, Q, c)
    by_group = values.view(layers, batch, groups, queries // groups, columns)
    # (layers, B, groups, Q, c) -> (layers*groups, B, Q, c)
    return by_group.transpose(1, 2).flatten(0, 1)
