"""The data that travel between data set, model, training and vehicle; and a glossary.

Frames (right-handed, metres):

* ego: on the vehicle's rear axle, x forward, y left, z up. LiDAR: on the roof, x right, y forward, z up.
* BEV frame: what the model reasons in, the ego or the LiDAR frame (``data.bev_frame``), perhaps turned,
  scaled or mirrored by augmentation. Global: any frame that stands still, such as the map's.
* camera: x right, y down, z along the optical axis. Image: pixels, (0, 0) the upper left corner of the
  first one.
* A matrix ``a_to_b`` (4, 4) takes points of frame a to frame b.

The BEV:

* cell: a square of the BEV grid; row = y, column = x. The centre of a cell has whole coordinates.
* pillar: the points above a cell at several heights, which are projected into the images.
* BEV query: a learned vector a cell, from which the encoder makes the cell's feature.
* level: one map of the feature pyramid; its stride is the number of pixels that a cell of it covers.
* coverage: the share of a cell, 0 to 1, for which a warped map has features.

Time (seconds, float64; ``_ns`` where ROS counts nanoseconds):

* key frame: an annotated instant of nuScenes, two a second. Sample: its record in the tables; token: the
  key of a record. Scene: twenty seconds of a drive.
* frame: the images of one instant and all that belongs to them (:class:`CameraFrames`).
* memory: BEV features of earlier frames with pose and time (:class:`BEVMemory`). History: the earlier
  frames.
* queue: a frame with its history, as training loads it. Stream: frames one after the other, the memory
  going on.
* slot: a place of a batch that plays a stream; also a place for a remembered frame in a fusion.

Objects:

* box: (x, y, z, length, width, height, yaw, vx, vy) around the centre of the volume; yaw counter-clockwise
  from x.
* box code: the ten numbers that a decoder regresses for a box (``models/heads/box_code.py``).
* object query: a learned vector that becomes one box. Group: equally many queries that learn all objects on
  their own.
* proposal: a box of the perspective head that becomes a further object query (hybrid queries).
* class, attribute: names of ``taxonomy``; labels are positions in ``taxonomy.DETECTION_CLASSES``.
* label, target: ground truth. Logit: a score before the sigmoid.

Letters in shapes: B samples of a batch, N cameras, M images (those of B * N that count), C channels, h and
w cells of a map, Q queries, G boxes of ground truth, P places or points, K classes, L levels, D points of a
pillar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from typing_extensions import Self


@dataclass
class _Movable:
    """Dataclasses of tensors that move between devices as one (also used by Lightning)."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same values on another device; lists and nested structures are followed."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same values in page-locked memory (for DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def share_memory(self) -> Self:
        """The same values in memory that other processes can map; RuntimeError where there is too little."""
        return self._map(lambda tensor: tensor.share_memory_() if tensor.numel() else tensor)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: _map_value(getattr(self, f.name), function) for f in fields(self)}
        return type(self)(**values)


def _map_value(value: object, function: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, _Movable):
        return value._map(function)
    if isinstance(value, list):
        return [_map_value(item, function) for item in value]
    return value


@dataclass
class Boxes3D(_Movable):
    """3D boxes of one frame, in the BEV frame.

    Attributes:
        values: (n, 9) x, y, z (centre of the volume), length, width, height in metres, yaw in radians,
            vx, vy in metres a second (NaN where unknown); see ``geometry.BOX_COLUMNS``.
        labels: (n,) int64 index into ``taxonomy.DETECTION_CLASSES``.
        scores: (n,) in [0, 1], or None for ground truth.
        attributes: (n,) int64 index into the class's ``taxonomy.ATTRIBUTES``, -1 where it has none or it
            is unknown; None where nobody asked.
    """

    values: Tensor
    labels: Tensor
    scores: Tensor | None = None
    attributes: Tensor | None = None

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def __getitem__(self, index: Tensor | slice) -> Boxes3D:
        scores = None if self.scores is None else self.scores[index]
        attributes = None if self.attributes is None else self.attributes[index]
        return Boxes3D(self.values[index], self.labels[index], scores, attributes)


