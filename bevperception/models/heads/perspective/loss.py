"""Losses of the perspective head: FCOS's in the image, DD3D's disentangled corners in space.

What the published code does and its papers do not say is kept, as its weights of the terms go with it: the
quadratic part of the corners' smooth L1 is not divided by beta, and the attributes' mean cross-entropy is
multiplied by weights that add up to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from bevperception.models.heads.focal_loss import ReduceMean
from bevperception.models.heads.perspective.camera import CameraBoxes
from bevperception.models.heads.perspective.codec import (
    FlatPredictions,
    PerspectiveCodec,
    component_of,
)
from bevperception.models.heads.perspective.targets import Assignment, ImageTargets, no_targets

BoxLoss = Literal["giou", "iou", "linear_iou"]

_COMPONENTS = {
    "quaternion": "rotation",
    "projected_centre": "centre_px",
    "depth": "depth_m",
    "size": "size_m",
}


@dataclass(frozen=True)
class PerspectiveLoss:
    """All terms, weighted among each other as published.

    Attributes:
        codec: how 3D boxes are read.
        focal_alpha, focal_gamma: of the classification.
        box2d: which IoU loss.
        box3d_weight, confidence_weight, attribute_weight, speed_weight: of the terms.
        confidence_temperature_m: corner error whose confidence target is 1/e.
        corner_beta_m, speed_beta: where the smooth L1 losses turn linear.
    """

    codec: PerspectiveCodec
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    box2d: BoxLoss = "giou"
    box3d_weight: float = 2.0
    confidence_weight: float = 1.0
    attribute_weight: float = 0.2
    speed_weight: float = 0.2
    confidence_temperature_m: float = 1.0
    corner_beta_m: float = 0.05
    speed_beta: float = 0.05

    def __call__(
        self,
        predicted: FlatPredictions,
        assigned: Assignment,
        targets: Sequence[ImageTargets],
        inverse_intrinsics: Tensor,
        reduce_mean: ReduceMean = lambda x: x,
    ) -> dict[str, Tensor]:
        """Losses by name; finite, with zero gradients for what has no ground truth.

        Args:
            predicted: of P places.
            assigned: of the same.
            targets: of M images, what the assignment's objects count.
            inverse_intrinsics: (M, 3, 3).
            reduce_mean: mean of a scalar over processes.
        """
        positives = assigned.positives
        like = predicted.class_logits
        wanted = torch.zeros_like(like)
        wanted[positives, assigned.labels[positives]] = 1.0
        count = reduce_mean(like.new_tensor(float(len(positives)))).clamp_min(1.0)
        focal = (
            single_precision_focal_loss(like, wanted, self.focal_alpha, self.focal_gamma).sum()
            / count.float()
        )
        chosen, box2d = predicted[positives], assigned.box2d[positives].to(like)
        weights = centreness_targets(box2d)
        total = reduce_mean(weights.sum()).clamp_min(1e-6)
        errors = iou_loss(chosen.box2d, box2d, self.box2d)
        centreness = functional.binary_cross_entropy_with_logits(chosen.centreness, weights, reduction="sum")
        return {
            "class": focal.to(like.dtype),
            "box2d": (errors * weights).sum() / total,
            "centreness": centreness / count,
            **self._boxes(chosen, assigned, targets, inverse_intrinsics.to(like), weights, total),
            **self._attributes(chosen, assigned, weights, reduce_mean),
        }

    def _boxes(
        self,
        chosen: FlatPredictions,
        assigned: Assignment,
        targets: Sequence[ImageTargets],
        inverse_intrinsics: Tensor,
        weights: Tensor,
        total: Tensor,
    ) -> dict[str, Tensor]:
        """3D terms: each component of the boxes in the place of the true one, compared by corners."""
        index = assigned.positives
        labels = assigned.labels[index]
        predicted = self.codec.boxes(
            chosen,
            labels,
            assigned.places_px[index].to(weights),
            inverse_intrinsics[assigned.images[index]],
        )
        true = _objects(targets, assigned.objects[index], predicted)
        corners = true.corners_m()
        losses = {}
        for name, field in _COMPONENTS.items():
            mixed = replace(true, **{field: getattr(predicted, field)})
            difference = (mixed.corners_m() - corners).abs()
            beta = self.corner_beta_m
            error = torch.where(difference < beta, 0.5 * difference**2, difference - 0.5 * beta)
            error = (error.flatten(1).mean(1) * weights).sum()  # (n, 8, 3) -> (n,)
            losses[name] = self.box3d_weight * error / total
        # (n, 8, 3) -> (n,)
        distance = (predicted.corners_m().detach() - corners).abs().flatten(1).mean(1)
        certain = torch.exp(-distance / self.confidence_temperature_m)
        logits = component_of(chosen.confidence, labels).squeeze(-1)
        confidence = functional.binary_cross_entropy_with_logits(logits, certain, reduction="none")
        return losses | {"confidence": self.confidence_weight * (confidence * weights).sum() / total}

    def _attributes(
        self, chosen: FlatPredictions, assigned: Assignment, weights: Tensor, reduce_mean: ReduceMean
    ) -> dict[str, Tensor]:
        attributes, speeds = (x[assigned.positives] for x in (assigned.attributes, assigned.speeds))
        known = attributes < chosen.attributes.shape[1]
        moving = speeds.isfinite()
        sums = [reduce_mean(weights[mask].sum()).clamp_min(1e-6) for mask in (known, moving)]
        attribute, speed = chosen.attributes.sum() * 0.0, chosen.speed.sum() * 0.0
        if bool(known.any()):
            mean = functional.cross_entropy(chosen.attributes[known], attributes[known])
            attribute = (mean * weights[known]).sum() / sums[0]
        if bool(moving.any()):
            error = functional.smooth_l1_loss(
                chosen.speed[moving], speeds[moving].to(weights), reduction="none", beta=self.speed_beta
            )
            speed = (error * weights[moving]).sum() / sums[1]
        return {"attribute": self.attribute_weight * attribute, "speed": self.speed_weight * speed}


def _objects(targets: Sequence[ImageTargets], index: Tensor, like: CameraBoxes) -> CameraBoxes:
    """The true boxes of places."""
    fields = {
        name: torch.cat([getattr(t.boxes, name) for t in [*targets, no_targets(value)]])[index].to(value)
        for name, value in vars(like).items()
    }
    return CameraBoxes(**fields)


def single_precision_focal_loss(logits: Tensor, wanted: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss of every entry in float32, whatever the input, in the order of fvcore's operations.

    The published head calls fvcore's, which casts; ``focal_loss.sigmoid_focal_loss`` is the same function in
    the input's own precision, and rounds otherwise.

    Args:
        logits, wanted: (...), wanted 0 or 1.
        alpha, gamma: as in ``focal_loss.sigmoid_focal_loss``.

    Returns:
        (...) float32.
    """
    logits, wanted = logits.float(), wanted.float()
    p = logits.sigmoid()
    right = p * wanted + (1 - p) * (1 - wanted)
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    loss = cross_entropy * (1 - right) ** gamma
    return (alpha * wanted + (1 - alpha) * (1 - wanted)) * loss if alpha >= 0 else loss


