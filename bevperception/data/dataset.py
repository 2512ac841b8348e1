"""The training and evaluation data set: queues of frames with ground truth, reproducible to the draw."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import Dataset

from bevperception.config import AugmentationConfig, DataConfig, ExperimentConfig
from bevperception.config_model import SegmentationConfig
from bevperception.data.can_bus import CanBusReader
from bevperception.data.grid_mask import random_grid_mask
from bevperception.data.image_input import ImageInput
from bevperception.data.images import read_image
from bevperception.data.map_labels import SegmentationLabels
from bevperception.data.nuscenes import NuScenesReader, SampleRecord, SceneRecord
from bevperception.data.transforms import AugmentationDraw
from bevperception.errors import ConfigError, DataError, SampleError
from bevperception.geometry import transform_boxes
from bevperception.processes import end_with_parent
from bevperception.structures import BadSample, Batch, Boxes3D, CameraFrames, Targets, concatenate_frames
from bevperception.taxonomy import ATTRIBUTES, DETECTION_CLASSES

# Sources of randomness of their own: the other draws stay what they are without these.
_GRID_MASK, _CAMERA_DROPOUT = 1, 2


@dataclass(frozen=True)
class SkippedBatch:
    """Stands for a batch of which no sample could be read; false in a condition.

    Attributes:
        skipped: all of its samples.
    """

    skipped: list[BadSample]

    def __len__(self) -> int:
        return 0


class NuScenesDataset(Dataset["Batch | BadSample"]):
    """Samples of a split, each a batch of one.

    The index of a sample and the number of the draw determine every random choice, so a resumed run and
    the processes of a distributed one see the samples that an uninterrupted single process sees.

    Args:
        reader: open tables; may be shared.
        split: predefined, or named in splits.json; or the scenes themselves.
        data: image size, history and what to do with bad samples; cameras and frames are the reader's.
        augmentation: training-time augmentation; None for none.
        segmentation: what BEV segmentation labels to draw; None for none.
        can_bus: add the CAN-bus vector to the frames.
        seed: of all random choices.
        pixels: leave images as uint8 pixels, a quarter of the memory to fill and to carry, for
            :meth:`ImageInput.normalise` on the model's device; only where ``data.image_transform`` is 'fast'.

    Attributes:
        scenes: scenes of the split in order.
        tokens: sample tokens; the data set's order, scene by scene and in time order within.

    Raises:
        ConfigError: if no such split exists.
        DataError: if none of its scenes is in the tables.
        SampleError: if the tables of a sample are damaged and bad samples are to stop the run.
    """

    def __init__(
        self,
        reader: NuScenesReader,
        split: str | Sequence[SceneRecord],
        data: DataConfig,
        augmentation: AugmentationConfig | None = None,
        segmentation: SegmentationConfig | None = None,
        can_bus: bool = False,
        seed: int = 0,
        pixels: bool = False,
    ) -> None:
        self.reader = reader
        self.data = data
        self.augmentation = augmentation
        self.history, self.future = data.history, data.future
        self.seed = seed
        self.scenes = reader.scenes(split) if isinstance(split, str) else list(split)
        self.tokens = [token for scene in self.scenes for token in scene.sample_tokens]
        if data.bad_samples == "stop":
            _refuse_faulty(reader, self.tokens)
        self._images = ImageInput(data)
        self._pixels = pixels and self._images.keeps_pixels
        self._locations = {scene.token: scene.location for scene in self.scenes}
        self._can_bus = CanBusReader(reader, data.can_bus) if can_bus else None
        self._labels: SegmentationLabels | None = None
        if segmentation is not None:
            self._labels = SegmentationLabels(reader.root, segmentation, data.divider_width_m)
            # Maps are big: load them here, once, rather than in every loader process.
            self._labels.preload(self._locations.values())

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def scene_lengths(self) -> list[int]:
        """Samples of each scene, whose samples stand together and in order of time."""
        return [len(scene.sample_tokens) for scene in self.scenes]

    def __getitem__(self, item: int | tuple[int, int]) -> Batch | BadSample:
        """A sample by its index, or by (index, draw).

        Raises:
            SampleError: if it cannot be read and bad samples are to stop the run.
        """
        index, draw = item if isinstance(item, tuple) else (item, 0)
        if self.data.bad_samples == "stop":
            return self.load(index, draw)
        try:
            return self.load(index, draw)
        except SampleError as error:
            return BadSample(error.token, str(error))

    def load(self, index: int, draw: int = 0) -> Batch:
        """One sample as a batch of one.

        Args:
            index: position in :attr:`tokens`.
            draw: number of this draw of the sample, for example the epoch.

        Raises:
            SampleError: if an image, a calibration or an annotation cannot be used.
        """
        token = self.tokens[index]
        rng = np.random.default_rng(self._seed(index, draw))
        choice = AugmentationDraw.plain(len(self.data.cameras))
        if self.augmentation is not None:
            choice = AugmentationDraw.random(self.augmentation, len(self.data.cameras), rng)
        sample = self.reader.sample(token)
        present = self._present(index, draw)
        current = self._frames(sample, choice, present)
        others = [*self._earlier(token, rng), *self._later(token)]
        history = [
            current if t is None else self._frames(self.reader.sample(t), choice, present) for t in others
        ]
        if self.augmentation is not None and self.augmentation.grid_mask > 0:
            frame_rng = np.random.default_rng((self.seed, draw, index, _GRID_MASK))  # of this frame alone
            mask = random_grid_mask(self.data.image_size, self.augmentation.grid_mask, frame_rng)
            if mask is not None:
                current = replace(current, images=self._images.blot(current.images, mask))
        return Batch(
            history=history,
            history_valid=torch.tensor([[t is not None for t in others]], dtype=torch.bool),
            frames=current,
            targets=self._targets(sample, choice),
            tokens=[token],
            scene_tokens=[sample.scene_token],
        )

    def _seed(self, index: int, draw: int) -> tuple[int, ...]:
        """Seed of a queue's augmentation; all frames of a stream's segment (a draw) share theirs."""
        return (self.seed, draw) if self.data.stream_length else (self.seed, draw, index)

    def _present(self, index: int, draw: int) -> Tensor | None:
        """(1, cameras) False for the camera that augmentation takes away; None if it takes none."""
        if self.augmentation is None or self.augmentation.camera_dropout <= 0.0:
            return None
        rng = np.random.default_rng((*self._seed(index, draw), _CAMERA_DROPOUT))
        cameras = len(self.data.cameras)
        lost = int(rng.integers(cameras)) if rng.random() < self.augmentation.camera_dropout else cameras
        return (torch.arange(cameras) != lost)[None]

    def _earlier(self, token: str, rng: np.random.Generator) -> list[str | None]:
        """Tokens of the queue's earlier frames, oldest first; None where the scene has none."""
        if self.history == 0:
            return []
        drop = self.data.history_sampling == "drop_one"
        wanted, stride = self.history + int(drop), self.data.history_stride
        tokens: list[str | None] = list(self.reader.previous(token, wanted * stride)[stride - 1 :: stride])
        tokens += [None] * (wanted - len(tokens))
        if drop:
            del tokens[int(rng.integers(wanted))]
        # Missing frames are always the oldest, so that a memory starts once and is not torn.
        return tokens[::-1]

    def _later(self, token: str) -> list[str | None]:
        """Tokens of the queue's later frames in order of time; None where the scene has none."""
        if self.future == 0:
            return []
        stride = self.data.history_stride
        tokens = self.reader.following(token, self.future * stride)[stride - 1 :: stride]
        return [*tokens, *[None] * (self.future - len(tokens))]

    def _frames(self, sample: SampleRecord, choice: AugmentationDraw, present: Tensor | None) -> CameraFrames:
        width, height = self._images.size
        # NumPy asks for huge pages where torch does not: some 30 times fewer page faults.
        dtype = np.uint8 if self._pixels else np.float32
        images = torch.from_numpy(np.zeros((1, len(sample.cameras), 3, height, width), dtype=dtype))
        augmented_to_bev = torch.linalg.inv(choice.bev.matrix())
        bev_to_global = sample.bev_to_global @ augmented_to_bev
        projections: list[Tensor] = []
        for slot, camera in enumerate(sample.cameras):
            fit = self._images.plan(camera.size, choice.image)
            try:
                image = read_image(camera.path, camera.size, self._images.reduction(fit))
            except DataError as error:
                raise SampleError(
                    f"sample {sample.token}, {camera.channel}: {error}", sample.token
                ) from error
            self._images.write(image, fit, images[0, slot], choice.colours[slot])
            projections.append(fit.matrix() @ camera.projection(bev_to_global))
        can_bus = None if self._can_bus is None else self._can_bus.vector(sample.token)[None]
        return CameraFrames(
            images=images,
            bev_to_image=torch.stack(projections)[None].float(),
            bev_to_global=bev_to_global[None],
            timestamps_s=torch.tensor([sample.timestamp_s], dtype=torch.float64),
            camera_mask=present,
            can_bus=can_bus,
        )

    def _targets(self, sample: SampleRecord, choice: AugmentationDraw) -> Targets:
        annotations = self.reader.annotations(sample)
        annotated = annotations.boxes
        bev_to_augmented = choice.bev.matrix()
        values = transform_boxes(annotated.values.double(), bev_to_augmented).float()
        attributes = attribute_indices(annotated.labels, annotations.attributes)
        boxes = Boxes3D(values, annotated.labels, attributes=attributes)
        if self._labels is None:
            return Targets(boxes=[boxes])
        bev_to_global = sample.bev_to_global @ torch.linalg.inv(bev_to_augmented)
        vehicles = transform_boxes(annotations.vehicles.double(), bev_to_augmented).float()
        maps, present = self._labels.draw(self._locations[sample.scene_token], bev_to_global, vehicles)
        return Targets(boxes=[boxes], segmentation=maps[None], segmentation_present=present[None])


