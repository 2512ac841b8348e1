"""What the perspective head is to say: ground truth in every image, and which place answers for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bevperception.models.heads.perspective.camera import (
    CameraBoxes,
    Pinholes,
    boxes_to_camera,
    image_rectangles,
)
from bevperception.structures import Boxes3D

_FAR = 1e8


@dataclass(frozen=True)
class ImageTargets:
    """Ground truth of one image.

    Attributes:
        rectangles: (G, 4) x0, y0, x1, y1 in pixels.
        labels: (G,) classes.
        boxes: G boxes in the camera frame.
        attributes: (G,) index, or ``no_attribute`` of :class:`Assignment`'s maker.
        speeds: (G,) metres a second, NaN where unknown.
    """

    rectangles: Tensor
    labels: Tensor
    boxes: CameraBoxes
    attributes: Tensor
    speeds: Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])


def image_targets(
    boxes: Boxes3D,
    camera: Pinholes,
    image_size: tuple[int, int],
    no_attribute: int,
    min_side_px: float = 4.0,
    min_visible: float = 0.2,
    max_depth_m: float = 80.0,
) -> ImageTargets:
    """What one image shows of the ground truth.

    Args:
        boxes: of the whole scene, BEV frame.
        camera: one camera.
        image_size: (height, width) in pixels.
        no_attribute: stands for an unknown attribute.
        min_side_px: boxes whose rectangle is narrower or lower are left out,
        min_visible: as are those of whose rectangle a smaller share lies in the image,
        max_depth_m: and those that are farther away.
    """
    cameras = camera[torch.zeros(len(boxes), dtype=torch.long, device=camera.intrinsics.device)]
    seen, speeds = boxes_to_camera(boxes.values, cameras)
    rectangles, visible = image_rectangles(seen, cameras.intrinsics, image_size)
    sides = rectangles[:, 2:] - rectangles[:, :2]
    keep = (sides >= min_side_px).all(-1) & (visible >= min_visible)
    keep &= (seen.depth_m > 0.5) & (seen.depth_m <= max_depth_m)
    attributes = torch.full_like(boxes.labels, -1) if boxes.attributes is None else boxes.attributes
    attributes = torch.where(attributes < 0, no_attribute, attributes)
    kept = CameraBoxes(**{name: value[keep] for name, value in vars(seen).items()})
    return ImageTargets(rectangles[keep], boxes.labels[keep], kept, attributes[keep], speeds[keep])


def no_targets(like: Tensor) -> ImageTargets:
    """An image without ground truth, of a tensor's dtype and device."""
    whole = torch.zeros(0, dtype=torch.long, device=like.device)
    rows = like.new_zeros(0)
    boxes = CameraBoxes(rows.view(0, 3, 3), rows.view(0, 2), rows, rows.view(0, 3), rows.view(0, 3, 3))
    return ImageTargets(rows.view(0, 4), whole, boxes, whole, rows)


@dataclass(frozen=True)
class Assignment:
    """Which object every place answers for; P places ordered as in ``codec.FlatPredictions``.

    Attributes:
        labels: (P,) class, or the number of classes for background.
        box2d: (P, 4) distances to the rectangle's left, top, right, bottom.
        objects: (P,) position of the object among all images' objects; -1 in images without any.
        images: (P,) image.
        levels: (P,) level.
        places_px: (P, 2).
        attributes, speeds: (P,) of the object.
        positives: (n,) places that are not background.
    """

    labels: Tensor
    box2d: Tensor
    objects: Tensor
    images: Tensor
    levels: Tensor
    places_px: Tensor
    attributes: Tensor
    speeds: Tensor
    positives: Tensor


@dataclass(frozen=True)
class Assigner:
    """FCOS's assignment by level, with centre sampling.

    Attributes:
        classes: number of classes.
        strides: of the levels in pixels.
        sizes_of_interest_px: (low, high) of the levels: a place answers for rectangles whose farthest side
            is that far from it, both ends included.
        radius: only places this many strides around a rectangle's centre answer for it; None for all
            within it.
    """

    classes: int
    strides: tuple[int, ...]
    sizes_of_interest_px: tuple[tuple[float, float], ...]
    radius: float | None = 1.5

    def __call__(self, places: Sequence[Tensor], targets: Sequence[ImageTargets]) -> Assignment:
        """Assign.

        Args:
            places: per level (h * w, 2) pixels.
            targets: of M images.
        """
        counts = [len(level) for level in places]
        flat = torch.cat(list(places))
        level_of = torch.repeat_interleave(
            torch.arange(len(counts), device=flat.device), torch.tensor(counts, device=flat.device)
        )
        parts: list[dict[str, Tensor]] = []
        first, total = 0, len(targets) * len(flat)
        # Without any image the places of one give the fields' types; none of them is kept.
        for image, target in enumerate(targets or [no_targets(flat)]):
            labels, box2d, objects = self._assign(flat, level_of, target)
            attributes, speeds = torch.zeros_like(objects), box2d.new_zeros(len(flat))
            if len(target):
                attributes, speeds = target.attributes[objects], target.speeds.to(box2d)[objects]
                objects = objects + first
                first += len(target)
            parts.append(
                {
                    "labels": labels,
                    "box2d": box2d,
                    "objects": objects,
                    "images": torch.full_like(labels, image),
                    "levels": level_of,
                    "places_px": flat,
                    "attributes": attributes,
                    "speeds": speeds,
                }
            )
        # Level by level, in each image by image.
        joined = {
            name: torch.cat([p[name].split(counts)[level] for level in range(len(counts)) for p in parts])
            for name in parts[0]
        }
        joined = {name: value[:total] for name, value in joined.items()}
        return Assignment(**joined, positives=(joined["labels"] != self.classes).nonzero().squeeze(-1))

    def _assign(
        self, places: Tensor, level_of: Tensor, target: ImageTargets
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Labels (P,), distances (P, 4) and objects (P,) of one image."""
        labels = torch.full((len(places),), self.classes, device=places.device)
        if not len(target):
            return labels, places.new_zeros(len(places), 4), torch.full_like(labels, -1)
        rectangles = target.rectangles.to(places)
        low, high = places[:, None] - rectangles[None, :, :2], rectangles[None, :, 2:] - places[:, None]
        distances = torch.cat((low, high), dim=-1)
        inside = distances.amin(-1) > 0
        if self.radius is not None:
            reach = self.radius * places.new_tensor(self.strides)[level_of][:, None]
            centre = 0.5 * (rectangles[:, :2] + rectangles[:, 2:])
            inside &= ((places[:, None] - centre[None]).abs() < reach[..., None]).all(-1)
        limits = places.new_tensor(self.sizes_of_interest_px)[level_of]
        farthest = distances.amax(-1)
        interesting = (farthest >= limits[:, :1]) & (farthest <= limits[:, 1:])
        sides = rectangles[:, 2:] - rectangles[:, :2]
        area = torch.where(inside & interesting, sides.prod(-1)[None], _FAR)
        smallest, objects = area.min(dim=1)
        labels = torch.where(smallest == _FAR, labels, target.labels[objects])
        return labels, distances[torch.arange(len(places), device=places.device), objects], objects