def centreness_targets(box2d: Tensor) -> Tensor:
    """FCOS's centre-ness of places with these distances (n, 4) to their rectangle's sides: (n,)."""
    horizontal, vertical = box2d[:, [0, 2]], box2d[:, [1, 3]]
    ratio = (horizontal.amin(-1) / horizontal.amax(-1)) * (vertical.amin(-1) / vertical.amax(-1))
    return ratio.sqrt()


def iou_loss(predicted: Tensor, wanted: Tensor, kind: BoxLoss) -> Tensor:
    """IoU losses of rectangles around the same place (AdelaiDet's form, with 1 added to the areas).

    Args:
        predicted, wanted: (n, 4) distances to left, top, right, bottom.
        kind: 'iou' is -log IoU, 'linear_iou' 1 - IoU, 'giou' 1 - generalised IoU.

    Returns:
        (n,).
    """
    area = [(box[:, 0] + box[:, 2]) * (box[:, 1] + box[:, 3]) for box in (predicted, wanted)]
    least, most = torch.minimum(predicted, wanted), torch.maximum(predicted, wanted)
    intersection = (least[:, 0] + least[:, 2]) * (least[:, 1] + least[:, 3])
    hull = (most[:, 0] + most[:, 2]) * (most[:, 1] + most[:, 3])
    union = area[0] + area[1] - intersection
    iou = (intersection + 1.0) / (union + 1.0)
    if kind == "iou":
        return -iou.log()
    return 1 - iou if kind == "linear_iou" else 1 - (iou - (hull - union) / hull)
