"""Pixels and calibration move together: checked on images whose colours say where they come from."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bevperception.config import AugmentationConfig, DataConfig
from bevperception.data.image_input import ImageInput, published_image
from bevperception.data.transforms import AugmentationDraw, BEVDraw, Colour, ImageDraw, ImageFit
from bevperception.errors import ConfigError
from bevperception.geometry import box_corners, project_points, transform_boxes, transform_points

SOURCE = (200, 120)


def coordinate_image() -> np.ndarray:
    """(height, width, 3) BGR: blue is u, green is v in continuous coordinates (pixel i covers [i, i + 1))."""
    u = np.arange(SOURCE[0])[None, :] + 0.5 + np.zeros((SOURCE[1], 1))
    v = np.arange(SOURCE[1])[:, None] + 0.5 + np.zeros((1, SOURCE[0]))
    return np.stack((u, v, np.full_like(u, 255.0)), -1).round().astype(np.uint8)


def plain_config(size: tuple[int, int], **settings: Any) -> DataConfig:
    return DataConfig(image_size=size, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0), **settings)


def origin_of_pixels(out: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pixel of the input came from: by its colour, and by the inverse matrix. Padding left out."""
    height, width = out.shape[1:]
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack((u, v, torch.ones_like(u)), -1).double()
    by_matrix = pixels @ torch.linalg.inv(matrix)[:3, :3].T
    # Red is 255 over the whole image and 0 in the padding; borders are left to the interpolation.
    inside = (out[0] > 254.5) & (by_matrix[..., 0] > 2) & (by_matrix[..., 0] < SOURCE[0] - 2)
    inside &= (by_matrix[..., 1] > 2) & (by_matrix[..., 1] < SOURCE[1] - 2)
    by_colour = torch.stack((out[2], out[1]), -1).double()
    return by_colour[inside], by_matrix[inside][:, :2]


@settings(max_examples=60, deadline=None)
@given(
    resize=st.floats(0.5, 1.7),
    left=st.floats(0, 1),
    top=st.floats(0, 1),
    flip=st.booleans(),
    size=st.tuples(st.integers(30, 140), st.integers(40, 220)),
)
def test_pixels_follow_the_matrix(
    resize: float, left: float, top: float, flip: bool, size: tuple[int, int]
) -> None:
    image_input = ImageInput(plain_config(size))
    fit = image_input.plan(SOURCE, ImageDraw(resize, left, top, flip))
    out = torch.zeros((3, *size))
    image_input.write(coordinate_image(), fit, out)
    by_colour, by_matrix = origin_of_pixels(out, fit.matrix())
    assert len(by_colour) > 100
    difference = by_colour - by_matrix
    assert float(difference.abs().max()) < 1.1
    # Half a pixel of the wrong convention would show in the mean. Colours are whole numbers, which biases
    # it by up to half of one where every row meets the same fraction, as at twice the distance of pixels.
    assert float(difference.mean(0).abs().max()) < 0.4


