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
        variant: internimage_{micro,t,s,b,l,xl,h,g}, resnet{50,101}, these with _caffe, resnet101_caffe_dcn
            or resnet_micro.
        out_indices: stages (0 to 3; strides 4, 8, 16, 32) handed to the neck.
        drop_path_rate: stochastic depth; None takes the variant's own.
        checkpointing: recompute the activations of the backbone and of a fusion of frames in backward, to
            save memory.
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
        heads: attention heads, here and in the decoder.
        temporal_heads: heads of temporal self-attention; None for as many as the others have. Each head
            starts with its own direction of motion: velocities need more directions than a few.
        temporal_points: sampling points per head in temporal self-attention.
        initial_reach_cells: initial offset of the outermost sampling points of spatial attention, in cells of
            the image features, and of the decoder's, in cells of the BEV; the innermost start at the
            reference point. None for the published initial offsets, p + 1 cells for point p: right for the
            published sizes, too far on small images.
        initial_temporal_reach_cells: the same for temporal attention, in cells of the BEV: as far as objects
            move from one frame to the next.
        feedforward_channels: width of the feed-forward layers, here and in the decoder.
        dropout: drop-out in the encoder's and the decoder's attention and feed-forward layers.
        alignment: how earlier BEV features are brought into the current frame: 'warp' samples them
            bilinearly with the full planar motion; 'published' turns them by the yaw difference
            (nearest cell), shifts reference points and adds an embedding of the CAN-bus vector to the BEV
            queries, as the published v1 checkpoints were trained.
        camera_embedding: number of cameras that have a learned embedding of their own (by position in
            the batch); 0 for none, which makes the model independent of the cameras' order.
        feature_levels: neck levels that the BEV samples, finest first; None for all.
    """

    channels: Width = 128
    rows: Cells = 100
    columns: Cells = 100
    x_range_m: Extent = (-51.2, 51.2)
    y_range_m: Extent = (-51.2, 51.2)
    z_range_m: Extent = (-5.0, 3.0)
    layers: Depth = 2
    heads: Count = 4
    temporal_heads: Count | None = None
    temporal_points: Count = 4
    initial_reach_cells: Reach | None = None
    initial_temporal_reach_cells: Reach | None = None
    feedforward_channels: Width = 256
    dropout: Annotated[float, Range(0.0, below=1.0)] = 0.0
    alignment: Literal["warp", "published"] = "warp"
    camera_embedding: Annotated[int, Range(0, 1024)] = 0
    feature_levels: Levels | None = None

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

    @property
    def range_m(self) -> tuple[float, float, float, float, float, float]:
        """(x_min, y_min, z_min, x_max, y_max, z_max) in metres, BEV frame."""
        (x0, x1), (y0, y1), (z0, z1) = self.x_range_m, self.y_range_m, self.z_range_m
        return (x0, y0, z0, x1, y1, z1)


@dataclass
class TemporalConfig:
    """How other frames enter: by BEVFormer v1's recurrence, or by v2's fusion of several frames.

    Args:
        mode: 'recurrent' hands the BEV features of the frame before to temporal self-attention (v1). 'fusion'
            encodes every frame alone, keeps its BEV features, and warps and fuses several (v2): group
            normalisation, a channel a frame for what it covers, zeros for missing frames, and a result that
            is added to the current features, from nothing at first. 'fusion_published' is the published v2:
            batch normalisation, the nearest frame in place of a missing one, a result that replaces the
            features, and training queues whose history is encoded in the current BEV frame. The fields below
            are the fusion's, but for interval_s.
        past: past frames that are fused with the current one; 0 for a single-frame model.
        future: later frames that are fused; for recorded drives only, a vehicle has none.
        interval_s: 0 takes the frames just before; otherwise the frames nearest to one, two, ... intervals
            ago, in seconds. Motion that was learned at one frame rate is then right at others.
        inner_channels: width of the residual blocks; None takes bev.channels for every frame.
        blocks: residual blocks.
    """

    mode: Literal["recurrent", "fusion", "fusion_published"] = "recurrent"
    past: Annotated[int, Range(0, 1000)] = 1
    future: Annotated[int, Range(0, 1000)] = 0
    interval_s: Annotated[float, Range(0.0, 3600.0)] = 0.0
    inner_channels: Width | None = None
    blocks: Depth = 2

    @property
    def recurrent(self) -> bool:
        """Whether the frame before enters through temporal self-attention (v1)."""
        return self.mode == "recurrent"

    @property
    def published_fusion(self) -> bool:
        """Whether frames are fused exactly as in the published v2."""
        return self.mode == "fusion_published"

    @property
    def frames(self) -> int:
        """Frames that a fusion takes, the current one included."""
        return self.past + 1 + self.future

    @property
    def single_frame(self) -> bool:
        """Whether the model uses no other frame."""
        return not self.recurrent and self.frames == 1

    @property
    def needed(self) -> int:
        """Past frames that a frame is made with."""
        return 1 if self.recurrent else self.past

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
    def feature_levels(self) -> int:
        """Neck levels that the BEV samples."""
        return self.bev.feature_levels or self.neck.levels

    @property
    def level_embeddings(self) -> int:
        """Rows of the level embedding; the published v1 models have four, even for one level."""
        return max(4, self.feature_levels) if self.bev.alignment == "published" else self.feature_levels

    @property
    def size_divisor(self) -> int:
        """Images are padded to a multiple of this many pixels; see ``neck.size_divisor``."""
        if self.neck.size_divisor is not None:
            return self.neck.size_divisor
        return max(32, *self.level_strides[: self.bev.feature_levels])

    def __post_init__(self) -> None:
        if not (self.detection.enabled or self.segmentation.enabled):
            raise ConfigError("detection.enabled and segmentation.enabled are both false: nothing to predict")
        self._check_perspective()
        if self.detection.velocity == "cells" and not self.centres.enabled:
            raise ConfigError("detection.velocity=cells needs centres.enabled, which makes the velocities")
        if self.bev.alignment == "published" and not self.temporal.recurrent:
            raise ConfigError("temporal.mode=fusion goes without bev.alignment=published, which is v1's")
        if self.bev.alignment == "published" and self.temporal.interval_s:
            raise ConfigError(
                "temporal.interval_s goes without bev.alignment=published, which knows only the frame before"
            )
        for name, heads in (
            ("bev.heads", self.bev.heads),
            ("bev.temporal_heads", self.bev.temporal_heads),
        ):
            if heads is not None and self.bev.channels % heads:
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
        sampled = self.bev.feature_levels
        if sampled is not None and not 1 <= sampled <= levels:
            raise ConfigError(f"bev.feature_levels must lie in 1 to neck.levels ({levels}), got {sampled}")
        short = min(
            len(perspective.mean_depth_m), len(perspective.std_depth_m), len(perspective.size_limits_px) + 1
        )
        if perspective.enabled and short < levels:
            raise ConfigError(
                f"the perspective head looks at {levels} levels, but perspective.mean_depth_m, std_depth_m "
                f"and size_limits_px are for {short}"
            )
