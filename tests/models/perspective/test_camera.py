"""Cameras and boxes between BEV and image, under every augmentation."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bevperception.geometry import box_corners, project_points, transform_boxes, transform_points
from bevperception.models.heads.perspective.camera import (
    PinholeCameras,
    allocentric_frame,
    boxes_to_bev,
    boxes_to_camera,
    decompose_projection,
    image_rectangles,
)
from tests.models.builders import camera_ring
from tests.models.perspective.scenes import SIZE, augmented, mirrored_image, ring, some_boxes

angles = st.floats(-math.pi, math.pi)


def one_each(cameras: PinholeCameras, index: int, count: int) -> PinholeCameras:
    return cameras[torch.full((count,), index)]


def test_a_projection_is_taken_apart() -> None:
    matrices = camera_ring(5, *SIZE)
    cameras = decompose_projection(matrices.float())
    expected = torch.tensor([[0.6 * SIZE[1], 0, SIZE[1] / 2], [0, 0.6 * SIZE[1], SIZE[0] / 2], [0, 0, 1]])
    torch.testing.assert_close(cameras.intrinsics, expected.double().expand(5, 3, 3), rtol=1e-5, atol=1e-4)
    again = cameras.intrinsics @ cameras.bev_to_camera[:, :3]
    torch.testing.assert_close(again, matrices[:, :3], rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(cameras.scale, torch.ones(5).double(), rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(
    rotation=angles,
    scale=st.floats(0.7, 1.4),
    mirror_x=st.booleans(),
    mirror_y=st.booleans(),
    flip=st.booleans(),
)
def test_boxes_survive_the_way_there_and_back_under_augmentation(
    rotation: float, scale: float, mirror_x: bool, mirror_y: bool, flip: bool
) -> None:
    bev_to_augmented = augmented(rotation, scale, mirror_x, mirror_y)
    matrices = camera_ring(3, *SIZE) @ torch.linalg.inv(bev_to_augmented)
    cameras = one_each(decompose_projection(mirrored_image(matrices) if flip else matrices), 1, 6)
    plain = some_boxes(6)
    boxes = transform_boxes(plain.values, bev_to_augmented)
    seen, speed = boxes_to_camera(boxes, cameras)
    torch.testing.assert_close(torch.linalg.det(seen.rotation), torch.ones(6).double())
    # What the image shows does not depend on the BEV's augmentation: size, speed and depth are the scene's.
    unaugmented, _ = boxes_to_camera(plain.values, one_each(ring(3), 1, 6))
    torch.testing.assert_close(seen.size_m, plain.values[:, [4, 3, 5]])
    torch.testing.assert_close(seen.depth_m, unaugmented.depth_m)
    torch.testing.assert_close(speed, plain.values[:, 7:9].norm(dim=-1))
    columns = SIZE[1] - unaugmented.centre_px[:, 0] if flip else unaugmented.centre_px[:, 0]
    torch.testing.assert_close(seen.centre_px[:, 0], columns)
    back = boxes_to_bev(seen, speed, cameras)
    difference = back - boxes
    difference[:, 6] = torch.remainder(difference[:, 6] + math.pi, 2 * math.pi) - math.pi
    assert difference.abs().max() < 1e-8


def test_corners_are_those_of_the_bev_box() -> None:
    boxes = some_boxes(8)
    cameras = one_each(ring(), 2, 8)
    seen, _ = boxes_to_camera(boxes.values, cameras)
    expected = transform_points(box_corners(boxes.values), cameras.bev_to_camera)
    distances = torch.cdist(seen.corners_m(), expected)
    assert distances.amin(2).max() < 1e-9
    assert distances.amin(1).max() < 1e-9


def test_the_allocentric_frame_looks_along_the_ray() -> None:
    cameras = ring(1)
    pixels = torch.tensor([[10.0, 20.0], [112.0, 64.0], [200.0, 90.0]], dtype=torch.float64)
    inverse = torch.linalg.inv(cameras.intrinsics).expand(3, 3, 3)
    frames = allocentric_frame(pixels, inverse)
    torch.testing.assert_close(frames @ frames.transpose(1, 2), torch.eye(3).double().expand(3, 3, 3))
    projected = frames[:, :, 2] @ cameras.intrinsics[0].T
    torch.testing.assert_close(projected[:, :2] / projected[:, 2:], pixels)
    torch.testing.assert_close(frames[1], torch.eye(3).double())


def test_rectangles_against_many_points_on_the_faces() -> None:
    boxes = some_boxes(40, seed=3).values
    boxes[:4, :2] *= 0.12  # some straddle the camera's plane
    matrices = camera_ring(4, *SIZE)
    cameras = decompose_projection(matrices)
    steps = torch.linspace(-0.5, 0.5, 41, dtype=torch.float64)
    u, v = (g.flatten() for g in torch.meshgrid(steps, steps, indexing="ij"))
    half = torch.full_like(u, 0.5)
    faces = torch.cat(
        [torch.stack(p, -1).roll(k, 1) for k in range(3) for p in ((half, u, v), (-half, u, v))]
    )
    for index in range(4):
        group = one_each(cameras, index, len(boxes))
        seen, _ = boxes_to_camera(boxes, group)
        rectangles, visible = image_rectangles(seen, group.intrinsics, SIZE)
        for box, rectangle, share in zip(boxes, rectangles, visible, strict=True):
            c, s = box[6].cos(), box[6].sin()
            local = faces * box[3:6]
            points = torch.stack(
                (local[:, 0] * c - local[:, 1] * s, local[:, 0] * s + local[:, 1] * c, local[:, 2]), -1
            )
            pixels, depth = project_points(points + box[:3], matrices[index])
            pixels = pixels[depth > 0.1]
            if not len(pixels):
                assert share == 0
                continue
            low, high = pixels.amin(0), pixels.amax(0)
            limits = torch.tensor([SIZE[1], SIZE[0]]).double()
            expected = torch.cat((low.clamp_min(0).minimum(limits), high.clamp_min(0).minimum(limits)))
            # Points are 1/40 of a side apart, and near the camera's plane pixels run away.
            near = bool((depth < 0.3).any())
            assert (rectangle - expected).abs().max() < (60 if near else 1.0)
            if not near:
                part = (expected[2:] - expected[:2]).prod() / (high - low).prod()
                torch.testing.assert_close(share, part, rtol=0, atol=0.02)
