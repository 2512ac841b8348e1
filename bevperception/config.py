"""Typed configuration: dataclasses filled from YAML files and dotted overrides by jsonargparse.

A YAML file may name a base file (``base: other.yaml``, relative to itself); its own values win.
Unknown keys are refused. Field documentation here is what ``--help`` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from bevperception.config_model import ModelConfig
from bevperception.errors import ConfigError
from bevperception.ranges import Distinct, Increasing, Name, NotEmpty, Range, Share, check_settings
from bevperception.taxonomy import CAMERA_NAMES

MOST_STEPS = 1_000_000_000
Scales = Annotated[tuple[float, float], Range(0.1, 10.0), Increasing(equal=True)]


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
        stream_turns: groups of slots that take turns, so that a step's samples do not resemble those of the
            step before; each group keeps its own memory.
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

    root: Name = "data/nuscenes"
    version: Name = "v1.0-trainval"
    train_split: Name = "train"
    val_split: Name = "val"
    cameras: Annotated[tuple[Name, ...], NotEmpty, Distinct()] = CAMERA_NAMES
    image_size: Annotated[tuple[int, int], Range(1, 16384)] = (448, 800)
    bev_frame: Literal["ego", "lidar"] = "ego"
    history: Annotated[int, Range(0, 1000)] = 0
    future: Annotated[int, Range(0, 1000)] = 0
    history_stride: Annotated[int, Range(1, 1000)] = 1
    history_sampling: Literal["consecutive", "drop_one"] = "consecutive"
    stream_length: Annotated[int, Range(0, 1_000_000)] = 0
    stream_turns: Annotated[int, Range(1, 10_000)] = 1
    workers: Annotated[int, Range(0, 1024)] = 2
    bad_samples: Literal["stop", "skip"] = "stop"
    image_mean: Annotated[tuple[float, float, float], Range(0.0, 255.0)] = (123.675, 116.28, 103.53)
    image_std: Annotated[tuple[float, float, float], Range(0.001, 1000.0)] = (58.395, 57.12, 57.375)
    channel_order: Literal["rgb", "bgr"] = "rgb"
    image_transform: Literal["fast", "published", "published_v2"] = "fast"
    min_points: Annotated[int, Range(0, 1_000_000)] = 1
    can_bus: Literal["exact", "published"] = "exact"
    divider_width_m: Annotated[float, Range(0.001, 100.0)] = 1.0

    def __post_init__(self) -> None:
        check_settings(self, "data")
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
        padding_px: in half of the steps, up to so many pixels of mean colour are added at the bottom of all
            images, and as often at the right, so that a model learns not to depend on where images end.
        camera_dropout: probability that one camera, any of them, is missing from all frames of a queue, so
            that a model learns to do without.
        colour: strength of brightness, contrast and saturation jitter (0 for none).
        bev_rotation_deg: the BEV frame is turned by up to this much either way, degrees.
        bev_scale: range of the BEV frame's scale.
        bev_flip_x: probability of mirroring the BEV frame's x axis.
        bev_flip_y: probability of mirroring the BEV frame's y axis.
    """

    resize: Scales = (1.0, 1.0)
    crop: Share = 0.0
    image_flip: Share = 0.0
    grid_mask: Share = 0.0
    padding_px: Annotated[int, Range(0, 1024)] = 0
    camera_dropout: Share = 0.0
    colour: Share = 0.0
    bev_rotation_deg: Annotated[float, Range(0.0, 180.0)] = 0.0
    bev_scale: Scales = (1.0, 1.0)
    bev_flip_x: Share = 0.0
    bev_flip_y: Share = 0.0

    def __post_init__(self) -> None:
        check_settings(self, "augmentation")


@dataclass
class TrainingConfig:
    """Optimisation.

    Args:
        steps: optimiser steps. A run that is resumed may get more, also after its end, or fewer, but no fewer
            than it has taken: from there on its learning rate is that of a run of so many steps.
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
        initial_weights: weights.safetensors, run folder or checkpoint to start from.
        initial_parts: take only these parts of the model from initial_weights, for example backbone and neck
            of a perspective head's run; none named takes the whole model.
        frozen_parts: these parts of the model stay as they are, for example backbone and neck of
            initial_weights: steps that need no gradient there are about twice as fast.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: so many newest checkpoints stay on disk; 0 keeps all.
        validate_every: steps between evaluations on val_split; 0 evaluates only at the end.
        log_every: steps between log lines.
        tensorboard: write TensorBoard logs beside the CSV ones, if tensorboard is installed.
    """

    steps: Annotated[int, Range(1, MOST_STEPS)] = 1000
    batch_size: Annotated[int, Range(1, 65_536)] = 1
    accumulate: Annotated[int, Range(1, 65_536)] = 1
    learning_rate: Annotated[float, Range(above=0.0, most=10.0)] = 4e-4
    backbone_rate_factor: Annotated[float, Range(0.0, 1000.0)] = 1.0
    weight_decay: Annotated[float, Range(0.0, 10.0)] = 0.01
    warmup_steps: Annotated[int, Range(0, MOST_STEPS)] = 50
    final_rate_factor: Share = 0.01
    gradient_clip: Annotated[float, Range(0.0, 1e9)] = 35.0
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "32-true"
    ema_decay: Annotated[float, Range(0.0, below=1.0)] = 0.0
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    devices: Annotated[int, Range(1, 1024)] = 1
    nodes: Annotated[int, Range(1, 65_536)] = 1
    strategy: Name = "auto"
    accelerator: Name = "auto"
    initial_weights: str | None = None
    initial_parts: Annotated[tuple[Name, ...], Distinct()] = ()
    frozen_parts: Annotated[tuple[Name, ...], Distinct()] = ()
    checkpoint_every: Annotated[int, Range(1, MOST_STEPS)] = 500
    keep_checkpoints: Annotated[int, Range(0, 1_000_000)] = 3
    validate_every: Annotated[int, Range(0, MOST_STEPS)] = 0
    log_every: Annotated[int, Range(1, MOST_STEPS)] = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        check_settings(self, "training")
        if self.initial_parts and not self.initial_weights:
            raise ConfigError("training.initial_parts needs training.initial_weights")


@dataclass
class ExperimentConfig:
    """Everything a training or evaluation run needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        embedded, cameras = self.model.bev.camera_embedding, len(self.data.cameras)
        if 0 < embedded < cameras:
            raise ConfigError(
                f"model.bev.camera_embedding ({embedded}) must be 0 or at least the number of data.cameras "
                f"({cameras})"
            )
