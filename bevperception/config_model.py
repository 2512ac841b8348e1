"""Settings of the model and its parts; those of the heads are in :mod:`bevperception.config_heads`.

Each has its default here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from bevperception.config_heads import CentreConfig as CentreConfig
from bevperception.config_heads import DetectionConfig as DetectionConfig
from bevperception.config_heads import PerspectiveConfig as PerspectiveConfig
from bevperception.config_heads import SegmentationConfig as SegmentationConfig
from bevperception.config_limits import SMALLEST_CELL_M, Cells, Count, Depth, Extent, Levels, Reach, Width
from bevperception.errors import ConfigError
from bevperception.geometry import BEVGrid
from bevperception.ranges import Increasing, Name, NotEmpty, Range, check_settings
from bevperception.taxonomy import SEGMENTATION_CLASSES


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
