"""Whole pictures, their legend, and the files they are written to."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from bevperception.errors import ConfigError, DataError
from bevperception.geometry import BEVGrid
from bevperception.structures import Boxes3D
from bevperception.taxonomy import CAMERA_NAMES, DETECTION_CLASSES, SEGMENTATION_CLASSES
from bevperception.visualization.bev import SegmentationLayers
from bevperception.visualization.compose import Opinion, PictureStyle, compose_picture, legend
from bevperception.visualization.palette import DETECTION_COLOURS, SEGMENTATION_COLOURS, mix
from bevperception.visualization.text import draw_text, text_size
from bevperception.visualization.video import VideoError, write_picture, write_video
from tests.visualization.test_cameras import forward_camera

STYLE = PictureStyle(width=600, bev_height=240)


def opinion(score: float | None) -> Opinion:
    boxes = Boxes3D(
        torch.tensor([[12.0, 1.0, 0.0, 4.0, 2.0, 1.5, 0.2, 1.0, 0.0]]),
        torch.tensor([0]),
        None if score is None else torch.tensor([score]),
    )
    grid = BEVGrid(-50, 50, -50, 50, 50, 50)
    layers = SegmentationLayers(torch.full((7, 50, 50), 0.9), SEGMENTATION_CLASSES, grid)
    return Opinion(boxes, layers)


def picture(truth: Opinion | None, prediction: Opinion | None, title: str = "scene-0001") -> np.ndarray:
    images = {name: np.full((90, 160, 3), 60, np.uint8) for name in CAMERA_NAMES}
    matrices = {name: forward_camera() for name in CAMERA_NAMES}
    return compose_picture(title, images, matrices, truth=truth, prediction=prediction, style=STYLE)


def test_size_does_not_depend_on_what_is_shown() -> None:
    shapes = {
        picture(truth, prediction).shape
        for truth in (None, opinion(None), Opinion())
        for prediction in (None, opinion(0.9), Opinion())
    }
    assert len(shapes) == 1
    assert shapes.pop()[1] == 600


def test_prediction_is_left_of_the_ground_truth() -> None:
    empty = Opinion(Boxes3D(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64)))
    both = picture(empty, empty)
    only_prediction = picture(empty, opinion(0.9))
    only_truth = picture(opinion(None), empty)
    bev = slice(-320, -80)
    prediction_columns = np.nonzero((both[bev] != only_prediction[bev]).any(axis=(0, 2)))[0]
    truth_columns = np.nonzero((both[bev] != only_truth[bev]).any(axis=(0, 2)))[0]
    assert prediction_columns.max() < 300 <= truth_columns.min()


def test_boxes_below_the_score_threshold_are_left_out() -> None:
    none = Opinion(Boxes3D(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64), torch.zeros(0)))
    none.segmentation = opinion(None).segmentation
    assert (picture(None, opinion(0.1)) == picture(None, none)).all()
    assert (picture(None, opinion(0.5)) != picture(None, none)).any()


def test_cameras_show_the_ground_truth_where_nothing_is_predicted() -> None:
    plain = picture(None, None)
    cameras = slice(52, 52 + 220)
    assert (picture(opinion(None), None)[cameras] != plain[cameras]).any()
    assert (picture(opinion(None), Opinion())[cameras] != plain[cameras]).any()


@pytest.mark.parametrize(
    "style",
    [{"width": 0}, {"width": 10_001}, {"range_m": 0.0}, {"range_m": float("nan")}, {"bev_height": 0}],
)
def test_a_style_that_nothing_fits_is_refused(style: dict[str, float]) -> None:
    (name,) = style
    with pytest.raises(ConfigError, match=f"{name} must be"):
        PictureStyle(**style)


@pytest.mark.parametrize("width", [200, 201])
@pytest.mark.parametrize("range_m", [1.0, 1000.0])
def test_the_smallest_styles_give_pictures(width: int, range_m: float) -> None:
    images = {name: np.full((90, 160, 3), 60, np.uint8) for name in CAMERA_NAMES}
    style = PictureStyle(width=width, bev_height=100, range_m=range_m)
    found = compose_picture("title", images, {}, truth=opinion(None), prediction=opinion(0.9), style=style)
    assert found.shape[1] == width


def test_too_many_boxes_of_the_truth_are_refused() -> None:
    crowd = Opinion(Boxes3D(torch.zeros(2001, 9), torch.zeros(2001, dtype=torch.int64)))
    with pytest.raises(DataError, match=r"2001 boxes in one picture; at most 2000 are drawn$"):
        picture(crowd, None)


def test_overlong_title_is_cut() -> None:
    assert picture(None, None, title="scene " * 100).shape == picture(None, None).shape


def test_legend_shows_every_class_and_fits() -> None:
    strip = legend(1600, score_threshold=0.3)
    for colour in SEGMENTATION_COLOURS.values():
        assert (strip == np.array(colour)).all(axis=-1).any()
    for colour in DETECTION_COLOURS.values():
        assert (strip == np.array(colour)).all(axis=-1).any()
    assert strip.shape == legend(1600).shape
    assert (strip[:, -8:] == strip[0, -1]).all()  # nothing runs into the right edge


def test_palette_covers_the_taxonomy_with_distinct_colours() -> None:
    assert tuple(DETECTION_COLOURS) == DETECTION_CLASSES
    assert set(SEGMENTATION_COLOURS) == set(SEGMENTATION_CLASSES)
    for colours in (DETECTION_COLOURS, SEGMENTATION_COLOURS):
        values = np.array(list(colours.values()), dtype=float)
        distance = np.linalg.norm(values[:, None] - values[None], axis=-1)
        assert distance[~np.eye(len(values), dtype=bool)].min() > 25
    assert mix((0, 0, 0), (100, 50, 10), 0.5) == (50, 25, 5)


@pytest.mark.parametrize("align", ["left", "centre", "right"])
def test_text_lies_where_it_is_aligned(align: str) -> None:
    image = np.zeros((60, 200, 3), np.uint8)
    draw_text(image, "Hello", (100, 20), 20, (255, 255, 255), align=align)  # type: ignore[arg-type]
    rows, columns = np.nonzero(image.any(axis=-1))
    width, height = text_size("Hello", 20)
    left = 100 - {"left": 0, "centre": width / 2, "right": width}[align]
    assert left - 1 <= columns.min()
    assert columns.max() <= left + width + 1
    assert rows.min() >= 20
    assert rows.max() <= 20 + height


def test_text_beyond_the_edge_is_cut_off() -> None:
    image = np.zeros((30, 30, 3), np.uint8)
    for position in ((-20, -5), (25, 25), (500, 500), (-500, 3)):
        draw_text(image, "Wide text", position, 20, (255, 255, 255), plate=(9, 9, 9))
    assert image.shape == (30, 30, 3)
    assert image.any()


def test_png_reads_back(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (11, 7, 3), dtype=np.uint8)
    write_picture(tmp_path / "deep" / "picture.png", image)
    assert (cv2.imread(str(tmp_path / "deep" / "picture.png"))[..., ::-1] == image).all()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["picture.png"]
    with pytest.raises(VideoError, match=r"\.png"):
        write_picture(tmp_path / "picture.jpg", image)


@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
def test_video_reads_back_with_its_frames_and_colours(tmp_path: Path, size: tuple[int, int]) -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (120, 120, 120), (250, 250, 250)]
    target = tmp_path / "out" / "scene.mp4"
    count = write_video(target, (np.full((*size, 3), c, np.uint8) for c in colours), 2.0)
    assert count == 5
    assert [p.name for p in target.parent.iterdir()] == ["scene.mp4"]
    reader = cv2.VideoCapture(str(target))
    assert reader.get(cv2.CAP_PROP_FPS) == pytest.approx(2.0)
    for colour in colours:
        found, frame = reader.read()
        assert found
        assert frame.shape == (48 if size[0] == 48 else 46, 64 if size[1] == 64 else 62, 3)
        np.testing.assert_allclose(frame.mean(axis=(0, 1))[::-1], colour, atol=12)
    assert not reader.read()[0]


def test_interrupted_video_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "scene.mp4"
    target.write_bytes(b"old")

    def frames():  # type: ignore[no-untyped-def]
        yield np.zeros((32, 32, 3), np.uint8)
        raise RuntimeError("camera unplugged")

    with pytest.raises(RuntimeError, match="unplugged"):
        write_video(target, frames(), 2.0)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_video_of_nothing_or_of_mixed_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="at least one picture"):
        write_video(tmp_path / "a.mp4", [], 2.0)
    frames = [np.zeros((32, 32, 3), np.uint8), np.zeros((32, 34, 3), np.uint8)]
    with pytest.raises(VideoError, match="one size"):
        write_video(tmp_path / "a.mp4", frames, 2.0)
    assert list(tmp_path.iterdir()) == []
