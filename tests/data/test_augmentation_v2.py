"""What BEVFormer v2 adds to the data: GridMask, its image transform, queues with strides and later frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bevperception.config import AugmentationConfig, DataConfig
from bevperception.data.dataset import NuScenesDataset, attribute_indices, without_queue
from bevperception.data.grid_mask import grid_mask, random_grid_mask
from bevperception.data.image_input import ImageInput
from bevperception.data.nuscenes import NuScenesReader
from bevperception.data.published_v2 import plan_v2
from bevperception.data.transforms import ImageDraw
from bevperception.taxonomy import DETECTION_CLASSES
from tests.fixtures.tiny_nuscenes import TRAIN_SPLIT, VERSION


def slow_mask(height: int, width: int, period: int, start: tuple[int, int], ratio: float) -> np.ndarray:
    """Stripes drawn one by one on the larger canvas, as the published code does."""
    length = min(max(int(period * ratio + 0.5), 1), period - 1)
    rows, columns = int(1.5 * height), int(1.5 * width)
    canvas = np.zeros((rows, columns), dtype=np.float32)
    for i in range(rows // period):
        canvas[period * i + start[0] : min(period * i + start[0] + length, rows)] = 1
    for i in range(columns // period):
        canvas[:, period * i + start[1] : min(period * i + start[1] + length, columns)] = 1
    top, left = (rows - height) // 2, (columns - width) // 2
    return canvas[top : top + height, left : left + width]


def test_grid_mask_against_stripes_drawn_one_by_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width = (int(v) for v in rng.integers(3, 60, size=2))
        period = int(rng.integers(2, 2 + height))
        start = tuple(int(v) for v in rng.integers(period, size=2))
        ratio = float(rng.choice([0.2, 0.5, 0.9]))
        expected = slow_mask(height, width, period, start, ratio)
        np.testing.assert_array_equal(grid_mask((height, width), period, start, ratio), expected)


def test_random_grid_masks() -> None:
    rng = np.random.default_rng(1)
    masks = [random_grid_mask((20, 30), 0.7, rng) for _ in range(400)]
    drawn = [m for m in masks if m is not None]
    assert 0.6 < len(drawn) / 400 < 0.8
    # Half a period wide stripes both ways leave a quarter blotted out.
    assert 0.6 < float(torch.stack(drawn).mean()) < 0.9
    assert random_grid_mask((20, 30), 0.0, rng) is None


def open_dataset(
    root: Path, augmentation: AugmentationConfig | None = None, **data: object
) -> NuScenesDataset:
    settings = DataConfig(root=str(root), version=VERSION, **{"image_size": (48, 80), **data})
    return NuScenesDataset(NuScenesReader(settings), TRAIN_SPLIT, settings, augmentation)


def test_grid_mask_blots_the_current_frame_alone_and_all_cameras_alike(tiny_nuscenes: Path) -> None:
    plain = open_dataset(tiny_nuscenes, AugmentationConfig(colour=0.2), history=1)
    masked = open_dataset(tiny_nuscenes, AugmentationConfig(colour=0.2, grid_mask=1.0), history=1)
    a, b = plain.load(1, draw=3), masked.load(1, draw=3)
    assert torch.equal(a.history[0].images, b.history[0].images)
    lost = (b.frames.images == 0) & (a.frames.images != 0)
    kept = torch.where(lost, 0.0, a.frames.images)
    assert torch.equal(kept, b.frames.images)
    mask = random_grid_mask((48, 80), 1.0, np.random.default_rng((0, 3, 1, 1)))
    assert torch.equal(b.frames.images, a.frames.images * mask)
    assert torch.equal(masked.load(1, draw=3).frames.images, b.frames.images)
    other = masked.load(1, draw=4).frames.images == 0
    assert not torch.equal(other, b.frames.images == 0)


def test_queue_with_stride_and_later_frames(tiny_nuscenes: Path) -> None:
    every = open_dataset(tiny_nuscenes)
    times = [float(every.load(i).frames.timestamps_s) for i in range(4)]  # the first scene's key frames
    queue = open_dataset(tiny_nuscenes, history=1, future=2, history_stride=2)
    for index, expected in (
        (0, [None, 2, None]),
        (1, [None, 3, None]),
        (2, [0, None, None]),
        (3, [1, None, None]),
    ):
        batch = queue.load(index)
        found = [
            times.index(float(f.timestamps_s)) if bool(v) else None
            for f, v in zip(batch.history, batch.history_valid[0], strict=True)
        ]
        assert found == expected
    assert NuScenesDataset(queue.reader, TRAIN_SPLIT, without_queue(queue.data)).load(1).history == []


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("resize", [0.8, 1.0, 1.2])
def test_pixels_and_matrix_of_the_v2_transform_move_together(resize: float, flip: bool) -> None:
    config = DataConfig(image_size=(64, 160), image_transform="published_v2")
    image_input = ImageInput(config)
    source = (320, 180)
    fit = image_input.plan(source, ImageDraw(resize=resize, crop_left=0.3, crop_top=0.6, flip=flip))
    assert fit.cut_top == 180 - 128
    for u, v in ((60, 100), (200, 80), (150, 140)):
        image = np.zeros((180, 320, 3), dtype=np.uint8)
        image[v - 4 : v + 4, u - 4 : u + 4] = 255  # centred on the corner of four pixels
        out = torch.zeros(3, 64, 160)
        image_input.write(image, fit, out)
        x, y = (fit.matrix()[:2, [0, 1, 2]] @ torch.tensor([u, v, 1.0], dtype=torch.float64)).tolist()
        weight = (out[0] - out[0].min()).clamp_min(0)
        weight = torch.where(weight > 0.5 * weight.max(), weight, 0.0)
        columns, rows = torch.arange(160) + 0.5, torch.arange(64) + 0.5
        if not (4 < x < 156 and 4 < y < 60):
            continue
        assert abs(float((weight.sum(0) * columns).sum() / weight.sum()) - x) < 0.6
        assert abs(float((weight.sum(1) * rows).sum() / weight.sum()) - y) < 0.6


@pytest.mark.parametrize("source", [(320, 180), (161, 97)])
@pytest.mark.parametrize("target", [(160, 64), (97, 31)])
def test_the_v2_crop_stays_inside_the_image(source: tuple[int, int], target: tuple[int, int]) -> None:
    """At its extremes the crop touches the image's borders; never does it reach beyond the surplus."""
    for resize in (0.7, 0.94, 1.0, 1.11, 1.5):
        for left in (0.0, 0.3, 0.5, 1.0):
            for top in (0.0, 0.4, 1.0):
                fit = plan_v2(source, target, ImageDraw(resize=resize, crop_left=left, crop_top=top))
                surplus_x = max(0, fit.resized[0] - target[0])
                surplus_y = max(0, fit.resized[1] - target[1])
                assert 0 <= fit.left <= surplus_x
                assert 0 <= fit.top <= surplus_y
                if left in (0.0, 1.0):
                    assert fit.left == left * surplus_x
                if top in (0.0, 1.0):
                    assert fit.top == top * surplus_y


