"""Queues, determinism, bad samples and worker processes."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bevperception.config import AugmentationConfig, DataConfig, ExperimentConfig
from bevperception.config_model import BEVConfig, ModelConfig, SegmentationConfig
from bevperception.data.dataset import (
    NuScenesDataset,
    SkippedBatch,
    build_dataset,
    collate,
    init_worker,
)
from bevperception.data.image_input import ImageInput
from bevperception.data.nuscenes import NuScenesReader
from bevperception.errors import ConfigError, SampleError
from bevperception.geometry import project_points
from bevperception.structures import BadSample, Batch, CameraFrames
from tests.fixtures.tiny_nuscenes import KEY_FRAMES, TRAIN_SPLIT, VAL_SPLIT, VERSION, write_tiny_nuscenes

STRONG = AugmentationConfig(
    resize=(0.8, 1.4),
    crop=1.0,
    image_flip=0.5,
    colour=0.0,
    bev_rotation_deg=30.0,
    bev_scale=(0.9, 1.1),
    bev_flip_x=0.5,
    bev_flip_y=0.5,
)
GRID = SegmentationConfig(range_m=30.0, cell_m=1.0)


def open_dataset(
    root: Path,
    split: str = TRAIN_SPLIT,
    augmentation: AugmentationConfig | None = None,
    seed: int = 0,
    segmentation: SegmentationConfig | None = GRID,
    **settings: Any,
) -> NuScenesDataset:
    data = DataConfig(root=str(root), version=VERSION, **{"image_size": (96, 160), **settings})
    return NuScenesDataset(
        NuScenesReader(data), split, data, augmentation, segmentation=segmentation, can_bus=True, seed=seed
    )


def assert_same(a: Batch, b: Batch) -> None:
    assert a.tokens == b.tokens
    assert torch.equal(a.history_valid, b.history_valid)
    for x, y in zip([*a.history, a.frames], [*b.history, b.frames], strict=True):
        for name in ("images", "bev_to_image", "bev_to_global", "timestamps_s", "can_bus"):
            assert torch.equal(getattr(x, name), getattr(y, name)), name
    assert a.targets is not None
    assert b.targets is not None
    for p, q in zip(a.targets.boxes, b.targets.boxes, strict=True):
        torch.testing.assert_close(p.values, q.values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(p.labels, q.labels)
    assert a.targets.segmentation is not None
    assert b.targets.segmentation is not None
    assert torch.equal(a.targets.segmentation, b.targets.segmentation)


def test_shapes_and_types(tiny_nuscenes: Path) -> None:
    dataset = open_dataset(tiny_nuscenes, history=2)
    assert len(dataset) == 2 * KEY_FRAMES
    batch = dataset[3]
    assert isinstance(batch, Batch)
    frames = batch.frames
    assert frames.images.shape == (1, 6, 3, 96, 160)
    assert frames.images.dtype == torch.float32
    assert frames.bev_to_image.shape == (1, 6, 4, 4)
    assert frames.bev_to_global.dtype == torch.float64
    assert frames.can_bus is not None
    assert frames.can_bus.shape == (1, 18)
    assert len(batch.history) == 2
    assert batch.targets is not None
    assert batch.targets.segmentation is not None
    assert batch.targets.segmentation.shape == (1, 7, 60, 60)
    assert batch.tokens == [dataset.tokens[3]]
    assert batch.scene_tokens == [dataset.scenes[0].token]


def test_queue_holds_the_key_frames_before(tiny_nuscenes: Path) -> None:
    dataset = open_dataset(tiny_nuscenes, history=2)
    plain = open_dataset(tiny_nuscenes)
    for index in range(len(dataset)):
        batch, position = dataset.load(index), index % KEY_FRAMES
        assert batch.history_valid.tolist() == [[position >= 2, position >= 1]]
        for slot, offset in ((0, 2), (1, 1)):
            # A placeholder is the current frame.
            expected = plain.load(index - offset if position >= offset else index).frames
            assert torch.equal(batch.history[slot].images, expected.images)
            assert torch.equal(batch.history[slot].bev_to_global, expected.bev_to_global)


def test_published_queue_drops_one_of_one_more(tiny_nuscenes: Path) -> None:
    dataset = open_dataset(tiny_nuscenes, history=2, history_sampling="drop_one", segmentation=None)
    times = [dataset.load(i).frames.timestamps_s.item() for i in range(KEY_FRAMES)]
    seen = set()
    for draw in range(20):
        batch = dataset.load(3, draw)
        assert batch.history_valid.all()
        seen.add(tuple(times.index(f.timestamps_s.item()) for f in batch.history))
        again = dataset.load(3, draw)
        assert [f.timestamps_s.item() for f in again.history] == [
            f.timestamps_s.item() for f in batch.history
        ]
    assert seen == {(0, 1), (0, 2), (1, 2)}
    for draw in range(10):
        valid = dataset.load(1, draw).history_valid[0].tolist()
        assert valid in ([False, True], [False, False]), "what is missing is oldest"


def test_index_and_draw_determine_the_sample(tiny_nuscenes: Path) -> None:
    first = open_dataset(tiny_nuscenes, augmentation=STRONG, history=1)
    second = open_dataset(tiny_nuscenes, augmentation=STRONG, history=1)
    second.load(0, 0)
    second.load(5, 2)
    assert_same(first.load(5, 1), second.load(5, 1))
    item = second[(5, 1)]
    assert isinstance(item, Batch)
    assert_same(first.load(5, 1), item)
    for other in (first.load(5, 2), open_dataset(tiny_nuscenes, augmentation=STRONG, seed=1).load(5, 1)):
        assert not torch.equal(first.load(5, 1).frames.images, other.frames.images)


def colours_at(frames: CameraFrames, camera: int, points: Tensor) -> tuple[Tensor, Tensor]:
    """Colours (n, 3) of the pixels that points project to, and which points are well inside the image."""
    pixels, depth = project_points(points.float(), frames.bev_to_image[0, camera])
    height, width = frames.images.shape[-2:]
    inside = (depth > 0.5) & (pixels[:, 0] > 3) & (pixels[:, 0] < width - 3)
    inside &= (pixels[:, 1] > 3) & (pixels[:, 1] < height - 3)
    column = pixels[:, 0].floor().clamp(0, width - 1).long()
    row = pixels[:, 1].floor().clamp(0, height - 1).long()
    return frames.images[0, camera][:, row, column].T, inside


@pytest.mark.parametrize("draw", range(6))
def test_a_point_shows_the_same_thing_before_and_after_augmentation(tiny_nuscenes: Path, draw: int) -> None:
    plain = open_dataset(tiny_nuscenes, history=1).load(6)
    augmented = open_dataset(tiny_nuscenes, augmentation=STRONG, history=1).load(6, draw)
    generator = torch.Generator().manual_seed(0)
    points = (torch.rand((3000, 3), generator=generator, dtype=torch.float64) - 0.5) * torch.tensor(
        [50, 50, 5]
    )
    # The two BEV frames are related through the global frame.
    points_h = torch.nn.functional.pad(points, (0, 1), value=1.0)
    moved, unchanged = {}, {}
    for name, before, after in (
        ("current", plain.frames, augmented.frames),
        ("history", plain.history[0], augmented.history[0]),
    ):
        relation = torch.linalg.inv(after.bev_to_global[0]) @ before.bev_to_global[0]
        moved[name] = _agreement(before, after, points, (points_h @ relation.T)[:, :3])
        unchanged[name] = _agreement(before, after, points, points)
    assert min(share for share, _ in moved.values()) > 0.95
    assert min(count for _, count in moved.values()) > 300
    assert max(share for share, _ in unchanged.values()) < 0.9, "the check would not notice a wrong matrix"


def _agreement(before: CameraFrames, after: CameraFrames, points: Tensor, moved: Tensor) -> tuple[float, int]:
    """Share of points that show one colour in both, and how many were seen in both."""
    agree, count = 0, 0
    for camera in range(6):
        colours, inside = colours_at(before, camera, points)
        moved_colours, moved_inside = colours_at(after, camera, moved)
        both = inside & moved_inside
        close = (colours - moved_colours).abs().amax(-1) < 0.25
        agree += int((close & both).sum())
        count += int(both.sum())
    return agree / max(count, 1), count


@pytest.mark.parametrize("draw", range(4))
def test_labels_follow_the_bev(tiny_nuscenes: Path, draw: int) -> None:
    plain = open_dataset(tiny_nuscenes).load(2)
    augmented = open_dataset(tiny_nuscenes, augmentation=STRONG).load(2, draw)
    relation = torch.linalg.inv(augmented.frames.bev_to_global[0]) @ plain.frames.bev_to_global[0]
    assert plain.targets is not None
    assert augmented.targets is not None
    before, after = plain.targets.boxes[0].values.double(), augmented.targets.boxes[0].values.double()
    centres = before[:, :3] @ relation[:3, :3].T + relation[:3, 3]
    torch.testing.assert_close(after[:, :3], centres, rtol=0, atol=1e-4)
    assert augmented.targets.segmentation is not None
    assert plain.targets.segmentation is not None
    # Cells of the augmented map, looked up in the plain one.
    cells = GRID.grid.cell_centres().reshape(-1, 2)
    back = torch.linalg.inv(relation[:2, :2])
    there = GRID.grid.to_cells((cells - relation[:2, 3]) @ back.T).round().long()
    inside = ((there >= 0) & (there < 60)).all(-1)
    looked_up = plain.targets.segmentation[0][:, there[inside, 1], there[inside, 0]]
    drawn = augmented.targets.segmentation[0].reshape(7, -1)[:, inside]
    assert float((looked_up != drawn).float().mean()) < 0.02, "only cells on an edge may differ"
    drivable = looked_up[0].bool()
    assert float((drawn[0].bool() & drivable).sum() / (drawn[0].bool() | drivable).sum()) > 0.95


def test_scene_without_a_map(tiny_nuscenes: Path) -> None:
    dataset = open_dataset(tiny_nuscenes)
    with_map, without = dataset.load(0).targets, dataset.load(KEY_FRAMES).targets
    assert with_map is not None
    assert without is not None
    assert without.segmentation is not None
    assert with_map.segmentation_present is not None
    assert without.segmentation_present is not None
    assert with_map.segmentation_present.all()
    assert without.segmentation_present.tolist() == [[False] * 6 + [True]]
    assert without.segmentation[0, :6].sum() == 0
    assert without.segmentation[0, 6].sum() > 0
    detection_only = open_dataset(tiny_nuscenes, segmentation=None).load(0).targets
    assert detection_only is not None
    assert detection_only.segmentation is None
    assert detection_only.segmentation_present is None


def test_collate_joins_singles(tiny_nuscenes: Path) -> None:
    dataset = open_dataset(tiny_nuscenes, history=1)
    singles = [dataset.load(i) for i in (1, 0, 5)]
    batch = collate(singles)
    assert isinstance(batch, Batch)
    assert len(batch) == 3
    assert batch.targets is not None
    assert batch.targets.segmentation is not None
    for i, single in enumerate(singles):
        assert torch.equal(batch.frames.images[i], single.frames.images[0])
        assert torch.equal(batch.history[0].bev_to_image[i], single.history[0].bev_to_image[0])
        assert single.targets is not None
        assert single.targets.segmentation is not None
        assert torch.equal(batch.targets.segmentation[i], single.targets.segmentation[0])
        assert torch.equal(batch.targets.boxes[i].labels, single.targets.boxes[0].labels)
    assert batch.history_valid.tolist() == [[True], [False], [True]]
    assert batch.tokens == [s.tokens[0] for s in singles]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """The first training sample has a truncated image, the second none at all for one camera."""
    root = write_tiny_nuscenes(tmp_path)
    first, second = sorted((root / "samples" / "CAM_BACK").glob("scene-9001*"))[:2]
    first.write_bytes(first.read_bytes()[:-20])
    second.unlink()
    return root


def test_bad_samples_stop_by_default(damaged: Path) -> None:
    dataset = open_dataset(damaged)
    with pytest.raises(SampleError, match=r"CAM_BACK: image .*scene-9001.* is truncated") as caught:
        dataset[0]
    assert caught.value.token == dataset.tokens[0]
    with pytest.raises(SampleError, match=r"CAM_BACK: cannot read image .*No such file"):
        dataset[1]
    assert isinstance(dataset[2], Batch)


def test_bad_samples_are_skipped_and_reported(damaged: Path) -> None:
    dataset = open_dataset(damaged, bad_samples="skip")
    bad = dataset[0]
    assert isinstance(bad, BadSample)
    assert bad.token == dataset.tokens[0]
    assert "truncated" in bad.reason
    batch = collate([bad, dataset[2], dataset[1]])
    assert isinstance(batch, Batch)
    assert batch.tokens == [dataset.tokens[2]]
    assert [s.token for s in batch.skipped] == dataset.tokens[:2]
    nothing = collate([bad, dataset[1]])
    assert isinstance(nothing, SkippedBatch)
    assert not nothing
    assert [s.token for s in nothing.skipped] == dataset.tokens[:2]


def test_a_bad_history_frame_makes_a_bad_sample(damaged: Path) -> None:
    dataset = open_dataset(damaged, history=1, bad_samples="skip")
    bad = dataset[2]
    assert isinstance(bad, BadSample)
    assert bad.token == dataset.tokens[1], "the sample that is broken, not the one it was loaded for"
    assert isinstance(dataset[3], Batch)


def test_sample_without_annotations(tmp_path: Path) -> None:
    root = write_tiny_nuscenes(tmp_path)
    for table in ("sample_annotation", "instance"):
        (root / VERSION / f"{table}.json").write_text(json.dumps([]))
    batch = open_dataset(root, VAL_SPLIT).load(0)
    assert batch.targets is not None
    assert batch.targets.segmentation is not None
    assert batch.targets.boxes[0].values.shape == (0, 9)
    assert batch.targets.segmentation[0, 6].sum() == 0
    assert isinstance(collate([batch, batch]), Batch)


def test_worker_processes_give_the_same(damaged: Path) -> None:
    dataset = open_dataset(damaged, augmentation=STRONG, history=1, bad_samples="skip")
    items = [[(5, 3), (0, 1)], [(1, 0), (0, 0)], [(6, 2), (7, 9)]]
    loader = DataLoader(
        dataset,
        batch_sampler=items,  # type: ignore[arg-type]
        num_workers=2,
        collate_fn=collate,
        worker_init_fn=init_worker,
        multiprocessing_context="fork",
    )
    for loaded, wanted in zip(loader, items, strict=True):
        expected = collate([dataset[item] for item in wanted])
        assert loaded.skipped == expected.skipped
        if isinstance(expected, Batch):
            assert_same(loaded, expected)
        else:
            assert isinstance(loaded, SkippedBatch)


def test_a_copy_for_a_spawned_process(tiny_nuscenes: Path) -> None:
    dataset = open_dataset(tiny_nuscenes, augmentation=STRONG, history=1)
    assert_same(pickle.loads(pickle.dumps(dataset)).load(2, 3), dataset.load(2, 3))


def test_errors_survive_the_way_out_of_a_worker(damaged: Path) -> None:
    dataset = open_dataset(damaged)
    with pytest.raises(SampleError) as caught:
        dataset[0]
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.token) == (str(caught.value), caught.value.token)


def experiment(root: Path, **bev: Any) -> ExperimentConfig:
    return ExperimentConfig(
        model=ModelConfig(bev=BEVConfig(**bev), segmentation=GRID),
        data=DataConfig(root=str(root), version=VERSION, image_size=(96, 160), history=2),
        augmentation=STRONG,
    )


def test_build_dataset(tiny_nuscenes: Path) -> None:
    config = experiment(tiny_nuscenes)
    reader = NuScenesReader(config.data)
    training = build_dataset(reader, config, TRAIN_SPLIT, training=True)
    assert len(training.load(2).history) == 2
    assert training.augmentation == STRONG
    assert training.load(0).frames.can_bus is None
    evaluation = build_dataset(reader, config, VAL_SPLIT, training=False)
    assert evaluation.load(2).history == []
    assert evaluation.augmentation is None
    with_can = experiment(tiny_nuscenes, alignment="published")
    assert build_dataset(reader, with_can, VAL_SPLIT, training=False).load(0).frames.can_bus is not None
    with pytest.raises(ConfigError, match="absolute poses"):
        build_dataset(reader, with_can, TRAIN_SPLIT, training=True)


@pytest.mark.parametrize("grid_mask", [0.0, 1.0])
def test_pixels_normalised_later_are_the_same_images(tiny_nuscenes: Path, grid_mask: float) -> None:
    strong = replace(STRONG, colour=0.2, grid_mask=grid_mask)
    data = DataConfig(root=str(tiny_nuscenes), version=VERSION, image_size=(96, 160), history=1)
    reader = NuScenesReader(data)
    plain = NuScenesDataset(reader, TRAIN_SPLIT, data, strong)
    raw = NuScenesDataset(reader, TRAIN_SPLIT, data, strong, pixels=True)
    images = ImageInput(data)
    padded = False
    for draw in range(6):
        expected, found = plain.load(2, draw), raw.load(2, draw)
        for one, other in zip(
            (expected.frames, *expected.history), (found.frames, *found.history), strict=True
        ):
            assert other.images.dtype == torch.uint8
            ready = images.normalise(other)
            padding = one.images == 0
            padded |= bool(padding.any())
            assert torch.equal(torch.where(padding, 0.0, ready.images), one.images)
            # The mean as a whole level: half a level off at most.
            assert _largest(ready.images[padding]) < 0.01
            assert images.normalise(ready) is ready
    assert padded


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def test_published_transforms_never_leave_pixels(tiny_nuscenes: Path) -> None:
    data = DataConfig(
        root=str(tiny_nuscenes), version=VERSION, image_size=(96, 160), image_transform="published_v2"
    )
    dataset = NuScenesDataset(NuScenesReader(data), TRAIN_SPLIT, data, pixels=True)
    assert dataset.load(0).frames.images.is_floating_point()
