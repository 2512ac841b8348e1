"""Boxes drawn into camera images: exact clipping, nothing outside the box, nothing from behind."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bevperception.geometry import box_corners, project_points
from bevperception.structures import Boxes3D
from bevperception.taxonomy import CAMERA_NAMES, DETECTION_CLASSES
from bevperception.visualization.cameras import (
    BOX_EDGES,
    CAMERA_ROWS,
    NEAR_M,
    camera_grid,
    clip_polygon,
    clip_segments,
    draw_boxes,
)
from bevperception.visualization.palette import DETECTION_COLOURS

WIDTH, HEIGHT = 320, 180
FOCAL = 200.0


def forward_camera() -> torch.Tensor:
    """Ego frame to the pixels of a camera at the ego origin that looks along ego x."""
    ego_to_camera = torch.tensor(
        [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64
    )
    intrinsics = torch.eye(4, dtype=torch.float64)
    intrinsics[0, 0] = intrinsics[1, 1] = FOCAL
    intrinsics[0, 2], intrinsics[1, 2] = WIDTH / 2, HEIGHT / 2
    return intrinsics @ ego_to_camera


def box(
    x: float, y: float, z: float = 0.0, yaw: float = 0.3, name: str = "car", score: float | None = None
) -> Boxes3D:
    values = torch.tensor([[x, y, z, 4.0, 2.0, 1.5, yaw, 0.0, 0.0]], dtype=torch.float64)
    scores = None if score is None else torch.tensor([score])
    return Boxes3D(values, torch.tensor([DETECTION_CLASSES.index(name)]), scores)


def blank(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    return np.zeros((height, width, 3), dtype=np.uint8)


def test_box_in_front_changes_pixels_inside_its_hull_and_none_outside() -> None:
    image = blank()
    boxes = box(15.0, 1.0)
    draw_boxes(image, boxes, forward_camera(), thickness_px=2)
    pixels, _ = project_points(box_corners(boxes.values), forward_camera())
    hull = cv2.convexHull(pixels[0].numpy().astype(np.float32))
    allowed = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.fillConvexPoly(allowed, np.rint(hull).astype(np.int32), 1)
    allowed = cv2.dilate(allowed, np.ones((7, 7), np.uint8))
    changed = image.any(axis=-1)
    assert changed.sum() > 50
    assert not (changed & (allowed == 0)).any()


def test_lines_have_the_colour_of_the_class() -> None:
    for name, colour in DETECTION_COLOURS.items():
        image = blank()
        draw_boxes(image, box(8.0, 0.0, name=name), forward_camera(), thickness_px=3)
        assert (image == np.array(colour)).all(axis=-1).any(), name


def test_front_face_is_filled_and_back_face_is_not() -> None:
    # Seen from the side: the box heads to ego left, which is the image's left.
    image = blank()
    boxes = box(10.0, 0.0, yaw=np.pi / 2)
    draw_boxes(image, boxes, forward_camera(), thickness_px=1)
    pixels, _ = project_points(box_corners(boxes.values), forward_camera())
    front = pixels[0, [0, 3, 7, 4]].mean(dim=0)
    back = pixels[0, [1, 2, 6, 5]].mean(dim=0)
    assert image[round(front[1].item()), round(front[0].item())].any()
    assert not image[round(back[1].item()), round(back[0].item())].any()


@pytest.mark.parametrize(
    "boxes",
    [
        box(-15.0, 0.0),
        box(10.0, 80.0),
        box(0.0, 0.0, z=-40.0),
        Boxes3D(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64)),
        box(float("nan"), 0.0),
        box(float("inf"), 0.0),
    ],
    ids=["behind", "beside", "below", "none", "nan", "infinite"],
)
def test_what_the_camera_does_not_see_draws_nothing(boxes: Boxes3D) -> None:
    image = blank()
    draw_boxes(image, boxes, forward_camera())
    assert not image.any()


def test_box_around_the_camera_draws_finite_lines() -> None:
    image = blank()
    draw_boxes(image, box(0.5, 0.2, yaw=0.1), forward_camera())
    assert image.any()
    assert not image.all()


def test_nearer_box_is_drawn_over_the_farther_one() -> None:
    near, far = box(8.0, 0.0, yaw=0.0, name="car"), box(30.0, 0.0, yaw=0.0, name="bus")
    for order in ((0, 1), (1, 0)):
        values = torch.cat([near.values, far.values])[list(order)]
        labels = torch.cat([near.labels, far.labels])[list(order)]
        image = blank()
        draw_boxes(image, Boxes3D(values, labels), forward_camera(), thickness_px=5)
        if order == (0, 1):
            first = image
    assert (first == image).all()


def test_score_is_written_only_if_there_is_one_and_it_is_wanted() -> None:
    pictures = []
    for score, show in ((None, True), (0.5, False), (0.5, True)):
        image = blank()
        draw_boxes(image, box(8.0, 0.0, score=score), forward_camera(), show_scores=show)
        pictures.append(image)
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


coordinate = st.floats(-60.0, 60.0)


@settings(max_examples=60, deadline=None)
@given(
    a=st.tuples(coordinate, coordinate, coordinate),
    b=st.tuples(coordinate, coordinate, coordinate),
)
def test_clipped_segment_is_what_a_dense_walk_along_it_sees(
    a: tuple[float, ...], b: tuple[float, ...]
) -> None:
    matrix = forward_camera()[:3, :3].numpy()
    start, end = matrix @ np.array(a), matrix @ np.array(b)
    margin = 5.0
    segment, seen = clip_segments(start, end, WIDTH, HEIGHT, margin)
    assert np.isfinite(segment).all()
    walk = start + np.linspace(0, 1, 4001)[:, None] * (end - start)
    inside = walk[:, 2] >= NEAR_M
    pixels = walk[:, :2] / np.where(inside, walk[:, 2], 1.0)[:, None]
    low, high = np.array([-margin, -margin]), np.array([WIDTH - 1 + margin, HEIGHT - 1 + margin])
    inside &= ((pixels >= low) & (pixels <= high)).all(axis=-1)
    if inside.any():
        assert seen
        spread = np.ptp(pixels[inside], axis=0)
        # the exact segment covers the walk and stays inside the enlarged image
        assert (np.ptp(segment, axis=0) >= spread - 1e-6).all()
    if seen:
        assert (segment >= low - 1e-6).all()
        assert (segment <= high + 1e-6).all()
        if np.linalg.norm(segment[1] - segment[0]) > 1.0:
            t = _parameter_on(start, end, segment.mean(axis=0))
            middle = start + t * (end - start)
            np.testing.assert_allclose(middle[:2] / middle[2], segment.mean(axis=0), atol=1e-5)


def _parameter_on(start: np.ndarray, end: np.ndarray, pixel: np.ndarray) -> float:
    """Where along start..end the pixel lies: least squares of (p - pixel * depth) = 0."""
    offset = start[:2] - pixel * start[2]
    slope = (end - start)[:2] - pixel * (end - start)[2]
    return float(-(offset @ slope) / (slope @ slope))


def test_polygon_that_surrounds_the_image_is_clipped_to_it() -> None:
    corners = np.array([[-1e6, -1e6, 1.0], [1e6, -1e6, 1.0], [1e6, 1e6, 1.0], [-1e6, 1e6, 1.0]])
    polygon = clip_polygon(corners, WIDTH, HEIGHT, margin_px=2.0)
    np.testing.assert_allclose(polygon.min(axis=0), [-2, -2], atol=1e-6)
    np.testing.assert_allclose(polygon.max(axis=0), [WIDTH + 1, HEIGHT + 1], atol=1e-6)


def test_polygon_through_the_camera_plane_is_finite_and_one_behind_is_empty() -> None:
    through = np.array([[-50.0, 0.0, -3.0], [50.0, 0.0, -3.0], [900.0, 900.0, 6.0], [100.0, 900.0, 6.0]])
    polygon = clip_polygon(through, WIDTH, HEIGHT)
    assert len(polygon) >= 3
    assert np.isfinite(polygon).all()
    assert clip_polygon(through * np.array([1, 1, -1.0]) - [0, 0, 9], WIDTH, HEIGHT).shape == (0, 2)


def test_edges_are_those_of_the_box() -> None:
    corners = box_corners(torch.tensor([[0.0, 0, 0, 4, 2, 1.5, 0, 0, 0]]))[0]
    lengths = sorted((corners[a] - corners[b]).norm().item() for a, b in BOX_EDGES)
    assert lengths == pytest.approx([1.5] * 4 + [2.0] * 4 + [4.0] * 4)
    front = {k for edge in BOX_EDGES[:4] for k in edge}
    assert all(corners[k, 0] == 2.0 for k in front)


def grid_of(images: dict[str, np.ndarray], boxes: Boxes3D | None = None) -> np.ndarray:
    return camera_grid(images, {n: forward_camera() for n in images}, boxes, width=3 * 100 + 8)


def cell(picture: np.ndarray, name: str) -> np.ndarray:
    row = next(r for r in range(2) if name in CAMERA_ROWS[r])
    column = CAMERA_ROWS[row].index(name)
    height = (picture.shape[0] - 4) // 2
    return picture[row * (height + 4) : row * (height + 4) + height, column * 104 : column * 104 + 100]


def test_grid_puts_each_camera_at_its_place_and_mirrors_those_that_look_back() -> None:
    images = {}
    for k, name in enumerate(CAMERA_NAMES):
        image = np.full((HEIGHT, WIDTH, 3), 30 * (k + 1), dtype=np.uint8)
        image[:, : WIDTH // 2, 0] = 0  # no red on the image's own left
        images[name] = image
    picture = grid_of(images)
    for k, name in enumerate(CAMERA_NAMES):
        part = cell(picture, name)
        half = part[40:50]  # below the caption
        assert (half[:, :, 1] == 30 * (k + 1)).all(), name
        without_red = half[:, -40:] if "BACK" in name else half[:, :40]
        with_red = half[:, :40] if "BACK" in name else half[:, -40:]
        assert (without_red[..., 0] == 0).all()
        assert (with_red[..., 0] == 30 * (k + 1)).all()


def test_boxes_follow_the_mirroring() -> None:
    boxes = box(10.0, 3.0)  # left of the axis, so on the image's left
    images = {name: blank() for name in CAMERA_NAMES}
    plain = grid_of(images)
    drawn = (grid_of(images, boxes) != plain).any(axis=-1)
    front, back = (cell(drawn[..., None], name) for name in ("CAM_FRONT", "CAM_BACK"))
    assert front[:, :50].any()
    assert not front[:, 52:].any()
    assert back[:, 50:].any()
    assert not back[:, :48].any()


def test_missing_camera_leaves_a_cell_and_other_names_are_laid_out_in_rows() -> None:
    picture = grid_of({"CAM_FRONT": np.full((HEIGHT, WIDTH, 3), 200, dtype=np.uint8)})
    assert cell(picture, "CAM_FRONT")[40:].mean() == 200
    assert cell(picture, "CAM_BACK").max() < 200
    four = {f"CAM_{k}": np.full((HEIGHT, WIDTH, 3), 50 + k, dtype=np.uint8) for k in range(4)}
    wide = grid_of(four)
    assert wide[wide.shape[0] - 10, 50].tolist() == [53, 53, 53]


def test_images_of_any_size_keep_their_aspect() -> None:
    images = {
        "CAM_FRONT": np.full((180, 320, 3), 90, np.uint8),
        "CAM_BACK": np.full((180, 90, 3), 90, np.uint8),
    }
    filled = (cell(grid_of(images), "CAM_BACK")[45] == 90).all(axis=-1)
    assert filled.sum() == pytest.approx(28, abs=1)
    assert filled[50]