def test_plain_v2_transform_cuts_the_top_and_pads_nothing() -> None:
    image_input = ImageInput(DataConfig(image_size=(640, 1600), image_transform="published_v2"))
    fit = image_input.plan((1600, 900))
    assert (fit.resized, fit.left, fit.top, fit.cut_top) == ((1600, 640), 0, 0, 260)
    assert image_input.reduction(fit) == 1


def test_attributes_by_class() -> None:
    names = ["vehicle.stopped", "pedestrian.moving", "", "cycle.without_rider", "vehicle.moving"]
    classes = ["bus", "pedestrian", "barrier", "bicycle", "pedestrian"]
    labels = torch.tensor([DETECTION_CLASSES.index(name) for name in classes])
    assert attribute_indices(labels, names).tolist() == [2, 0, -1, 1, -1]
    assert attribute_indices(labels[:0], []).shape == (0,)


def test_targets_carry_attributes(tiny_nuscenes: Path) -> None:
    boxes = open_dataset(tiny_nuscenes).load(0).targets.boxes[0]
    assert boxes.attributes is not None
    assert boxes.attributes.shape == boxes.labels.shape


def test_camera_dropout_takes_one_camera_from_the_whole_queue(tiny_nuscenes: Path) -> None:
    plain = open_dataset(tiny_nuscenes, AugmentationConfig(colour=0.2), history=1)
    torn = open_dataset(tiny_nuscenes, AugmentationConfig(colour=0.2, camera_dropout=0.5), history=1)
    assert plain.load(1, draw=3).frames.camera_mask is None
    lost = []
    for draw in range(60):
        batch = torn.load(1, draw=draw)
        mask = batch.frames.camera_mask
        assert mask is not None
        assert batch.history[0].camera_mask is not None
        assert torch.equal(mask, batch.history[0].camera_mask)
        lost.append(tuple((~mask[0]).nonzero().flatten().tolist()))
    assert {len(cameras) for cameras in lost} == {0, 1}
    assert {camera for cameras in lost for camera in cameras} == set(range(len(torn.data.cameras)))
    assert 15 < sum(map(len, lost)) < 45
    assert torch.equal(torn.load(1, draw=5).frames.images, plain.load(1, draw=5).frames.images)


def test_a_streams_segment_shares_its_augmentation(tiny_nuscenes: Path) -> None:
    """Relative to the plain frames, all frames of a segment are turned, cut and robbed of a camera alike."""
    augmentation = AugmentationConfig(camera_dropout=0.5, bev_rotation_deg=20.0, resize=(1.0, 1.2))
    plain = open_dataset(tiny_nuscenes)
    stream = open_dataset(tiny_nuscenes, augmentation, stream_length=4)
    assert stream.scene_lengths == [len(s.sample_tokens) for s in stream.scenes]
    assert sum(stream.scene_lengths) == len(stream)
    seen = []
    for draw in range(4):
        frames = [stream.load(index, draw).frames for index in (0, 1)]
        turned = [
            torch.linalg.solve(plain.load(index).frames.bev_to_global, frames[index].bev_to_global)
            for index in (0, 1)
        ]
        torch.testing.assert_close(turned[0], turned[1], atol=1e-6, rtol=0)
        masks = [f.camera_mask for f in frames]
        assert masks[0] is not None
        assert torch.equal(masks[0], masks[1])
        seen.append((turned[0], masks[0]))
    assert not torch.allclose(seen[0][0], seen[1][0])
    assert len({tuple(mask[0].tolist()) for _, mask in seen}) > 1