def select(samples: Sequence[Boxes3D], which: Callable[[Tensor], Tensor]) -> list[Boxes3D]:
    """The boxes of several samples that a rule keeps; looked at together, which on a GPU is one wait for it.

    Args:
        samples: none or more, which agree in whether they have scores and attributes.
        which: (n, 9) boxes to (n,) bool.
    """
    if not samples:
        return []
    keep = which(torch.cat([boxes.values for boxes in samples]))
    sample = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(boxes) for boxes in samples]))
    kept = keep.nonzero().squeeze(-1)
    counts = torch.bincount(sample[kept.cpu()], minlength=len(samples)).tolist()

    def split(parts: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        there = [part for part in parts if part is not None]
        return torch.cat(there)[kept].split(counts) if there else [None] * len(samples)

    columns = [
        split([getattr(b, name) for b in samples]) for name in ("values", "labels", "scores", "attributes")
    ]
    return [Boxes3D(*column) for column in zip(*columns, strict=True)]


@dataclass
class CameraFrames(_Movable):
    """Images of one instant with calibration and pose, for a batch of B vehicles with N cameras each.

    Attributes:
        images: (B, N, 3, H, W) float, RGB, normalised, padded to the network's input size; on the way from
            the data set to training, uint8 pixels that are normalised on the model's device.
        bev_to_image: (B, N, 4, 4) BEV frame to homogeneous pixels of ``images``; motion between the
            BEV frame's instant and each camera's exposure is included.
        bev_to_global: (B, 4, 4) float64.
        timestamps_s: (B,) float64 seconds.
        camera_mask: (B, N) bool, False where a camera is missing; None when all are there.
        can_bus: (B, 18) float64 in the layout of the published BEVFormer with absolute values
            (position 3 and orientation 4 of the ego in the global frame, acceleration 3, rotation rate
            3, velocity 3, ego yaw in radians, ego yaw in degrees); None when the model does not use it.
    """

    images: Tensor
    bev_to_image: Tensor
    bev_to_global: Tensor
    timestamps_s: Tensor
    camera_mask: Tensor | None = None
    can_bus: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Number of vehicles B."""
        return int(self.images.shape[0])


@dataclass
class BEVMemory(_Movable):
    """Memory of earlier frames; the model itself keeps none.

    The fields describe the newest remembered frame; models that fuse several have the others in ``older``.

    Attributes:
        features: (B, C, rows, columns) BEV features.
        bev_to_global: (B, 4, 4) float64 of the frame they were made in.
        timestamps_s: (B,) float64 seconds.
        valid: (B,) bool, False for a sample without history (as if memory were None for it).
        can_bus: (B, 18) float64 of that frame or None, see :class:`CameraFrames`.
        older: frames before it, newest first, each without ``older`` of its own.
    """

    features: Tensor
    bev_to_global: Tensor
    timestamps_s: Tensor
    valid: Tensor
    can_bus: Tensor | None = None
    older: list[BEVMemory] = field(default_factory=list)

    @property
    def frames(self) -> list[BEVMemory]:
        """All remembered frames, newest first, each alone."""
        return [self.with_older([]), *self.older]

    def with_older(self, older: list[BEVMemory]) -> BEVMemory:
        """The newest frame with these frames behind it."""
        return replace(self, older=older)

    def keep(self, valid: Tensor) -> BEVMemory:
        """The same memory with everything of the samples outside ``valid`` (B,) bool forgotten."""
        return replace(
            self,
            valid=self.valid & valid.to(self.valid.device),
            older=[frame.keep(valid) for frame in self.older],
        )

    def detach(self) -> BEVMemory:
        """The same memory without a gradient into the past."""
        return self._map(lambda tensor: tensor.detach())


@dataclass
class DetectionOutputs(_Movable):
    """Raw predictions of the decoder's layers, for losses and decoding.

    Attributes:
        class_logits: (layers, B, queries, classes), the classes ordered as ``taxonomy.DETECTION_CLASSES``
            whatever the head's own order.
        box_codes: (layers, B, queries, 10) in the code of ``models.heads.box_code.BoxCodec``.
        groups: groups of equally many queries, each of which predicts all objects.
        valid: (B, queries) bool, False for padding; None where all queries count.
    """

    class_logits: Tensor
    box_codes: Tensor
    groups: int = 1
    valid: Tensor | None = None

    def group(self, index: int) -> DetectionOutputs:
        """One group alone.

        Args:
            index: below ``groups``.
        """
        queries = self.class_logits.shape[2] // self.groups
        part = slice(index * queries, (index + 1) * queries)
        valid = None if self.valid is None else self.valid[:, part]
        return DetectionOutputs(self.class_logits[:, :, part], self.box_codes[:, :, part], 1, valid)


@dataclass
class PerspectiveLevel(_Movable):
    """Raw predictions of the perspective head on one level of M images, K classes.

    Three-dimensional boxes are predicted for every class (K of each component, component by component)
    or, class-agnostic, once.

    Attributes:
        class_logits: (M, K, h, w).
        box2d: (M, 4, h, w) distances to the 2D box's left, top, right and bottom in pixels.
        centreness: (M, 1, h, w) logits.
        quaternion: (M, 4 K, h, w) allocentric rotation, not normalised.
        centre: (M, 2 K, h, w) offset to the projected centre in pixels.
        depth: (M, K, h, w) before scaling by the focal length.
        size: (M, 3 K, h, w) width, length, height before tanh, relative to the canonical size.
        confidence: (M, K, h, w) logits of the 3D box.
        attributes: (M, attributes, h, w) logits.
        speed: (M, 1, h, w) metres a second.
    """

    class_logits: Tensor
    box2d: Tensor
    centreness: Tensor
    quaternion: Tensor
    centre: Tensor
    depth: Tensor
    size: Tensor
    confidence: Tensor
    attributes: Tensor
    speed: Tensor


@dataclass
class PerspectiveOutputs(_Movable):
    """Predictions of the perspective head for M images: those of present cameras, or of all.

    Attributes:
        levels: raw predictions.
        features: per level (M, C, h, w), what they were made from.
        images: (M,) position of every image among the batch's B * N.
        bev_to_image: (M, 4, 4).
        image_size: (height, width) in pixels.
        shape: (B, N).
        present: (M,) bool, False for a camera that is not there; None where all are.
    """

    levels: list[PerspectiveLevel]
    features: list[Tensor]
    images: Tensor
    bev_to_image: Tensor
    image_size: tuple[int, int]
    shape: tuple[int, int]
    present: Tensor | None = None


@dataclass
class CentreOutputs(_Movable):
    """Dense predictions of the centre head, on the grid of the BEV features.

    Attributes:
        heat_logits: (B, classes, rows, columns) of a centre in the cell.
        velocity: (B, 2, rows, columns) vx, vy in m/s, BEV frame.
    """

    heat_logits: Tensor
    velocity: Tensor


@dataclass
class ModelOutputs(_Movable):
    """One frame's outputs.

    Attributes:
        bev: (B, C, rows, columns) BEV features.
        detection: raw detections, or None without a detection head.
        segmentation_logits: (B, classes, rows, columns) on the segmentation head's own grid, or None.
        perspective: raw predictions in the images, where the model has made any.
        centres: dense predictions on the BEV grid, of a centre head in training or where boxes need it.
    """

    bev: Tensor
    detection: DetectionOutputs | None
    segmentation_logits: Tensor | None
    perspective: PerspectiveOutputs | None = None
    centres: CentreOutputs | None = None


@dataclass
class Targets(_Movable):
    """Ground truth of one instant for a batch.

    Attributes:
        boxes: B ground-truth box sets in the BEV frame (possibly empty, velocities possibly NaN).
        segmentation: (B, classes, rows, columns) float 0 or 1 on the segmentation grid, or None.
        segmentation_present: (B, classes) bool, False where a sample has no label for a class (a frame
            without a map); None exactly when ``segmentation`` is None.
    """

    boxes: list[Boxes3D]
    segmentation: Tensor | None = None
    segmentation_present: Tensor | None = None


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read and was skipped.

    Attributes:
        token: nuScenes sample token.
        reason: what was wrong, in one to three lines.
    """

    token: str
    reason: str


@dataclass
class Batch(_Movable):
    """A training or evaluation batch: a queue of frames and the ground truth of the newest.

    Attributes:
        history: other frames in order of time, mostly earlier ones; empty for single-frame training.
        history_valid: (B, len(history)) bool, False where the sample has no such earlier frame (its
            entry in ``history`` is then a placeholder and must start no memory).
        frames: the current frame.
        targets: ground truth of the current frame; None when predicting without labels.
        tokens: B nuScenes sample tokens of the current frame.
        scene_tokens: B scene tokens, which tell a streaming evaluation where memory starts anew.
        skipped: samples that were to be in this batch and could not be read.
        places: which of the places asked for each sample fills, where those of bad samples stay empty. An
            empty list marks a stand-in: a batch whose samples are all bad, and which must not count. None
            where every sample has its place in order.
    """

    history: list[CameraFrames]
    history_valid: Tensor
    frames: CameraFrames
    targets: Targets | None
    tokens: list[str]
    scene_tokens: list[str]
    skipped: list[BadSample] = field(default_factory=list)
    places: list[int] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_stand_in(self) -> bool:
        """Whether the batch only stands in for unreadable samples: nothing may learn from or remember it."""
        return self.places == []


def concatenate_frames(frames: Sequence[CameraFrames]) -> CameraFrames:
    """Batch several frames of equal shape along B.

    Args:
        frames: at least one; camera masks may be None for some, CAN bus for all or none.

    Raises:
        ValueError: if there is none, or only some have CAN-bus data.
    """
    if not frames:
        raise ValueError("concatenate_frames needs at least one frame, got none")
    with_can = [f.can_bus for f in frames if f.can_bus is not None]
    if len(with_can) not in (0, len(frames)):
        raise ValueError("either all frames of a batch carry CAN-bus data or none")
    masks: Tensor | None = None
    if any(f.camera_mask is not None for f in frames):
        full = [torch.ones(f.images.shape[:2], dtype=torch.bool, device=f.images.device) for f in frames]
        masks = torch.cat(
            [m if f.camera_mask is None else f.camera_mask for f, m in zip(frames, full, strict=True)]
        )
    return CameraFrames(
        images=torch.cat([f.images for f in frames]),
        bev_to_image=torch.cat([f.bev_to_image for f in frames]),
        bev_to_global=torch.cat([f.bev_to_global for f in frames]),
        timestamps_s=torch.cat([f.timestamps_s for f in frames]),
        camera_mask=masks,
        can_bus=torch.cat(with_can) if with_can else None,
    )