@pytest.mark.parametrize("reduction", [2, 4])
def test_reduced_decoding_keeps_the_geometry(reduction: int) -> None:
    image_input = ImageInput(plain_config((26, 44)))
    fit = image_input.plan(SOURCE)
    assert image_input.reduction(fit) == 4
    reduced = cv2.resize(
        coordinate_image(), (SOURCE[0] // reduction, SOURCE[1] // reduction), interpolation=cv2.INTER_AREA
    )
    out = torch.zeros((3, 26, 44))
    image_input.write(reduced, fit, out)
    by_colour, by_matrix = origin_of_pixels(out, fit.matrix())
    assert float((by_colour - by_matrix).abs().max()) < 1.5
    assert float((by_colour - by_matrix).mean(0).abs().max()) < 0.2


def test_fit_keeps_the_bottom_and_pads_below() -> None:
    tall = ImageFit.plan((1600, 900), (800, 448), ImageDraw())
    assert (tall.resized, tall.left, tall.top) == ((800, 450), 0, 2)
    assert tall.matrix()[:2, :3].tolist() == [[0.5, 0.0, 0.0], [0.0, 0.5, -2.0]]
    short = ImageFit.plan((1600, 900), (800, 480), ImageDraw())
    assert (short.resized, short.left, short.top) == ((800, 450), 0, 0)
    out = torch.zeros((3, 480, 800))
    image_input = ImageInput(plain_config((480, 800)))
    image_input.write(np.full((450, 800, 3), 200, np.uint8), image_input.plan((1600, 900)), out)
    assert bool((out[:, :450] == 200).all())
    assert bool((out[:, 450:] == 0).all())


def test_flip_mirrors_pixels_and_projection() -> None:
    size = (120, 200)
    image_input = ImageInput(plain_config(size))
    plain, mirrored = torch.zeros((3, *size)), torch.zeros((3, *size))
    image_input.write(coordinate_image(), image_input.plan(SOURCE), plain)
    flip = image_input.plan(SOURCE, ImageDraw(flip=True))
    image_input.write(coordinate_image(), flip, mirrored)
    assert torch.equal(mirrored, plain.flip(-1))
    assert flip.matrix()[0].tolist() == [-1.0, 0.0, 200.0, 0.0]


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_normalisation(order: Any) -> None:
    config = DataConfig(image_size=(4, 4), channel_order=order)
    image_input = ImageInput(config)
    image = np.zeros((4, 4, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = 10, 20, 30  # B, G, R
    out = torch.zeros((3, 4, 4))
    image_input.write(image, image_input.plan((4, 4)), out)
    rgb = [(v - m) / s for v, m, s in zip((30, 20, 10), config.image_mean, config.image_std, strict=True)]
    expected = rgb if order == "rgb" else rgb[::-1]
    torch.testing.assert_close(out[:, 1, 2], torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_published_transform_equals_the_fast_one_where_both_are_exact() -> None:
    # Halving 64 x 128 pixels exactly, and no rounding: the two orders of the same linear steps agree.
    rng = np.random.default_rng(0)
    image = np.repeat(np.repeat(rng.integers(0, 256, (32, 64, 3), dtype=np.uint8), 2, axis=0), 2, axis=1)
    outs = []
    for transform in ("fast", "published"):
        image_input = ImageInput(DataConfig(image_size=(32, 64), image_transform=transform))  # type: ignore[arg-type]
        fit = image_input.plan((128, 64))
        out = torch.zeros((3, 32, 64))
        image_input.write(image, fit, out)
        outs.append(out)
        assert fit.matrix().diagonal().tolist() == [0.5, 0.5, 1.0, 1.0]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)


def test_published_transform_rounds_sizes_down_but_scales_by_the_nominal_factor() -> None:
    """101 x 67 pixels by 0.3 are 30.3 x 20.1: they fill 30 x 20, the matrix holds 0.3, padding the rest."""
    image = np.full((67, 101, 3), 200, dtype=np.uint8)
    padded, matrix = published_image(image, np.full(3, 150.0), np.full(3, 2.0), True, 0.3)
    assert padded.shape == (32, 32, 3)
    assert matrix.tolist() == [[0.3, 0, 0, 0], [0, 0.3, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    inside = np.zeros((32, 32), dtype=bool)
    inside[:20, :30] = True
    assert (padded[inside] == 25.0).all()
    assert (padded[~inside] == 0.0).all()
    # 0.7 of 41 x 94 is 28.7 x 65.8: pixels fill 28 x 65, the rest of 32 x 96 is padding.
    padded, _ = published_image(image[:41, :94], np.zeros(3), np.ones(3), False, 0.7)
    assert padded.shape == (32, 96, 3)
    assert (padded[:28, :65] > 0).all()
    assert padded[28:].sum() == padded[:, 65:].sum() == 0


def test_published_transform_says_what_size_it_makes() -> None:
    image_input = ImageInput(DataConfig(image_size=(450, 800), image_transform="published"))
    with pytest.raises(ConfigError, match=r"480x800 .*\nset data.image_size to \[480, 800\]"):
        image_input.plan((1600, 900))
    good = ImageInput(DataConfig(image_size=(480, 800), image_transform="published"))
    assert good.reduction(good.plan((1600, 900))) == 1
    with pytest.raises(ConfigError, match="no resize, crop or flip"):
        good.plan((1600, 900), ImageDraw(flip=True))


def test_colour_jitter() -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(60, 180, (5, 6, 3), dtype=np.uint8)
    assert Colour().apply(image) is image
    np.testing.assert_allclose(Colour(brightness=1.2).apply(image), image * 1.2, atol=0.51)
    np.testing.assert_allclose(Colour(contrast=0.5).apply(image), (image - 127.5) * 0.5 + 127.5, atol=0.51)
    grey = Colour(saturation=0.0).apply(image)
    np.testing.assert_allclose(grey, image @ np.array([0.114, 0.587, 0.299])[:, None] * np.ones(3), atol=0.51)
    assert Colour(brightness=3.0).apply(image).max() == 255, "clipped, not wrapped"


@settings(max_examples=50, deadline=None)
@given(
    rotation=st.floats(-math.pi, math.pi),
    scale=st.floats(0.8, 1.25),
    flip_x=st.booleans(),
    flip_y=st.booleans(),
)
def test_augmented_labels_project_to_the_same_pixels(
    rotation: float, scale: float, flip_x: bool, flip_y: bool
) -> None:
    generator = torch.Generator().manual_seed(7)
    matrix = BEVDraw(rotation, scale, flip_x, flip_y).matrix()
    bev_to_image = torch.randn((4, 4), generator=generator, dtype=torch.float64)
    bev_to_image[2] = torch.tensor([0.1, 0.2, 0.05, 60.0])  # in front of the camera
    boxes = torch.randn((6, 9), generator=generator, dtype=torch.float64) * 5
    boxes[:, 3:6] = boxes[:, 3:6].abs() + 0.5
    moved = transform_boxes(boxes, matrix)
    moved_to_image = bev_to_image @ torch.linalg.inv(matrix)
    pixels, depth = project_points(boxes[:, :3], bev_to_image)
    moved_pixels, moved_depth = project_points(moved[:, :3], moved_to_image)
    torch.testing.assert_close(moved_pixels, pixels)
    torch.testing.assert_close(moved_depth, depth)
    # The box's corners are the same points too, if in another order where the frame is mirrored.
    corners, _ = project_points(box_corners(boxes), bev_to_image)
    moved_corners, _ = project_points(box_corners(moved), moved_to_image)
    torch.testing.assert_close(moved_corners.sort(dim=1).values, corners.sort(dim=1).values)
    # Velocity turns with the frame: a step along it is the step of the moved box.
    later = transform_points(boxes[:, :3] + torch.nn.functional.pad(boxes[:, 7:9], (0, 1)), matrix)
    torch.testing.assert_close(later, moved[:, :3] + torch.nn.functional.pad(moved[:, 7:9], (0, 1)))


def test_draws_stay_in_their_ranges_and_are_reproducible() -> None:
    config = AugmentationConfig(
        resize=(0.9, 1.2),
        crop=0.5,
        image_flip=0.5,
        colour=0.3,
        bev_rotation_deg=20.0,
        bev_scale=(0.95, 1.05),
        bev_flip_x=0.5,
        bev_flip_y=0.5,
    )
    draws = [AugmentationDraw.random(config, 6, np.random.default_rng((0, i, 1))) for i in range(300)]
    assert draws[3] == AugmentationDraw.random(config, 6, np.random.default_rng((0, 3, 1)))
    assert draws[3] != draws[4]
    images, bevs = [d.image for d in draws], [d.bev for d in draws]
    assert 0.9 <= min(i.resize for i in images) < 0.93
    assert 1.17 < max(i.resize for i in images) <= 1.2
    assert 0.25 <= min(i.crop_left for i in images) < 0.3
    assert 0.5 <= min(i.crop_top for i in images) < 0.55
    assert max(i.crop_top for i in images) <= 1.0
    limit = math.radians(20)
    assert 0.9 * limit < max(abs(b.rotation_rad) for b in bevs) <= limit
    for flips in ([i.flip for i in images], [b.flip_x for b in bevs], [b.flip_y for b in bevs]):
        assert 100 < sum(flips) < 200
    # Independent draws: each of the eight combinations comes in an eighth of the samples, 37 of 300.
    counts = Counter((i.flip, b.flip_x, b.flip_y) for i, b in zip(images, bevs, strict=True))
    assert len(counts) == 8
    assert min(counts.values()) > 18
    assert all(len(d.colours) == 6 for d in draws)
    values = [c.saturation for d in draws for c in d.colours]
    assert 0.7 <= min(values) < 0.72
    assert 1.28 < max(values) <= 1.3


def test_no_augmentation_draws_the_plain_transform() -> None:
    drawn = AugmentationDraw.random(AugmentationConfig(), 2, np.random.default_rng(0))
    assert drawn == AugmentationDraw.plain(2)
    assert torch.equal(drawn.bev.matrix(), torch.eye(4, dtype=torch.float64))