def _refuse_faulty(reader: NuScenesReader, tokens: Sequence[str]) -> None:
    """Raise for samples whose tables are damaged before the run begins, not in the middle of it."""
    faulty = reader.faulty(tokens)
    if faulty:
        token, reason = next(iter(faulty.items()))
        raise SampleError(
            f"{reason}\n{len(faulty)} of {len(tokens)} samples cannot be used; data.bad_samples=skip leaves "
            f"them out, `python -m bevperception.doctor {reader.root}` lists what is wrong",
            token,
        )


def attribute_indices(labels: Tensor, names: Sequence[str]) -> Tensor:
    """Convert attribute names to the perspective head's indices.

    Args:
        labels: (n,) detection classes.
        names: n nuScenes attribute names, '' where there is none.

    Returns:
        (n,) int64 position in the class's ``taxonomy.ATTRIBUTES``, -1 where it is not among them.
    """
    allowed = [ATTRIBUTES[DETECTION_CLASSES[label]] for label in labels.tolist()]
    indices = [a.index(name) if name in a else -1 for a, name in zip(allowed, names, strict=True)]
    return torch.tensor(indices, dtype=torch.long)


def without_queue(data: DataConfig) -> DataConfig:
    """Change settings to single frames, without a queue: history is then the model's memory."""
    return replace(data, history=0, future=0)


