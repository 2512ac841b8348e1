"""Cameras, boxes and perfect predictions for tests of the perspective head."""

from __future__ import annotations

import torch
from torch import Tensor

from bevperception.geometry import planar_pose
from bevperception.models.heads.perspective.camera import (
    PinholeCameras,
    allocentric_frame,
    decompose_projection,
)
from bevperception.models.heads.perspective.codec import PerspectiveCodec
from bevperception.models.heads.perspective.targets import Assignment, ImageTargets
from bevperception.structures import Boxes3D, PerspectiveLevel
from tests.models.builders import camera_ring

SIZE = (128, 224)
STRIDES = (8, 16, 32)


def ring(cameras: int = 4) -> PinholeCameras:
    return decompose_projection(camera_ring(cameras, *SIZE))


def augmented(rotation: float, scale: float, mirror_x: bool, mirror_y: bool) -> Tensor:
    """(4, 4) BEV to augmented BEV, as data augmentation makes it."""
    signs = [-1.0 if mirror_x else 1.0, -1.0 if mirror_y else 1.0, 1.0]
    diagonal = torch.tensor([*(s * scale for s in signs), 1.0], dtype=torch.float64)
    return torch.diag(diagonal) @ planar_pose(0.0, 0.0, rotation)


def mirrored_image(bev_to_image: Tensor) -> Tensor:
    flip = torch.eye(4, dtype=torch.float64)
    flip[0, 0], flip[0, 2] = -1.0, float(SIZE[1])
    return flip @ bev_to_image


def some_boxes(count: int = 6, seed: int = 0) -> Boxes3D:
    """Boxes around the car at 6 to 30 m."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(count, 8, generator=generator, dtype=torch.float64)
    angle, distance = 6.28 * u[:, 0], 6 + 24 * u[:, 1]
    yaw, speed = 6.28 * u[:, 2] - 3.14, 5 * u[:, 3]
    values = torch.stack(
        (
            distance * angle.cos(),
            distance * angle.sin(),
            0.8 + 0.2 * u[:, 4],
            2 + 3 * u[:, 5],
            1 + u[:, 6],
            1 + u[:, 7],
            yaw,
            speed * yaw.cos(),
            speed * yaw.sin(),
        ),
        dim=-1,
    )
    labels = torch.randint(0, 10, (count,), generator=generator)
    return Boxes3D(values, labels, attributes=torch.zeros(count, dtype=torch.long))


def quaternion_of(rotation: Tensor) -> Tensor:
    """(n, 4) of (n, 3, 3), from the rotation's eigenvector: slow and by another way than any in use."""
    found = []
    for m in rotation:
        k = torch.zeros(4, 4, dtype=torch.float64)
        k[0, 0] = m.trace()
        k[0, 1:] = k[1:, 0] = torch.stack((m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]))
        k[1:, 1:] = m + m.T - m.trace() * torch.eye(3, dtype=torch.float64)
        found.append(torch.linalg.eigh(k / 3)[1][:, -1])
    return torch.stack(found)


def perfect_levels(
    assigned: Assignment,
    targets: list[ImageTargets],
    cameras: PinholeCameras,
    codec: PerspectiveCodec,
    classes: int,
) -> list[PerspectiveLevel]:
    """Raw predictions that decode to the assigned objects exactly, background elsewhere."""
    total = len(assigned.labels)
    flat = {
        "class_logits": torch.full((total, classes), -20.0).double(),
        "box2d": torch.zeros(total, 4).double(),
        "centreness": torch.full((total, 1), -20.0).double(),
        "quaternion": torch.ones(total, 4, classes).double(),
        "centre": torch.zeros(total, 2, classes).double(),
        "depth": torch.zeros(total, 1, classes).double(),
        "size": torch.zeros(total, 3, classes).double(),
        "confidence": torch.full((total, 1, classes), 20.0).double(),
        "attributes": torch.zeros(total, 3).double(),
        "speed": torch.zeros(total, 1).double(),
    }
    inverse = torch.linalg.inv(cameras.intrinsics)
    objects = {
        name: torch.cat([getattr(t.boxes, name) for t in targets])
        for name in ("rotation", "centre_px", "depth_m", "size_m")
    }
    speeds = torch.cat([t.speeds for t in targets])
    for place in assigned.positives.tolist():
        label, index = int(assigned.labels[place]), int(assigned.objects[place])
        camera = inverse[assigned.images[place]][None]
        centre = objects["centre_px"][index : index + 1]
        local = allocentric_frame(centre, camera)[0].T @ objects["rotation"][index]
        pixel = torch.stack((camera[0, 0, 0], camera[0, 1, 1])).norm()
        share = objects["size_m"][index] / codec.canonical_sizes_m[label]
        flat["class_logits"][place, label] = flat["centreness"][place] = 20.0
        flat["box2d"][place] = assigned.box2d[place]
        flat["quaternion"][place, :, label] = quaternion_of(local[None])[0]
        flat["centre"][place, :, label] = centre[0] - assigned.places_px[place]
        flat["depth"][place, 0, label] = objects["depth_m"][index] * pixel * codec.focal_factor
        flat["size"][place, :, label] = torch.atanh((share - 1).clamp(-0.999999, 0.999999))
        flat["speed"][place] = speeds[index]
    return _shaped(flat, assigned, len(cameras.intrinsics))


def _shaped(flat: dict[str, Tensor], assigned: Assignment, images: int) -> list[PerspectiveLevel]:
    levels = []
    for level, stride in enumerate(STRIDES):
        rows, columns = -(-SIZE[0] // stride), -(-SIZE[1] // stride)
        mine = assigned.levels == level
        maps = {
            name: value[mine].flatten(1).view(images, rows, columns, -1).permute(0, 3, 1, 2)
            for name, value in flat.items()
        }
        levels.append(PerspectiveLevel(**maps))
    return levels


def empty_levels(images: int, classes: int = 10) -> list[PerspectiveLevel]:
    """Levels of the right sizes, for their places."""
    channels = {
        "box2d": 4,
        "centreness": 1,
        "quaternion": 4,
        "centre": 2,
        "size": 3,
        "attributes": 3,
        "speed": 1,
    }
    result = []
    for stride in STRIDES:
        size = (-(-SIZE[0] // stride), -(-SIZE[1] // stride))
        names = PerspectiveLevel.__dataclass_fields__
        maps = {name: torch.zeros(images, channels.get(name, classes), *size).double() for name in names}
        result.append(PerspectiveLevel(**maps))
    return result
