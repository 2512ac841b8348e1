"""Losses of the detection head (every layer) and of the segmentation head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bevperception.models.heads.box_code import BoxCodec
from bevperception.models.matching import assign, matching_cost
from bevperception.structures import Boxes3D, DetectionOutputs

ReduceMean = Callable[[Tensor], Tensor]
"""Mean of a scalar tensor over all processes; the identity in one process."""


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss (Lin et al., ICCV 2017) of every entry.

    Args:
        logits: (...).
        targets: (...) 0 or 1.
        alpha: weight of positives, 1 - alpha of negatives; negative for no class balance.
        gamma: focusing exponent.

    Returns:
        (...) not reduced.
    """
    p = logits.sigmoid()
    missed = (1 - p) * targets + p * (1 - targets)
    loss = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none") * missed**gamma
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss


@dataclass(frozen=True)
class DetectionLoss:
    """Focal classification and box losses of all decoder layers, each matched on its own.

    Both are divided by the number of matched boxes in all processes' batches (at least 1). A
    ground-truth box with an unknown (NaN) velocity is matched and classified, but its row leaves the
    box loss, as in the published code, unless ``keep_unknown_velocity``: then only its velocity does.

    Attributes:
        codec: boxes to codes.
        class_weight, box_weight: of the losses.
        class_cost, box_cost: of the matching.
        code_weights: of the code's ten entries.
        alpha, gamma: of the focal loss.
        smooth: smooth L1 in the loss.
        smooth_cost: smooth L1 in the matching.
        smooth_beta: where the smooth L1 loss turns linear.
        keep_unknown_velocity: see above.
    """

    codec: BoxCodec
    class_weight: float
    box_weight: float
    class_cost: float
    box_cost: float
    code_weights: Sequence[float]
    alpha: float = 0.25
    gamma: float = 2.0
    smooth: bool = False
    smooth_cost: bool = False
    smooth_beta: float = 1.0
    keep_unknown_velocity: bool = False

    def match(self, class_logits: Tensor, box_codes: Tensor, boxes: Boxes3D) -> tuple[Tensor, Tensor]:
        """Query and ground-truth indices of one sample and layer.

        Args:
            class_logits: (Q, classes).
            box_codes: (Q, 10).
            boxes: ground truth, possibly none.
        """
        with torch.no_grad():
            cost = matching_cost(
                class_logits.float() if class_logits.dtype.itemsize < 4 else class_logits,
                box_codes.float() if box_codes.dtype.itemsize < 4 else box_codes,
                boxes.labels,
                self.codec.encode(boxes.values).to(box_codes.dtype),
                self.class_cost,
                self.box_cost,
                self.alpha,
                self.gamma,
                self.smooth_cost,
            )
            return assign(cost)

    def layer(
        self,
        class_logits: Tensor,
        box_codes: Tensor,
        targets: Sequence[Boxes3D],
        positives: Tensor,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Classification and box loss of one layer.

        Args:
            class_logits: (B, Q, classes).
            box_codes: (B, Q, 10).
            targets: ground truth of the B samples.
            positives: scalar that both losses are divided by.
            valid: (B, Q) bool, False for padding, which is neither matched nor background.
        """
        wanted = torch.zeros_like(class_logits)
        box_loss = box_codes.sum() * 0.0
        for sample, boxes in enumerate(targets):
            queries, truths = self._match_valid(class_logits, box_codes, boxes, sample, valid)
            wanted[sample, queries, boxes.labels[truths]] = 1.0
            codes = self.codec.encode(boxes.values[truths]).to(box_codes)
            box_loss = box_loss + self._box_loss(box_codes[sample, queries], codes)
        focal = sigmoid_focal_loss(class_logits, wanted, self.alpha, self.gamma)
        class_loss = (focal if valid is None else torch.where(valid[..., None], focal, 0.0)).sum()
        return self.class_weight * class_loss / positives, self.box_weight * box_loss / positives

    def _match_valid(
        self, class_logits: Tensor, box_codes: Tensor, boxes: Boxes3D, sample: int, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if valid is None:
            return self.match(class_logits[sample], box_codes[sample], boxes)
        there = valid[sample].nonzero().squeeze(-1)
        queries, truths = self.match(class_logits[sample, there], box_codes[sample, there], boxes)
        return there[queries], truths

    def _box_loss(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        known = wanted.isfinite()
        if not self.keep_unknown_velocity:
            known = known.all(-1, keepdim=True).expand_as(wanted)
        difference = (predicted - torch.where(known, wanted, predicted.detach())).abs()
        if self.smooth:
            beta = self.smooth_beta
            difference = torch.where(difference < beta, 0.5 * difference**2 / beta, difference - 0.5 * beta)
        weights = predicted.new_tensor(list(self.code_weights))
        return torch.where(known, difference * weights, 0.0).sum()

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
        groups = [outputs.group(g) for g in range(outputs.groups)] if outputs.groups > 1 else [outputs]
        found = [self._group(group, targets, reduce_mean) for group in groups]
        if len(found) == 1:
            return found[0]
        return {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}

    def _group(
        self, outputs: DetectionOutputs, targets: Sequence[Boxes3D], reduce_mean: ReduceMean
    ) -> dict[str, Tensor]:
        layers, batch, queries, _ = outputs.class_logits.shape
        places = [queries] * batch if outputs.valid is None else outputs.valid.sum(-1).tolist()
        matched = sum(min(len(boxes), place) for boxes, place in zip(targets, places, strict=True))
        positives = reduce_mean(outputs.class_logits.new_tensor(float(matched))).clamp_min(1.0)
        losses = {}
        for index in range(layers):
            class_loss, box_loss = self.layer(
                outputs.class_logits[index], outputs.box_codes[index], targets, positives, outputs.valid
            )
            prefix = "" if index == layers - 1 else f"layer{index}."
            losses[f"{prefix}class"] = class_loss
            losses[f"{prefix}box"] = box_loss
        return losses


@dataclass(frozen=True)
class SegmentationLoss:
    """Focal plus dice loss, over the (sample, class) pairs that have labels.

    Attributes:
        focal_weight, dice_weight: of the two.
        alpha, gamma: of the focal loss.
    """

    focal_weight: float
    dice_weight: float
    alpha: float = -1.0
    gamma: float = 2.0

    def __call__(
        self, logits: Tensor, targets: Tensor, present: Tensor, reduce_mean: ReduceMean
    ) -> dict[str, Tensor]:
        """Weighted losses ``focal`` and ``dice``; zero (with a zero gradient) where nothing has labels.

        Args:
            logits: (B, classes, rows, columns).
            targets: the same shape, 0 or 1.
            present: (B, classes) bool.
            reduce_mean: over processes.
        """
        # where, not a product: a class without labels may hold anything, NaN included.
        targets = torch.where(present[..., None, None], targets, 0).to(logits.dtype)
        pairs = present.to(logits.dtype)
        count = reduce_mean(pairs.sum()).clamp_min(1.0)
        focal = sigmoid_focal_loss(logits, targets, self.alpha, self.gamma).mean((-2, -1))
        p = logits.sigmoid()
        overlap = (p * targets).sum((-2, -1))
        dice = 1 - (2 * overlap + 1) / (p.sum((-2, -1)) + targets.sum((-2, -1)) + 1)
        zero = torch.zeros_like(focal)
        return {
            "focal": self.focal_weight * torch.where(present, focal, zero).sum() / count,
            "dice": self.dice_weight * torch.where(present, dice, zero).sum() / count,
        }