def build_dataset(
    reader: NuScenesReader, config: ExperimentConfig, split: str | Sequence[SceneRecord], training: bool
) -> NuScenesDataset:
    """Build the data set that a model of this configuration trains on or is evaluated on.

    Args:
        reader: open tables.
        config: of the whole experiment.
        split: predefined, or named in splits.json; or the scenes themselves.
        training: augmented queues; otherwise single plain frames, whose history is the model's memory.

    Raises:
        ConfigError: if the BEV is to be augmented for a model that reads absolute poses.
    """
    can_bus = config.model.bev.alignment == "published"
    if training and can_bus and _augments_bev(config.augmentation):
        raise ConfigError(
            "BEV rotation, scale and flips do not go with model.bev.alignment=published, "
            "which reads absolute poses\nset augmentation.bev_rotation_deg=0, bev_scale=[1,1], "
            "bev_flip_x=0, bev_flip_y=0"
        )
    return NuScenesDataset(
        reader,
        split,
        config.data if training else without_queue(config.data),
        augmentation=config.augmentation if training else None,
        segmentation=config.model.segmentation if config.model.segmentation.enabled else None,
        can_bus=can_bus,
        seed=config.training.seed,
        pixels=training,
    )


def _augments_bev(config: AugmentationConfig) -> bool:
    plain = AugmentationConfig()
    names = ("bev_rotation_deg", "bev_scale", "bev_flip_x", "bev_flip_y")
    return any(getattr(config, name) != getattr(plain, name) for name in names)


def init_worker(worker_id: int) -> None:
    """For ``DataLoader(worker_init_fn=...)``: one thread a worker, as the workers share the cores.

    A worker also ends when its parent is killed. PyTorch's own watch looks between two batches only.
    """
    del worker_id
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with_parent(parent.pid)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # NumPy's BLAS would spin in a second thread for every small matrix: half of the time.
    threadpool_limits(1)


def collate(samples: Sequence[Batch | BadSample]) -> Batch | SkippedBatch:
    """Collate samples to a batch; bad ones are left out and named in ``skipped``.

    Args:
        samples: from :class:`NuScenesDataset`; all with equally long histories.

    Returns:
        the batch, or a :class:`SkippedBatch` if every sample was bad.
    """
    skipped = [s for s in samples if isinstance(s, BadSample)]
    good = [s for s in samples if isinstance(s, Batch)]
    for sample in good:
        skipped.extend(sample.skipped)
    if not good:
        return SkippedBatch(skipped)
    if len(good) == 1:
        return replace(good[0], skipped=skipped)
    return Batch(
        history=[concatenate_frames(column) for column in zip(*(s.history for s in good), strict=True)],
        history_valid=torch.cat([s.history_valid for s in good]),
        frames=concatenate_frames([s.frames for s in good]),
        targets=_join_targets([s.targets for s in good]),
        tokens=[t for s in good for t in s.tokens],
        scene_tokens=[t for s in good for t in s.scene_tokens],
        skipped=skipped,
        places=_join_places([s.places for s in good]),
    )


def _join_places(places: Sequence[list[int] | None]) -> list[int] | None:
    known = [place for sample in places if sample is not None for place in sample]
    return None if any(sample is None for sample in places) else known


def _join_targets(targets: Sequence[Targets | None]) -> Targets | None:
    known = [t for t in targets if t is not None]
    if len(known) != len(targets):
        return None
    maps = [t.segmentation for t in known if t.segmentation is not None]
    present = [t.segmentation_present for t in known if t.segmentation_present is not None]
    return Targets(
        boxes=[boxes for t in known for boxes in t.boxes],
        segmentation=torch.cat(maps) if maps else None,
        segmentation_present=torch.cat(present) if present else None,
    )
