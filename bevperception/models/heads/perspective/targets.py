"""Ground truth of the perspective head in every image, and its assignment to places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bevperception.models.heads.perspective.camera import (
    CameraBoxes,
    PinholeCameras,
    boxes_to_camera,
    image_rectangles,
)
from bevperception.models.padding import pad_rows
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
    boxes: Sequence[Boxes3D],
    cameras: PinholeCameras,
    image_size: tuple[int, int],
    no_attribute: int,
    min_side_px: float = 4.0,
    min_visible: float = 0.2,
    max_depth_m: float = 80.0,
) -> list[ImageTargets]:
    """Project ground truth into images, all at once.

    Args:
        boxes: M sets, what is around each image's vehicle, BEV frame.
        cameras: M cameras, one an image.
        image_size: (height, width) in pixels.
        no_attribute: stands for an unknown attribute.
        min_side_px: boxes whose rectangle is narrower or lower are left out,
        min_visible: as are those of whose rectangle a smaller share lies in the image,
        max_depth_m: and those that are farther away.

    Returns:
        M targets.
    """
    if not boxes:
        return []
    counts = torch.tensor([len(b) for b in boxes])
    device = cameras.intrinsics.device
    image = torch.arange(len(boxes)).repeat_interleave(counts).to(device)
    labels = torch.cat([b.labels for b in boxes])
    in_camera, speeds = boxes_to_camera(torch.cat([b.values for b in boxes]), cameras[image])
    rectangles, visible = image_rectangles(in_camera, cameras.intrinsics[image], image_size)
    sides = rectangles[:, 2:] - rectangles[:, :2]
    keep = (sides >= min_side_px).all(-1) & (visible >= min_visible)
    keep &= (in_camera.depth_m > 0.5) & (in_camera.depth_m <= max_depth_m)
    kept = keep.nonzero().squeeze(-1)
    attributes = torch.cat(
        [torch.full_like(b.labels, -1) if b.attributes is None else b.attributes for b in boxes]
    )
    attributes = torch.where(attributes < 0, no_attribute, attributes)
    sizes = torch.bincount(image[kept], minlength=len(boxes)).tolist()

    def by_image(value: Tensor) -> list[Tensor]:
        return list(value[kept].split(sizes))

    parts = {name: by_image(value) for name, value in vars(in_camera).items()}
    shown = [
        CameraBoxes(**dict(zip(parts, values, strict=True))) for values in zip(*parts.values(), strict=True)
    ]
    columns = (by_image(rectangles), by_image(labels), shown, by_image(attributes), by_image(speeds))
    return [ImageTargets(*fields) for fields in zip(*columns, strict=True)]


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
        levels = torch.arange(len(counts), device=flat.device).repeat_interleave(
            torch.tensor(counts, device=flat.device), output_size=len(flat)
        )
        sizes = [len(target) for target in targets]
        shape = (len(targets), len(flat))
        objects = torch.full(shape, -1, device=flat.device)
        fields = {
            "labels": torch.full_like(objects, self.classes),
            "box2d": flat.new_zeros(*shape, 4),
            "attributes": torch.zeros_like(objects),
            "speeds": flat.new_zeros(shape),
        }
        if any(sizes):
            # Images without ground truth keep what is written above.
            some = torch.tensor([bool(size) for size in sizes], device=flat.device)[:, None]
            assigned, first = self._assign(flat, levels, targets), torch.tensor([0, *sizes[:-1]]).cumsum(0)
            objects = torch.where(some, assigned.pop("objects") + first.to(flat.device)[:, None], objects)
            fields = {
                name: torch.where(some[..., None] if value.dim() == 3 else some, assigned[name], value)
                for name, value in fields.items()
            }
        fields |= {
            "objects": objects,
            "images": torch.arange(len(targets), device=flat.device)[:, None].expand(shape),
            "levels": levels.expand(shape),
            "places_px": flat.expand(*shape, 2),
        }
        # Level by level, in each image by image.
        joined = {
            # (M, P, ...) -> levels of (M, p, ...) -> (M*P, ...)
            name: torch.cat([part.flatten(0, 1) for part in value.split(counts, dim=1)])
            for name, value in fields.items()
        }
        return Assignment(**joined, positives=(joined["labels"] != self.classes).nonzero().squeeze(-1))

    def _assign(self, places: Tensor, level_of: Tensor, targets: Sequence[ImageTargets]) -> dict[str, Tensor]:
        """Fields of all M images' places, (M, P, ...), the objects counted within each image."""

        counts = [len(target) for target in targets]

        def padded(parts: Sequence[Tensor]) -> Tensor:
            return pad_rows(torch.cat(list(parts)), counts)

        rectangles = padded([t.rectangles for t in targets]).to(places)
        low = places[None, :, None] - rectangles[:, None, :, :2]
        distances = torch.cat((low, rectangles[:, None, :, 2:] - places[None, :, None]), dim=-1)
        # The padding's rectangles are points, within which nothing lies.
        inside = distances.amin(-1) > 0
        if self.radius is not None:
            reach = self.radius * places.new_tensor(self.strides)[level_of]
            centre = 0.5 * (rectangles[..., :2] + rectangles[..., 2:])
            apart = (places[None, :, None] - centre[:, None]).abs()
            inside &= (apart < reach[None, :, None, None]).all(-1)
        limits = places.new_tensor(self.sizes_of_interest_px)[level_of]
        farthest = distances.amax(-1)
        interesting = (farthest >= limits[:, :1]) & (farthest <= limits[:, 1:])
        area = (rectangles[..., 2:] - rectangles[..., :2]).prod(-1)[:, None]
        smallest, objects = torch.where(inside & interesting, area, _FAR).min(dim=-1)

        def of_object(parts: Sequence[Tensor]) -> Tensor:
            return padded(parts).gather(1, objects)  # (M, G) -> (M, P)

        labels = of_object([t.labels for t in targets])
        return {
            "labels": torch.where(smallest == _FAR, self.classes, labels),
            # (M, P, G, 4) -> (M, P, 4)
            "box2d": distances.gather(2, objects[..., None, None].expand(-1, -1, 1, 4)).squeeze(2),
            "objects": objects,
            "attributes": of_object([t.attributes for t in targets]),
            "speeds": of_object([t.speeds for t in targets]).to(places),
        }
