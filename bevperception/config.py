"""Typed configuration: dataclasses filled from YAML files and dotted overrides by jsonargparse.

A YAML file may name a base file (``base: other.yaml``, relative to itself); its own values win.
Unknown keys are refused. Field documentation here is what ``--help`` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bevperception.errors import ConfigError
from bevperception.geometry import BEVGrid
from bevperception.taxonomy import CAMERA_NAMES, DETECTION_CLASSES, SEGMENTATION_CLASSES


@dataclass
class BackboneConfig:
    """Image backbone.

    Args:
        variant: internimage_{micro,t,s,b,l,xl,h,g} or resnet{50,101}.
        out_indices: stages (0 to 3; strides 4, 8, 16, 32) handed to the neck.
        drop_path_rate: stochastic depth; None takes the variant's own.
        checkpointing: recompute activations in backward to save memory.
        frozen_stages: stages that do not train; -1 trains all, 0 freezes the stem, k the stem and
            the first k stages.
        weights: safetensors or .pth file with backbone weights to start from.
    """

    variant: str = "internimage_micro"
    out_indices: tuple[int, ...] = (1, 2, 3)
    drop_path_rate: float | None = None
    checkpointing: bool = False
    frozen_stages: int = -1
    weights: str | None = None


@dataclass
class NeckConfig:
    """Feature pyramid over the backbone's stages.

    Args:
        levels: number of levels handed to the BEV encoder; levels beyond the backbone's stages are
            made by stride-2 convolutions.
    """

    levels: int = 3


@dataclass
class BEVConfig:
    """The bird's-eye-view grid and its encoder.

    Args:
        channels: width of the BEV features and of the neck.
        rows: cells along y.
        columns: cells along x.
        x_range_m: edges along x in metres, BEV frame.
        y_range_m: edges along y in metres, BEV frame.
        z_range_m: heights between which pillar points lie, metres, BEV frame.
        layers: encoder layers; 0 is not allowed.
        heads: attention heads.
        pillar_points: points a pillar is lifted to in spatial cross-attention.
        spatial_points: sampling points per head and level there, a multiple of pillar_points.
        temporal_points: sampling points per head in temporal self-attention.
        first_reach_cells: how far the outermost sampling points of spatial attention look before training, in
            cells of the image features; the innermost look at their place itself. None for the published
            start, where point p looks p + 1 cells out: right for the published sizes, far off the mark on
            small images.
        first_temporal_reach_cells: the same for temporal attention, in cells of the BEV; as far as what moves
            comes from one frame to the next.
        feedforward_channels: width of the feed-forward layers, here and in the decoder.
        dropout: drop-out in the encoder's and the decoder's attention and feed-forward layers.
        alignment: how earlier BEV features are brought into the current frame: 'warp' samples them
            bilinearly with the full planar motion; 'published' turns them by the yaw difference
            (nearest cell) and shifts reference points, as the published v1 checkpoints were trained.
        rotate_center: (column, row) that 'published' turns about; the published models keep (100, 100).
        can_bus: add an embedding of the 18-number CAN-bus vector to the BEV queries.
        camera_embedding: number of cameras that have a learned embedding of their own (by position in
            the batch); 0 for none, which makes the model independent of the cameras' order.
        feature_levels: neck levels it looks at; None for all.
        feature_levels_embedding: rows of the level embedding; None takes neck.levels (the published
            models keep 4 rows even where one level is used).
    """

    channels: int = 128
    rows: int = 100
    columns: int = 100
    x_range_m: tuple[float, float] = (-51.2, 51.2)
    y_range_m: tuple[float, float] = (-51.2, 51.2)
    z_range_m: tuple[float, float] = (-5.0, 3.0)
    layers: int = 2
    heads: int = 4
    pillar_points: int = 4
    spatial_points: int = 8
    temporal_points: int = 4
    first_reach_cells: float | None = None
    first_temporal_reach_cells: float | None = None
    feedforward_channels: int = 256
    dropout: float = 0.0
    alignment: Literal["warp", "published"] = "warp"
    rotate_center: tuple[float, float] = (100.0, 100.0)
    can_bus: bool = False
    camera_embedding: int = 0
    feature_levels: int | None = None
    feature_levels_embedding: int | None = None

    @property
    def grid(self) -> BEVGrid:
        """The grid of the BEV features."""
        return BEVGrid(*self.x_range_m, *self.y_range_m, self.rows, self.columns)


@dataclass
class TemporalConfig:
    """How other frames come in: BEVFormer v1's recurrence, or v2's fusion of several frames.

    Args:
        mode: 'recurrent' hands the BEV features of the frame before to temporal self-attention (v1);
            'fusion' makes every frame's BEV features from that frame alone, keeps them, and warps and
            fuses several (v2). The fields below are the fusion's.
        past: past frames that are fused with the current one; 0 for a single-frame model.
        future: later frames that are fused; for recorded drives only, a vehicle has none.
        interval_s: 0 fuses the frames just before; otherwise the frames nearest to one, two, ...
            intervals ago, in seconds.
        inner_channels: width of the residual blocks; None takes bev.channels for every frame.
        blocks: residual blocks.
        norm: of the residual blocks, 'group' or 'batch' (published).
        coverage: tell the fusion by a channel a frame which cells that frame's map covers.
        missing: what stands for a frame that is not there: 'zeros', or the 'nearest' one (published).
        residual: add the fusion's result to the current features, from nothing at first; False replaces
            them (published).
        history_frame: 'own' encodes every frame in its own BEV frame and warps; 'current' encodes a
            training queue's history in the current BEV frame, as published. Streaming always warps.
        history_gradients: train through the history too, with its activations recomputed in backward.
        checkpointing: recompute the fusion's activations in backward to save memory.
    """

    mode: Literal["recurrent", "fusion"] = "recurrent"
    past: int = 1
    future: int = 0
    interval_s: float = 0.0
    inner_channels: int | None = None
    blocks: int = 2
    norm: Literal["group", "batch"] = "group"
    coverage: bool = True
    missing: Literal["zeros", "nearest"] = "zeros"
    residual: bool = True
    history_frame: Literal["own", "current"] = "own"
    history_gradients: bool = False
    checkpointing: bool = False

    @property
    def frames(self) -> int:
        """Frames that are fused, the current one included."""
        return self.past + 1 + self.future

    def __post_init__(self) -> None:
        for name in ("past", "future", "interval_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"temporal.{name} must not be negative, got {getattr(self, name)}")
        if self.blocks < 1:
            raise ConfigError(f"temporal.blocks must be at least 1, got {self.blocks}")


@dataclass
class PerspectiveConfig:
    """Perspective head: dense 3D detection in every camera image (BEVFormer v2's first stage).

    Args:
        enabled: supervise the images directly; needed for model.detection.query_mode=hybrid.
        alone: train and predict with it alone; the BEV part stands still.
        weight: of its losses among all.
        levels: neck levels it looks at; None for all.
        convolutions: depth of its three towers, at least 1.
        channels: width of the towers; None takes bev.channels.
        norm: of the towers, a level's own: 'group', 'batch' (published) or 'none'.
        classes: order of its classes, names of taxonomy.DETECTION_CLASSES.
        mean_depth_m: first mean depth of every level's objects, at a focal length of 707 pixels.
        std_depth_m: the deviations.
        size_limits_px: between a level and the next coarser one; each level answers for objects whose
            farthest side lies that far from a place.
        radius: places this many strides around the centre of an object answer for it.
        min_side_px: objects that are smaller in the image are no ground truth there.
        min_visible: nor are those of whose rectangle a smaller share lies in the image.
        max_depth_m: largest depth of ground truth and predictions.
        score_threshold: lowest score of a proposal.
        per_image: at most so many places of an image become candidates.
        image_iou: overlap in the image above which the better of two proposals of a class stays.
        merge_share: the same for centres nearer on the ground than this share of the length.
        max_proposals: at most so many a sample.
    """

    enabled: bool = False
    alone: bool = False
    weight: float = 1.0
    levels: int | None = None
    convolutions: int = 2
    channels: int | None = None
    norm: Literal["group", "batch", "none"] = "group"
    classes: tuple[str, ...] = DETECTION_CLASSES
    mean_depth_m: tuple[float, ...] = (44.921, 20.252, 11.712, 7.166, 8.548)
    std_depth_m: tuple[float, ...] = (24.331, 9.833, 6.223, 4.611, 8.275)
    size_limits_px: tuple[float, ...] = (64.0, 128.0, 256.0, 512.0)
    radius: float = 1.5
    min_side_px: float = 4.0
    min_visible: float = 0.2
    max_depth_m: float = 80.0
    score_threshold: float = 0.05
    per_image: int = 100
    image_iou: float = 0.6
    merge_share: float = 0.5
    max_proposals: int = 100

    def __post_init__(self) -> None:
        if sorted(self.classes) != sorted(DETECTION_CLASSES):
            raise ConfigError(
                f"perspective.classes must hold each of {', '.join(DETECTION_CLASSES)} once, "
                f"got {', '.join(self.classes)}"
            )
        if self.convolutions < 1:
            raise ConfigError(f"perspective.convolutions must be at least 1, got {self.convolutions}")
        if self.alone and not self.enabled:
            raise ConfigError("perspective.alone needs perspective.enabled")


@dataclass
class DetectionConfig:
    """Detection decoder and head.

    Args:
        enabled: False for segmentation alone.
        queries: learned object queries.
        query_mode: 'learned' queries alone, or 'hybrid': proposals of the perspective head join them.
        groups: groups of so many queries in training, each of which learns all objects (Group DETR);
            inference uses the first.
        layers: decoder layers.
        heads: attention heads.
        points: sampling points per head in the decoder's cross-attention.
        first_reach_cells: as bev.first_reach_cells, for the decoder, in cells of the BEV.
        hidden_layers: hidden layers of the classification and regression branches.
        yaw_convention: 'standard' regresses the yaw of the BEV frame; 'mmdet3d_0.17' the published
            checkpoints' (-yaw - pi/2).
        score_range_m: (x_min, y_min, z_min, x_max, y_max, z_max) that decoded centres lie within.
        max_boxes: at most so many boxes a frame are decoded.
        class_loss_weight: weight of the focal classification loss.
        box_loss_weight: weight of the L1 box loss.
        class_cost_weight: weight of the focal classification cost in matching.
        box_cost_weight: weight of the L1 box cost in matching.
        unknown_velocity: what a ground-truth box with unknown velocity loses in the box loss: only the
            'velocity', or the whole 'box' as in the published code.
        box_loss: 'l1' as in the paper, or 'smooth_l1', for loss and matching cost.
        focal_alpha: focal loss alpha.
        focal_gamma: focal loss gamma.
        code_weights: weight of each of the 10 box-code entries in the box loss.
    """

    enabled: bool = True
    queries: int = 300
    query_mode: Literal["learned", "hybrid"] = "learned"
    groups: int = 1
    layers: int = 3
    heads: int = 4
    points: int = 4
    first_reach_cells: float | None = None
    hidden_layers: int = 2
    yaw_convention: Literal["standard", "mmdet3d_0.17"] = "standard"
    score_range_m: tuple[float, float, float, float, float, float] = (
        -61.2,
        -61.2,
        -10.0,
        61.2,
        61.2,
        10.0,
    )
    max_boxes: int = 300
    class_loss_weight: float = 2.0
    box_loss_weight: float = 0.25
    class_cost_weight: float = 2.0
    box_cost_weight: float = 0.25
    unknown_velocity: Literal["velocity", "box"] = "velocity"
    box_loss: Literal["l1", "smooth_l1"] = "l1"
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    code_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)


@dataclass
class SegmentationConfig:
    """BEV segmentation head.

    Args:
        enabled: False for detection alone.
        classes: layers to predict, names of taxonomy.SEGMENTATION_CLASSES.
        range_m: the head's grid reaches this far to every side, metres, BEV frame.
        cell_m: its cell size in metres.
        channels: width of its convolutions.
        blocks: residual blocks before the classifier.
        focal_weight: weight of the focal loss.
        dice_weight: weight of the dice loss.
        focal_alpha: focal loss alpha; negative for no class balance.
        focal_gamma: focal loss gamma.
    """

    enabled: bool = True
    classes: tuple[str, ...] = SEGMENTATION_CLASSES
    range_m: float = 50.0
    cell_m: float = 0.5
    channels: int = 64
    blocks: int = 2
    focal_weight: float = 10.0
    dice_weight: float = 1.0
    focal_alpha: float = -1.0
    focal_gamma: float = 2.0

    @property
    def grid(self) -> BEVGrid:
        """The grid of the segmentation maps."""
        cells = round(2 * self.range_m / self.cell_m)
        return BEVGrid(-self.range_m, self.range_m, -self.range_m, self.range_m, cells, cells)


@dataclass
class CentreConfig:
    """Centre head: dense supervision of the BEV features with centres and velocities, in training only.

    Args:
        enabled: whether there is one.
        heat_weight: weight of the heat map's loss.
        velocity_weight: weight of the velocity's loss.
    """

    enabled: bool = False
    heat_weight: float = 1.0
    velocity_weight: float = 1.0


@dataclass
class ModelConfig:
    """The whole model; its parts are described in their own groups."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    neck: NeckConfig = field(default_factory=NeckConfig)
    bev: BEVConfig = field(default_factory=BEVConfig)
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    perspective: PerspectiveConfig = field(default_factory=PerspectiveConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    centres: CentreConfig = field(default_factory=CentreConfig)

    def __post_init__(self) -> None:
        if not (self.detection.enabled or self.segmentation.enabled):
            raise ConfigError("detection.enabled and segmentation.enabled are both false: nothing to predict")
        if self.bev.spatial_points % self.bev.pillar_points:
            raise ConfigError(
                f"bev.spatial_points ({self.bev.spatial_points}) must be a multiple of "
                f"bev.pillar_points ({self.bev.pillar_points})"
            )
        self._check_perspective()
        if self.temporal.mode == "fusion" and (self.bev.can_bus or self.bev.alignment == "published"):
            raise ConfigError(
                "temporal.mode=fusion goes without bev.can_bus and bev.alignment=published, which are v1's"
            )
        for name, heads in (("bev.heads", self.bev.heads), ("detection.heads", self.detection.heads)):
            if self.bev.channels % heads:
                raise ConfigError(
                    f"bev.channels ({self.bev.channels}) must be a multiple of {name} ({heads})"
                )
        unknown = [c for c in self.segmentation.classes if c not in SEGMENTATION_CLASSES]
        if unknown:
            raise ConfigError(
                f"segmentation.classes has unknown {unknown}; allowed: {', '.join(SEGMENTATION_CLASSES)}"
            )

    def _check_perspective(self) -> None:
        perspective, levels = self.perspective, self.neck.levels
        if self.detection.query_mode == "hybrid" and not (perspective.enabled and self.detection.enabled):
            raise ConfigError(
                "detection.query_mode=hybrid needs detection.enabled and perspective.enabled, "
                "which makes the proposals"
            )
        for name, wanted in (
            ("perspective.levels", perspective.levels),
            ("bev.feature_levels", self.bev.feature_levels),
        ):
            if wanted is not None and not 1 <= wanted <= levels:
                raise ConfigError(f"{name} must lie in 1 to neck.levels ({levels}), got {wanted}")
        wanted = perspective.levels or levels
        short = min(
            len(perspective.mean_depth_m), len(perspective.std_depth_m), len(perspective.size_limits_px) + 1
        )
        if perspective.enabled and short < wanted:
            raise ConfigError(
                f"the perspective head looks at {wanted} levels, but perspective.mean_depth_m, std_depth_m "
                f"and size_limits_px are for {short}"
            )


@dataclass
class DataConfig:
    """A nuScenes-format data set and how its images reach the network.

    Args:
        root: folder that holds samples/, maps/ and the version's tables.
        version: for example v1.0-trainval or v1.0-mini.
        train_split: split or custom split of splits.json to train on.
        val_split: split to evaluate on.
        cameras: camera channels in the order the model sees them.
        image_size: (height, width) of the network's input in pixels; images are resized to fit its
            width and cropped at the top or padded at the bottom.
        bev_frame: 'ego' (x forward, y left), or 'lidar' (x right, y forward) for published weights.
        history: earlier key frames in a training queue.
        future: later key frames in it, for a model that fuses them.
        history_stride: key frames from one frame of the queue to the next; see also temporal.interval_s.
        history_sampling: 'consecutive' takes the key frames just before the current one; 'drop_one' takes
            one more and leaves a random one out, as the published v1 training does.
        stream_length: train on streams instead of queues: every slot of the batch plays segments of so many
            consecutive key frames, and memory goes on from step to step; 0 for queues.
        workers: loader processes; 0 loads in the training process.
        bad_samples: 'stop' at a sample that cannot be read, or 'skip' it, count and report it.
        image_mean: RGB mean subtracted from pixels in 0 to 255.
        image_std: RGB deviation pixels are divided by.
        channel_order: order of the network's input channels; 'bgr' for published caffe-style weights
            (image_mean and image_std are given as RGB all the same).
        image_transform: 'fast' decodes at reduced scale where it can, resizes, then normalises;
            'published' normalises at full size, then resizes and pads at the bottom and the right;
            'published_v2' cuts off the top, resizes bicubically, then normalises.
        min_points: annotations with fewer lidar plus radar points are no ground truth; 0 keeps all.
        can_bus: 'exact' takes the CAN-bus messages, or their equivalent from ego poses where a scene has
            none; 'published' repeats what the published v1 weights were trained with: zeros where there
            are none, and the quaternion's w in all four orientation slots.
        divider_width_m: width that road and lane dividers are drawn with in the BEV segmentation.
    """

    root: str = "data/nuscenes"
    version: str = "v1.0-trainval"
    train_split: str = "train"
    val_split: str = "val"
    cameras: tuple[str, ...] = CAMERA_NAMES
    image_size: tuple[int, int] = (448, 800)
    bev_frame: Literal["ego", "lidar"] = "ego"
    history: int = 0
    future: int = 0
    history_stride: int = 1
    history_sampling: Literal["consecutive", "drop_one"] = "consecutive"
    stream_length: int = 0
    workers: int = 2
    bad_samples: Literal["stop", "skip"] = "stop"
    image_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    image_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    channel_order: Literal["rgb", "bgr"] = "rgb"
    image_transform: Literal["fast", "published", "published_v2"] = "fast"
    min_points: int = 1
    can_bus: Literal["exact", "published"] = "exact"
    divider_width_m: float = 1.0

    def __post_init__(self) -> None:
        if self.history_stride < 1:
            raise ConfigError(f"data.history_stride must be at least 1, got {self.history_stride}")
        for name in ("history", "future", "stream_length"):
            if getattr(self, name) < 0:
                raise ConfigError(f"data.{name} must not be negative, got {getattr(self, name)}")
        if self.stream_length and (self.history or self.future):
            raise ConfigError(
                f"data.stream_length={self.stream_length} trains on streams, whose history is the memory of "
                f"the steps before; set data.history=0 and data.future=0 (got {self.history}, {self.future})"
            )


@dataclass
class AugmentationConfig:
    """Training-time augmentation; the calibration moves with the pixels, the labels with the BEV.

    Args:
        resize: range of extra image scale around the one that fits the input.
        crop: random crop offset as a fraction of the slack left by the resize.
        image_flip: probability of mirroring all images of a frame.
        grid_mask: probability of blotting the squares of a grid out of a frame's images (GridMask); the
            queue's other frames stay whole.
        camera_dropout: probability that one camera, any of them, is missing from all frames of a queue, so
            that a model learns to do without.
        colour: strength of brightness, contrast and saturation jitter (0 for none).
        bev_rotation_deg: the BEV frame is turned by up to this much either way, degrees.
        bev_scale: range of the BEV frame's scale.
        bev_flip_x: probability of mirroring the BEV frame's x axis.
        bev_flip_y: probability of mirroring the BEV frame's y axis.
    """

    resize: tuple[float, float] = (1.0, 1.0)
    crop: float = 0.0
    image_flip: float = 0.0
    grid_mask: float = 0.0
    camera_dropout: float = 0.0
    colour: float = 0.0
    bev_rotation_deg: float = 0.0
    bev_scale: tuple[float, float] = (1.0, 1.0)
    bev_flip_x: float = 0.0
    bev_flip_y: float = 0.0


@dataclass
class TrainingConfig:
    """Optimisation.

    Args:
        steps: optimiser steps.
        batch_size: samples a process and step.
        accumulate: batches whose gradients are added before a step.
        learning_rate: peak rate of AdamW.
        backbone_rate_factor: the backbone's share of the learning rate.
        weight_decay: AdamW weight decay; none on norms, biases and embeddings.
        warmup_steps: linear warm-up, then a cosine to final_rate_factor.
        final_rate_factor: last learning rate as a share of the peak.
        gradient_clip: largest norm of the whole gradient; 0 for none.
        precision: Lightning's precision: 32-true, bf16-mixed or 16-mixed; auto takes bf16-mixed where the
            processor or GPU computes in bfloat16 and 32-true elsewhere.
        ema_decay: decay of the averaged weights that are evaluated and saved; 0 for none.
        seed: seeds weights, order and augmentation.
        devices: processes on this machine.
        nodes: machines.
        strategy: Lightning strategy; auto, ddp, ...
        accelerator: auto, cpu or gpu.
        perspective_steps: so many first steps train the perspective head alone, with its backbone and neck
            (two-stage schedule).
        initial_weights: weights.safetensors, run folder or checkpoint to start from.
        initial_parts: take only these parts of the model from initial_weights, for example backbone and neck
            of a perspective head's run; none named takes the whole model.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: so many newest checkpoints stay on disk; 0 keeps all.
        validate_every: steps between evaluations on val_split; 0 evaluates only at the end.
        log_every: steps between log lines.
        tensorboard: write TensorBoard logs beside the CSV ones, if tensorboard is installed.
    """

    steps: int = 1000
    batch_size: int = 1
    accumulate: int = 1
    learning_rate: float = 4e-4
    backbone_rate_factor: float = 1.0
    weight_decay: float = 0.01
    warmup_steps: int = 50
    final_rate_factor: float = 0.01
    gradient_clip: float = 35.0
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "32-true"
    ema_decay: float = 0.0
    seed: int = 0
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"
    accelerator: str = "auto"
    perspective_steps: int = 0
    initial_weights: str | None = None
    initial_parts: tuple[str, ...] = ()
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    validate_every: int = 0
    log_every: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "devices",
            "nodes",
            "checkpoint_every",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "perspective_steps",
            "warmup_steps",
            "validate_every",
            "keep_checkpoints",
            "seed",
            "gradient_clip",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"training.{name} must not be negative, got {getattr(self, name)}")
        if self.initial_parts and not self.initial_weights:
            raise ConfigError("training.initial_parts needs training.initial_weights")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"training.ema_decay must lie in [0, 1), got {self.ema_decay}")


@dataclass
class ExperimentConfig:
    """Everything a training or evaluation run needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.training.perspective_steps and not self.model.perspective.enabled:
            raise ConfigError("training.perspective_steps needs model.perspective.enabled")
