"""Settings of the model's heads. Each has its default here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from bevperception.config_limits import (
    BOX_CODE,
    MOST_CELLS,
    Boxes,
    Depth,
    Weight,
    Width,
)
from bevperception.errors import ConfigError
from bevperception.geometry import BEVGrid
from bevperception.ranges import Distinct, Increasing, Length, Name, NotEmpty, Range, Share, check_settings
from bevperception.taxonomy import DETECTION_CLASSES, SEGMENTATION_CLASSES


def check_class_order(name: str, classes: Sequence[str]) -> None:
    """Refuse an order of classes that is not one of all detection classes.

    Args:
        name: of the setting, for the message.
        classes: its value.

    Raises:
        ConfigError: a class is missing, unknown or there twice.
    """
    missing = [c for c in DETECTION_CLASSES if c not in classes]
    unknown = [c for c in classes if c not in DETECTION_CLASSES]
    twice = [c for c in DETECTION_CLASSES if classes.count(c) > 1]
    found = (("missing", missing), ("unknown", unknown), ("twice", twice))
    if missing or unknown or twice:
        wrong = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in found if names)
        raise ConfigError(f"{name} must hold each of {', '.join(DETECTION_CLASSES)} once; {wrong}", name)


@dataclass
class PerspectiveConfig:
    """Perspective head: dense 3D detection in every camera image (BEVFormer v2's first stage).

    Args:
        enabled: supervise the images directly; needed for model.detection.query_mode=hybrid.
        only: the model is this head with backbone and neck, without a BEV: the first stage of a two-stage
            training, whose weights the whole model then starts from (training.initial_weights).
        weight: of its losses among all.
        convolutions: depth of its three towers, at least 1.
        channels: width of the towers; None takes bev.channels.
        norm: of the towers, a level's own: 'group', 'batch' (published) or 'none'.
        classes: order of its classes, names of taxonomy.DETECTION_CLASSES.
        mean_depth_m: first mean depth of every level's objects, at a focal length of 707 pixels.
        std_depth_m: the deviations.
        size_limits_px: between a level and the next coarser one; each level answers for objects whose
            farthest side lies that far from a place.
        score_threshold: lowest score of a proposal.
        max_proposals: at most so many a sample.
    """

    enabled: bool = False
    only: bool = False
    weight: Weight = 1.0
    convolutions: Depth = 2
    channels: Width | None = None
    norm: Literal["group", "batch", "none"] = "group"
    classes: tuple[Name, ...] = DETECTION_CLASSES
    mean_depth_m: Annotated[tuple[float, ...], NotEmpty, Range(0.001, 1000.0)] = (
        44.921,
        20.252,
        11.712,
        7.166,
        8.548,
    )
    std_depth_m: Annotated[tuple[float, ...], NotEmpty, Range(0.001, 1000.0)] = (
        24.331,
        9.833,
        6.223,
        4.611,
        8.275,
    )
    size_limits_px: Annotated[tuple[float, ...], Range(0.001, 16384.0), Increasing()] = (
        64.0,
        128.0,
        256.0,
        512.0,
    )
    score_threshold: Share = 0.05
    max_proposals: Boxes = 100

    def __post_init__(self) -> None:
        check_settings(self, "model.perspective")
        check_class_order("model.perspective.classes", self.classes)
        if self.only and not self.enabled:
            raise ConfigError("perspective.only needs perspective.enabled")


@dataclass
class DetectionConfig:
    """Detection decoder and head.

    Args:
        enabled: False for segmentation alone.
        classes: order of its classes, names of taxonomy.DETECTION_CLASSES. It belongs to the weights:
            published v1 models have nuScenes' order, published v2 models the alphabet's. What the model
            gives out has the order of taxonomy.DETECTION_CLASSES in any case.
        queries: learned object queries.
        query_mode: 'learned' queries alone, or 'hybrid': proposals of the perspective head join them.
        groups: groups of so many queries in training, each of which learns all objects (Group DETR);
            inference uses the first.
        layers: decoder layers.
        yaw_convention: 'standard' regresses the yaw of the BEV frame; 'mmdet3d_0.17' the published
            checkpoints' (-yaw - pi/2).
        max_boxes: at most so many boxes a frame are decoded.
        nms_radius_ratio: non-maximum suppression by distance: of two decoded boxes of a class whose centres
            lie nearer than this share of the better one's length, the better one stays; 0 keeps both, as
            published.
        box_loss_weight: weight of the box loss, and of the same cost in matching; those of the classification
            are 2, as in all published models.
        unknown_velocity: what a ground-truth box with unknown velocity loses in the box loss: only the
            'velocity', or the whole 'box' as in the published code.
        box_loss: 'l1' as in the paper, or 'smooth_l1', for loss and matching cost.
        code_weights: weight of each of the 10 box-code entries in the box loss.
        velocity: where a box's velocity comes from: its 'queries' as in the paper, or the 'cells', which is
            the centre head's velocity at the box's centre, with the query's added. Needs centres.enabled.
    """

    enabled: bool = True
    classes: tuple[Name, ...] = DETECTION_CLASSES
    queries: Boxes = 300
    query_mode: Literal["learned", "hybrid"] = "learned"
    groups: Depth = 1
    layers: Depth = 3
    yaw_convention: Literal["standard", "mmdet3d_0.17"] = "standard"
    max_boxes: Boxes = 300
    nms_radius_ratio: Annotated[float, Range(0.0, 100.0)] = 0.0
    box_loss_weight: Weight = 0.25
    unknown_velocity: Literal["velocity", "box"] = "velocity"
    box_loss: Literal["l1", "smooth_l1"] = "l1"
    code_weights: Annotated[tuple[float, ...], Length(BOX_CODE, BOX_CODE), Range(0.0, 1e6)] = (
        1.0,
        1.0,
        1.0,
        1.0,
        1.0,
        1.0,
        1.0,
        1.0,
        0.2,
        0.2,
    )
    velocity: Literal["queries", "cells"] = "queries"

    def __post_init__(self) -> None:
        check_settings(self, "model.detection")
        check_class_order("model.detection.classes", self.classes)


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
    """

    enabled: bool = True
    classes: Annotated[tuple[Name, ...], NotEmpty, Distinct()] = SEGMENTATION_CLASSES
    range_m: Annotated[float, Range(0.1, 10000.0)] = 50.0
    cell_m: Annotated[float, Range(0.001, 1000.0)] = 0.5
    channels: Width = 64
    blocks: Annotated[int, Range(0, 100)] = 2
    focal_weight: Weight = 10.0
    dice_weight: Weight = 1.0

    def __post_init__(self) -> None:
        check_settings(self, "model.segmentation")
        cells = round(2 * self.range_m / self.cell_m)
        if not 1 <= cells <= MOST_CELLS:
            raise ConfigError(
                f"model.segmentation.range_m ({self.range_m:g}) and cell_m ({self.cell_m:g}) must make "
                f"a grid of 1 to {MOST_CELLS} cells a side, got {cells}"
            )

    @property
    def grid(self) -> BEVGrid:
        """The grid of the segmentation maps."""
        cells = round(2 * self.range_m / self.cell_m)
        return BEVGrid(-self.range_m, self.range_m, -self.range_m, self.range_m, cells, cells)


@dataclass
class CentreConfig:
    """Centre head: dense supervision of the BEV features with centres and velocities.

    It works in training alone, unless detection.velocity asks for its velocities.

    Args:
        enabled: whether there is one.
        compare: it reads velocities from the BEV features and those of the frame before, aligned, instead of
            the current ones alone. Without a frame before it makes do with the current one.
        heat_weight: weight of the heat map's loss.
        velocity_weight: weight of the velocity's loss.
    """

    enabled: bool = False
    compare: bool = False
    heat_weight: Weight = 1.0
    velocity_weight: Weight = 1.0

    def __post_init__(self) -> None:
        check_settings(self, "model.centres")
