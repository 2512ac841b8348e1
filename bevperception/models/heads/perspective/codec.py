"""From the perspective head's numbers to boxes in the camera frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bevperception.geometry import rotation_from_quaternion
from bevperception.models.heads.perspective.camera import CameraBoxes, allocentric_frame, unproject
from bevperception.structures import PerspectiveLevel

CANONICAL_SIZES_M = {
    "barrier": (2.3524184, 0.5062202, 1.0413622),
    "bicycle": (0.61416006, 1.7016163, 1.3054738),
    "bus": (2.9139307, 10.725025, 3.2832346),
    "car": (1.9751819, 4.641267, 1.74352),
    "construction_vehicle": (2.772134, 6.565072, 3.2474296),
    "motorcycle": (0.7800532, 2.138673, 1.4437162),
    "pedestrian": (0.6667362, 0.7181772, 1.7616143),
    "traffic_cone": (0.40246472, 0.4027083, 1.0084083),
    "trailer": (3.0059454, 12.8197, 4.1213827),
    "truck": (2.4986045, 6.9310856, 2.8382742),
}
"""Width, length, height of an average object (the published BEVFormer v2 configurations)."""

FOCAL_FACTOR = 500.0
"""Depths are learned as if seen by a camera whose pixels are this many times finer than a radian."""

_EPS = 1e-7


@dataclass(frozen=True)
class FlatPredictions:
    """Predictions of P places; the levels one after the other, in each image by image, row by row.

    Attributes:
        class_logits: (P, K).
        box2d: (P, 4).
        centreness: (P,).
        quaternion, centre, depth, size, confidence: (P, 4 | 2 | 1 | 3 | 1, K or 1).
        attributes: (P, attributes).
        speed: (P,).
    """

    class_logits: Tensor
    box2d: Tensor
    centreness: Tensor
    quaternion: Tensor
    centre: Tensor
    depth: Tensor
    size: Tensor
    confidence: Tensor
    attributes: Tensor
    speed: Tensor

    def __getitem__(self, index: Tensor | tuple[Tensor, ...]) -> FlatPredictions:
        return FlatPredictions(**{name: value[index] for name, value in vars(self).items()})


def flatten(levels: Sequence[PerspectiveLevel]) -> FlatPredictions:
    """All levels' predictions, see :class:`FlatPredictions`."""
    # levels of (M, h*w, c) -> (P, c)
    return _join(levels, lambda parts: torch.cat([part.flatten(0, 1) for part in parts]), 1)


def by_image(levels: Sequence[PerspectiveLevel]) -> FlatPredictions:
    """All levels' predictions image by image: (M, P, ...) with the levels one after the other."""
    return _join(levels, lambda parts: torch.cat(list(parts), dim=1), 2)


def _join(
    levels: Sequence[PerspectiveLevel], join: Callable[[Sequence[Tensor]], Tensor], dim: int
) -> FlatPredictions:
    def rows(name: str, components: int = 0) -> Tensor:
        # (M, c, h, w) -> (M, h*w, c), then all levels
        joined = join([getattr(level, name).permute(0, 2, 3, 1).flatten(1, 2) for level in levels])
        # (..., components*K) -> (..., components, K)
        return joined.unflatten(dim, (components, joined.shape[dim] // components)) if components else joined

    return FlatPredictions(
        class_logits=rows("class_logits"),
        box2d=rows("box2d"),
        centreness=rows("centreness").squeeze(dim),
        quaternion=rows("quaternion", 4),
        centre=rows("centre", 2),
        depth=rows("depth", 1),
        size=rows("size", 3),
        confidence=rows("confidence", 1),
        attributes=rows("attributes"),
        speed=rows("speed").squeeze(dim),
    )


@dataclass(frozen=True)
class PerspectiveCodec:
    """How the numbers of the 3D box are to be read (DD3D).

    Attributes:
        canonical_sizes_m: (K, 3) width, length, height by class.
        min_depth_m, max_depth_m: limits of the depth.
        focal_factor: depths are learned divided by ``focal_factor * |(1/fx, 1/fy)|``; None for metres.
        allocentric: rotations are relative to the ray through the centre.
        distance: depths are distances along the ray.
    """

    canonical_sizes_m: Tensor
    min_depth_m: float = 0.1
    max_depth_m: float = 80.0
    focal_factor: float | None = FOCAL_FACTOR
    allocentric: bool = True
    distance: bool = False

    def boxes(
        self, predicted: FlatPredictions, labels: Tensor, places_px: Tensor, inverse_intrinsics: Tensor
    ) -> CameraBoxes:
        """Boxes of P places, each of one class.

        Args:
            predicted: of the places.
            labels: (P,) class of each.
            places_px: (P, 2) pixel that each place stands for.
            inverse_intrinsics: (P, 3, 3) of its camera.
        """
        quaternion, centre, depth, size = (
            component_of(part, labels)
            for part in (predicted.quaternion, predicted.centre, predicted.depth, predicted.size)
        )
        depth = self._metres(depth.squeeze(-1), places_px, inverse_intrinsics)
        centre = centre + places_px
        length = quaternion.norm(dim=1, keepdim=True)
        # Zeros, as an untrained head predicts from empty features, are no rotation.
        still = quaternion.new_tensor([1.0, 0.0, 0.0, 0.0])
        quaternion = torch.where(length > 0.0, quaternion / length.clamp_min(_EPS), still)
        rotation = rotation_from_quaternion(quaternion)
        if self.allocentric:
            rotation = allocentric_frame(centre, inverse_intrinsics) @ rotation
        size = (size.tanh() + 1) * self.canonical_sizes_m.to(size)[labels]
        return CameraBoxes(rotation, centre, depth, size, inverse_intrinsics)

    def _metres(self, depth: Tensor, places_px: Tensor, inverse_intrinsics: Tensor) -> Tensor:
        if self.focal_factor is not None:
            pixel = torch.stack((inverse_intrinsics[:, 0, 0], inverse_intrinsics[:, 1, 1]), dim=-1).norm(
                dim=-1
            )
            depth = depth / (pixel * self.focal_factor)
        if self.distance:
            depth = depth / unproject(places_px, inverse_intrinsics).norm(dim=1).clamp_min(_EPS)
        return depth.clamp(self.min_depth_m, self.max_depth_m)


def component_of(predicted: Tensor, labels: Tensor) -> Tensor:
    """(P, c, K) predictions of each place's own class (P,), or of all classes' one box: (P, c)."""
    if predicted.shape[2] == 1:
        return predicted.squeeze(2)
    index = labels[:, None, None].expand(-1, predicted.shape[1], 1)
    return predicted.gather(2, index).squeeze(2)  # (P, c, K) -> (P, c)
