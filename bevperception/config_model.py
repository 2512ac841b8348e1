"""Settings of the model's parts. Each has its default here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from bevperception.errors import ConfigError
from bevperception.geometry import BEVGrid
from bevperception.ranges import (
    Distinct,
    Increasing,
    Length,
    Name,
    NotEmpty,
    Range,
    Share,
    check_settings,
)
from bevperception.taxonomy import DETECTION_CLASSES, SEGMENTATION_CLASSES

# Upper limits are far beyond anything sensible. They keep a damaged file from asking for all the memory.
MOST_CELLS = 4096
SMALLEST_CELL_M = 0.001
BOX_CODE = 10
Width = Annotated[int, Range(1, 65_536)]
Depth = Annotated[int, Range(1, 100)]
Count = Annotated[int, Range(1, 1024)]
Boxes = Annotated[int, Range(1, 100_000)]
Levels = Annotated[int, Range(1, 10)]
Cells = Annotated[int, Range(1, MOST_CELLS)]
Extent = Annotated[tuple[float, float], Range(-10000.0, 10000.0), Increasing()]
Reach = Annotated[float, Range(0.0, 1000.0)]
Weight = Annotated[float, Range(0.0, 1e6)]


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
class BackboneConfig:
    """Image backbone.

    Args:
        variant: internimage_{micro,t,s,b,l,xl,h,g}, resnet{50,101} or resnet_micro.
        out_indices: stages (0 to 3; strides 4, 8, 16, 32) handed to the neck.
        drop_path_rate: stochastic depth; None takes the variant's own.
        checkpointing: recompute activations in backward to save memory.
        frozen_stages: stages that do not train; -1 trains all, 0 freezes the stem, k the stem and
            the first k stages.
        train_norm: batch norm learns and goes by its batches, as a ResNet from random weights needs; without
            it, as published, it stays what the pretrained weights made it.
        weights: safetensors or .pth file with backbone weights to start from.
    """

    variant: Name = "internimage_micro"
    out_indices: Annotated[tuple[int, ...], NotEmpty, Range(0, 3), Increasing()] = (1, 2, 3)
    drop_path_rate: Annotated[float, Range(0.0, below=1.0)] | None = None
    checkpointing: bool = False
    frozen_stages: Annotated[int, Range(-1, 4)] = -1
    train_norm: bool = False
    weights: str | None = None

    def __post_init__(self) -> None:
        check_settings(self, "model.backbone")


@dataclass
class NeckConfig:
    """Feature pyramid over the backbone's stages.

    Args:
        levels: number of levels handed to the BEV encoder; levels beyond the backbone's stages are
            made by stride-2 convolutions.
        size_divisor: images are padded at the bottom and the right to a multiple of this many pixels. None
            takes the stride of the coarsest level that the BEV samples, at least 32: then points are found
            at the right place of every level. Published models were trained with 32.
    """

    levels: Levels = 3
    size_divisor: Annotated[int, Range(32, 1024)] | None = None

    def __post_init__(self) -> None:
        check_settings(self, "model.neck")


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
        temporal_heads: heads of temporal self-attention; None for as many as the others have. Where a thing
            came from is told by the head that sees it: a few heads tell too few places apart for velocities.
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

    channels: Width = 128
    rows: Cells = 100
    columns: Cells = 100
    x_range_m: Extent = (-51.2, 51.2)
    y_range_m: Extent = (-51.2, 51.2)
    z_range_m: Extent = (-5.0, 3.0)
    layers: Depth = 2
    heads: Count = 4
    pillar_points: Count = 4
    spatial_points: Count = 8
    temporal_heads: Count | None = None
    temporal_points: Count = 4
    first_reach_cells: Reach | None = None
    first_temporal_reach_cells: Reach | None = None
    feedforward_channels: Width = 256
    dropout: Annotated[float, Range(0.0, below=1.0)] = 0.0
    alignment: Literal["warp", "published"] = "warp"
    rotate_center: Annotated[tuple[float, float], Range(-10000.0, 10000.0)] = (100.0, 100.0)
    can_bus: bool = False
    camera_embedding: Annotated[int, Range(0, 1024)] = 0
    feature_levels: Levels | None = None
    feature_levels_embedding: Levels | None = None

    def __post_init__(self) -> None:
        check_settings(self, "model.bev")
        for name, (low, high), cells in (
            ("x_range_m", self.x_range_m, self.columns),
            ("y_range_m", self.y_range_m, self.rows),
        ):
            if (high - low) / cells < SMALLEST_CELL_M:
                raise ConfigError(
                    f"model.bev.{name} ({low:g}, {high:g}) over {cells} cells makes cells of less than "
                    f"{SMALLEST_CELL_M} m"
                )

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
            fuses several (v2). The fields below are the fusion's, but for interval_s.
        past: past frames that are fused with the current one; 0 for a single-frame model.
        future: later frames that are fused; for recorded drives only, a vehicle has none.
        interval_s: 0 takes the frames just before; otherwise the frames nearest to one, two, ... intervals
            ago, in seconds. What was learned of motion at one rate then holds at others.
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
    past: Annotated[int, Range(0, 1000)] = 1
    future: Annotated[int, Range(0, 1000)] = 0
    interval_s: Annotated[float, Range(0.0, 3600.0)] = 0.0
    inner_channels: Width | None = None
    blocks: Depth = 2
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

    @property
    def alone(self) -> bool:
        """Whether every frame stands alone."""
        return self.mode == "fusion" and self.frames == 1

    @property
    def needed(self) -> int:
        """Past frames that a frame is made with."""
        return self.past if self.mode == "fusion" else 1

    def __post_init__(self) -> None:
        check_settings(self, "model.temporal")


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
    weight: Weight = 1.0
    levels: Levels | None = None
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
    radius: Annotated[float, Range(0.001, 1000.0)] = 1.5
    min_side_px: Annotated[float, Range(0.0, 16384.0)] = 4.0
    min_visible: Share = 0.2
    max_depth_m: Annotated[float, Range(0.001, 10000.0)] = 80.0
    score_threshold: Share = 0.05
    per_image: Boxes = 100
    image_iou: Share = 0.6
    merge_share: Annotated[float, Range(0.0, 100.0)] = 0.5
    max_proposals: Boxes = 100

    def __post_init__(self) -> None:
        check_settings(self, "model.perspective")
        check_class_order("model.perspective.classes", self.classes)
        if self.alone and not self.enabled:
            raise ConfigError("perspective.alone needs perspective.enabled")


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
        heads: attention heads.
        points: sampling points per head in the decoder's cross-attention.
        first_reach_cells: as bev.first_reach_cells, for the decoder, in cells of the BEV.
        hidden_layers: hidden layers of the classification and regression branches.
        yaw_convention: 'standard' regresses the yaw of the BEV frame; 'mmdet3d_0.17' the published
            checkpoints' (-yaw - pi/2).
        score_range_m: (x_min, y_min, z_min, x_max, y_max, z_max) that decoded centres lie within.
        max_boxes: at most so many boxes a frame are decoded.
        merge_share: of two decoded boxes of a class whose centres lie nearer than this share of the better
            one's length, the better one stays; 0 keeps both, as published.
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
        velocity: where a box's velocity comes from: its 'queries' as in the paper, or the 'cells', which is
            the centre head's velocity at the box's centre, with the query's added. Needs centres.enabled.
    """

    enabled: bool = True
    classes: tuple[Name, ...] = DETECTION_CLASSES
    queries: Boxes = 300
    query_mode: Literal["learned", "hybrid"] = "learned"
    groups: Depth = 1
    layers: Depth = 3
    heads: Count = 4
    points: Count = 4
    first_reach_cells: Reach | None = None
    hidden_layers: Annotated[int, Range(0, 100)] = 2
    yaw_convention: Literal["standard", "mmdet3d_0.17"] = "standard"
    score_range_m: Annotated[tuple[float, float, float, float, float, float], Range(-10000.0, 10000.0)] = (
        -61.2,
        -61.2,
        -10.0,
        61.2,
        61.2,
        10.0,
    )
    max_boxes: Boxes = 300
    merge_share: Annotated[float, Range(0.0, 100.0)] = 0.0
    class_loss_weight: Weight = 2.0
    box_loss_weight: Weight = 0.25
    class_cost_weight: Weight = 2.0
    box_cost_weight: Weight = 0.25
    unknown_velocity: Literal["velocity", "box"] = "velocity"
    box_loss: Literal["l1", "smooth_l1"] = "l1"
    focal_alpha: Share = 0.25
    focal_gamma: Annotated[float, Range(0.0, 100.0)] = 2.0
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
        lowest, highest = self.score_range_m[:3], self.score_range_m[3:]
        if not all(low < high for low, high in zip(lowest, highest, strict=True)):
            raise ConfigError(
                "model.detection.score_range_m must be three smallest and then three larger coordinates, "
                f"got {self.score_range_m}"
            )
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
        focal_alpha: focal loss alpha; negative for no class balance.
        focal_gamma: focal loss gamma.
    """

    enabled: bool = True
    classes: Annotated[tuple[Name, ...], NotEmpty, Distinct()] = SEGMENTATION_CLASSES
    range_m: Annotated[float, Range(0.1, 10000.0)] = 50.0
    cell_m: Annotated[float, Range(0.001, 1000.0)] = 0.5
    channels: Width = 64
    blocks: Annotated[int, Range(0, 100)] = 2
    focal_weight: Weight = 10.0
    dice_weight: Weight = 1.0
    focal_alpha: Annotated[float, Range(-1.0, 1.0)] = -1.0
    focal_gamma: Annotated[float, Range(0.0, 100.0)] = 2.0

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

    @property
    def level_strides(self) -> tuple[int, ...]:
        """Strides of the neck's levels in pixels, fine to coarse."""
        strides = [4 * 2**stage for stage in self.backbone.out_indices]
        while len(strides) < self.neck.levels:
            strides.append(2 * strides[-1])
        return tuple(strides)

    @property
    def size_divisor(self) -> int:
        """Images are padded to a multiple of this many pixels; see ``neck.size_divisor``."""
        if self.neck.size_divisor is not None:
            return self.neck.size_divisor
        return max(32, *self.level_strides[: self.bev.feature_levels])

    def __post_init__(self) -> None:
        if not (self.detection.enabled or self.segmentation.enabled):
            raise ConfigError("detection.enabled and segmentation.enabled are both false: nothing to predict")
        if self.bev.spatial_points % self.bev.pillar_points:
            raise ConfigError(
                f"bev.spatial_points ({self.bev.spatial_points}) must be a multiple of "
                f"bev.pillar_points ({self.bev.pillar_points})"
            )
        self._check_perspective()
        if self.detection.velocity == "cells" and not self.centres.enabled:
            raise ConfigError("detection.velocity=cells needs centres.enabled, which makes the velocities")
        if self.temporal.mode == "fusion" and (self.bev.can_bus or self.bev.alignment == "published"):
            raise ConfigError(
                "temporal.mode=fusion goes without bev.can_bus and bev.alignment=published, which are v1's"
            )
        if self.temporal.interval_s and (self.bev.can_bus or self.bev.alignment == "published"):
            raise ConfigError(
                "temporal.interval_s goes without bev.can_bus and bev.alignment=published, which know the "
                "frame just before alone"
            )
        for name, heads in (
            ("bev.heads", self.bev.heads),
            ("bev.temporal_heads", self.bev.temporal_heads),
            ("detection.heads", self.detection.heads),
        ):
            if heads is not None and self.bev.channels % heads:
                raise ConfigError(
                    f"bev.channels ({self.bev.channels}) must be a multiple of {name} ({heads})"
                )
        embedded, sampled = self.bev.feature_levels_embedding, self.bev.feature_levels or self.neck.levels
        if embedded is not None and embedded < sampled:
            raise ConfigError(
                f"bev.feature_levels_embedding ({embedded}) must be at least the number of levels that the "
                f"BEV samples ({sampled}: bev.feature_levels, or neck.levels)"
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
