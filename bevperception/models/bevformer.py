"""The whole model, top to bottom: images in, BEV features, boxes and segmentation out.

BEVFormer (Li et al., ECCV 2022) and BEVFormer v2 (Yang et al., CVPR 2023), by settings. The model keeps
no hidden state: what it remembers goes out as :class:`~bevperception.structures.BEVMemory` and comes back
in with the next frame.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from bevperception.config_model import DetectionConfig, ModelConfig, SegmentationConfig
from bevperception.models.backbones import build_backbone
from bevperception.models.bev.encoder import BEVEncoder, BEVEncoderLayer
from bevperception.models.bev.fusion import TemporalFusion, fuse_memory
from bevperception.models.bev.grid import LearnedPositionalEncoding
from bevperception.models.bev.history import choose_frames, frame_before, pick_frames, push
from bevperception.models.bev.memory import known_poses, warp_bev
from bevperception.models.bev.transformer import BEVTransformer
from bevperception.models.heads.box_code import BoxCodec
from bevperception.models.heads.centres import CentreHead, CentreLoss, centre_targets, velocities_at
from bevperception.models.heads.decoder import DecoderLayer, DetectionDecoder
from bevperception.models.heads.detection import DetectionHead, class_columns, decode_detections
from bevperception.models.heads.perspective.stage import build_perspective
from bevperception.models.heads.segmentation import SegmentationHead
from bevperception.models.heads.suppression import drop_duplicates
from bevperception.models.hybrid import HybridQueries, ProposalQueries
from bevperception.models.image_padding import pad_images
from bevperception.models.losses import DetectionLoss, ReduceMean, SegmentationLoss
from bevperception.models.necks import FPN
from bevperception.models.shortcuts import all_true
from bevperception.structures import (
    BEVMemory,
    Boxes3D,
    CameraFrames,
    DetectionOutputs,
    ModelOutputs,
    PerspectiveOutputs,
    Targets,
    select,
)
from bevperception.taxonomy import DETECTION_CLASSES

FIRST_STAGE = ("backbone.", "neck.", "perspective.")
"""Where the names of those parameters begin that a perspective head alone trains."""


class BEVFormer(nn.Module):
    """BEVFormer with a detection head, a segmentation head or both.

    Args:
        config: see :class:`bevperception.config_model.ModelConfig`.

    Raises:
        ConfigError: if the configuration names an unknown part.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bev = config.bev
        self.config = config
        self.grid = bev.grid
        self.backbone = build_backbone(config.backbone)
        self.neck = FPN(self.backbone.out_channels, bev.channels, config.neck.levels)
        self.bev_queries = nn.Embedding(bev.rows * bev.columns, bev.channels)
        self.bev_position = LearnedPositionalEncoding(bev.channels, bev.rows, bev.columns)
        self.bev_transformer = build_bev_transformer(config)
        self.detection = build_detection_head(config) if config.detection.enabled else None
        self.segmentation = build_segmentation_head(config) if config.segmentation.enabled else None
        # Last, so that the same seed gives the parts above the same first weights with and without these.
        self.fusion = build_fusion(config)
        self.perspective = build_perspective(config)
        self.hybrid = build_hybrid(config)
        self.centres = build_centre_head(config)
        self.codec = BoxCodec(config.detection.yaw_convention)
        if config.perspective.alone:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and name.startswith(FIRST_STAGE))

    def forward(
        self, frames: CameraFrames, memory: BEVMemory | None = None
    ) -> tuple[ModelOutputs, BEVMemory]:
        """Perceive one frame.

        Args:
            frames: images and calibration of B vehicles at one instant.
            memory: what the call on the frame before returned; None starts a sequence.

        Returns:
            outputs, and the memory for the next frame. The memory carries gradients; detach it
            (``memory.detach()``) to train through the current frame only.
        """
        if self.config.perspective.alone:
            outputs = self.see(frames)
            return outputs, self.remember(outputs.bev, frames, memory)
        features = self.image_features(frames)
        perspective = None
        if self.perspective is not None and (self.training or self.needs_perspective):
            perspective = self.perspective(features, frames)
        alone = self.encode(features, frames, memory)
        bev = self.fuse(alone, frames, memory)
        segmentation = None if self.segmentation is None else self.segmentation(bev)
        centres = None
        if self.centres is not None and (self.training or self.needs_centres):
            centres = self.centres(bev, self.earlier(frames, memory))
        detection = None
        if self.detection is not None:
            detection = self.detection(bev, self.propose(perspective))
            if self.needs_centres and centres is not None:
                detection = self.read_velocities(detection, centres.velocity)
        outputs = ModelOutputs(bev, detection, segmentation, perspective, centres)
        return outputs, self.remember(alone, frames, memory)

    def see(self, frames: CameraFrames) -> ModelOutputs:
        """The perspective head's predictions alone; nothing is done in the BEV, whose features are zeros.

        Args:
            frames: images and calibration.
        """
        assert self.perspective is not None, "a model without perspective.enabled"
        features = self.image_features(frames)
        bev = features[0].new_zeros(frames.batch_size, self.config.bev.channels, *self.grid_shape)
        return ModelOutputs(bev, None, None, self.perspective(features, frames))

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(rows, columns) of the BEV features."""
        return self.grid.rows, self.grid.columns

    @property
    def needs_perspective(self) -> bool:
        """Whether predictions need the perspective head, beyond its part in training."""
        return self.hybrid is not None or self.config.perspective.alone

    @property
    def needs_centres(self) -> bool:
        """Whether predictions need the centre head, beyond its part in training."""
        return self.config.detection.velocity == "cells"

    def earlier(self, frames: CameraFrames, memory: BEVMemory | None) -> tuple[Tensor, Tensor] | None:
        """The features of the frame before in the current frame, for the centre head to compare.

        Args:
            frames: the current poses.
            memory: of the frames before.

        Returns:
            features (B, C, rows, columns) and what they cover (B, rows, columns), zeros for samples without
            history; None where nobody asks or there is no history.
        """
        temporal = self.config.temporal
        if memory is None or not self.config.centres.compare or temporal.alone:
            return None
        memory = frame_before(memory, frames.timestamps_s, temporal.interval_s)
        there = memory.valid[:, None, None]
        pose = torch.where(there, memory.bev_to_global, frames.bev_to_global)
        # where, not a product: what is forgotten may hold NaN.
        features = torch.where(there[..., None], memory.features, 0.0)
        warped, coverage = warp_bev(features, self.grid, frames.bev_to_global, pose)
        return warped, coverage * there

    def read_velocities(self, detection: DetectionOutputs, velocity: Tensor) -> DetectionOutputs:
        """Add to every box's velocity that of the cells at its centre.

        Args:
            detection: codes (layers, B, queries, 10), centres in metres.
            velocity: (B, 2, rows, columns) m/s.
        """
        codes = detection.box_codes
        cells = self.grid.to_cells(codes[..., :2].transpose(0, 1))
        read = velocities_at(velocity.to(codes.dtype), cells).transpose(0, 1)
        return replace(detection, box_codes=torch.cat((codes[..., :8], codes[..., 8:] + read), dim=-1))

    def propose(self, outputs: PerspectiveOutputs | None) -> ProposalQueries | None:
        """Object queries from the perspective head's predictions; None where the learned ones are all.

        Args:
            outputs: of the perspective head.
        """
        if self.hybrid is None:
            return None
        assert self.perspective is not None
        assert outputs is not None
        queries: ProposalQueries = self.hybrid(self.perspective.proposals(outputs))
        return queries

    def image_features(self, frames: CameraFrames) -> list[Tensor]:
        """Backbone and neck over the cameras that are there.

        A missing camera's pixels are never looked at; its features are zeros. Images are padded first.

        Args:
            frames: images (B, N, 3, H, W) of any size.

        Returns:
            per level (B, N, C, h, w), where h and w are those of the padded images.
        """
        batch, cameras = frames.images.shape[:2]
        # (B, N, 3, H, W) -> (B * N, 3, padded H, padded W)
        images = pad_images(frames.images.flatten(0, 1), self.config.size_divisor)
        mask = frames.camera_mask
        if mask is None or all_true(mask):
            return [f.unflatten(0, (batch, cameras)) for f in self.neck(self.backbone(images))]
        if torch.compiler.is_compiling():
            # How many cameras are there is not known: run on all, without what may be in the pixels.
            there = mask.flatten()[:, None, None, None]
            maps = self.neck(self.backbone(torch.where(there, images, 0.0)))
            return [torch.where(there, f, 0.0).unflatten(0, (batch, cameras)) for f in maps]
        present = mask.flatten().nonzero().squeeze(-1)
        if not present.numel():
            # Shapes and device still come from a forward; nothing of its values is used.
            blank = self.neck(self.backbone(torch.zeros_like(images[:1])))
            return [
                torch.zeros_like(f).expand(batch * cameras, -1, -1, -1).unflatten(0, (batch, -1))
                for f in blank
            ]
        maps = self.neck(self.backbone(images[present]))
        full = [f.new_zeros(batch * cameras, *f.shape[1:]).index_copy(0, present, f) for f in maps]
        return [f.unflatten(0, (batch, cameras)) for f in full]

    def encode(self, features: list[Tensor], frames: CameraFrames, memory: BEVMemory | None) -> Tensor:
        """BEV features of one frame.

        Args:
            features: per level (B, N, C, h, w).
            frames: calibration and poses.
            memory: of the frame before, or None; not looked at by a model that fuses frames afterwards.

        Returns:
            (B, C, rows, columns).
        """
        temporal = self.config.temporal
        if temporal.mode == "fusion":
            memory = None
        elif memory is not None:
            memory = frame_before(memory.keep(known_poses(frames)), frames.timestamps_s, temporal.interval_s)
        features = features[: self.config.bev.feature_levels]
        position = self.bev_position(self.grid.rows, self.grid.columns)
        tokens: Tensor = self.bev_transformer(features, frames, self.bev_queries.weight, position, memory)
        bev: Tensor = tokens.transpose(1, 2).unflatten(2, (self.grid.rows, self.grid.columns))
        return bev

    def fuse(self, bev: Tensor, frames: CameraFrames, memory: BEVMemory | None) -> Tensor:
        """BEV features of one frame with those of the remembered frames around it.

        Args:
            bev: (B, C, rows, columns) of this frame alone, from :meth:`encode`.
            frames: this frame's poses and times.
            memory: other frames' features.

        Returns:
            (B, C, rows, columns); ``bev`` itself for a model without fusion.
        """
        if self.fusion is None:
            return bev
        temporal = self.config.temporal
        current = self.remember(bev, frames)
        # A sequence begins as one that has forgotten all.
        memory = current.keep(torch.zeros_like(current.valid)) if memory is None else memory
        memory = memory.keep(known_poses(frames))
        choice = choose_frames(
            memory, frames.timestamps_s, temporal.past, temporal.future, temporal.interval_s
        )
        chosen = pick_frames(memory, choice)
        return fuse_memory(self.fusion, self.grid, current, chosen, temporal.past, temporal.missing)

    def remember(
        self,
        bev: Tensor,
        frames: CameraFrames,
        memory: BEVMemory | None = None,
        valid: Tensor | None = None,
    ) -> BEVMemory:
        """The memory that the next frame needs.

        Args:
            bev: (B, C, rows, columns) of this frame, from :meth:`encode`.
            frames: this frame's poses and times.
            memory: before this frame.
            valid: (B,) bool, False for samples whose frame is a placeholder; None for all true. A sample
                whose pose is impossible is not remembered either.
        """
        known = known_poses(frames).to(bev.device)
        valid = known if valid is None else known & valid.to(bev.device)
        newest = BEVMemory(bev, frames.bev_to_global, frames.timestamps_s, valid, frames.can_bus)
        temporal = self.config.temporal
        if temporal.alone or (temporal.mode == "recurrent" and temporal.interval_s == 0.0):
            return newest
        return push(memory, newest, temporal.needed, temporal.interval_s)

    def losses(
        self, outputs: ModelOutputs, targets: Targets, reduce_mean: ReduceMean = lambda x: x
    ) -> dict[str, Tensor]:
        """Weighted losses by name; their sum is what training minimises.

        Ground-truth boxes with centres outside the BEV grid are left out: no prediction can reach them.

        Args:
            outputs: of :meth:`forward`.
            targets: ground truth of the same frame.
            reduce_mean: mean of a scalar tensor over processes, for losses that do not depend on how
                a global batch is split.

        Raises:
            ValueError: if a segmentation head is to be trained without segmentation targets.
        """
        losses: dict[str, Tensor] = {}
        if outputs.perspective is not None:
            assert self.perspective is not None
            found = self.perspective.losses(outputs.perspective, targets.boxes, reduce_mean)
            losses |= {f"perspective.{name}": value for name, value in found.items()}
        if outputs.detection is not None:
            # Centres are predicted within the grid (the published pipeline's ObjectRangeFilter).
            reachable = select(targets.boxes, self.grid.contains)
            found = build_detection_loss(self.config.detection)(outputs.detection, reachable, reduce_mean)
            losses |= {f"detection.{name}": value for name, value in found.items()}
        if outputs.segmentation_logits is not None:
            if targets.segmentation is None or targets.segmentation_present is None:
                raise ValueError("the model has a segmentation head but the targets hold no segmentation")
            found = build_segmentation_loss(self.config.segmentation)(
                outputs.segmentation_logits, targets.segmentation, targets.segmentation_present, reduce_mean
            )
            losses |= {f"segmentation.{name}": value for name, value in found.items()}
        if outputs.centres is not None:
            wanted = centre_targets(targets.boxes, self.grid, outputs.centres.heat_logits.shape[1])
            settings = self.config.centres
            found = CentreLoss(settings.heat_weight, settings.velocity_weight)(
                outputs.centres, wanted, reduce_mean
            )
            losses |= {f"centres.{name}": value for name, value in found.items()}
        return losses

    def decode(self, outputs: ModelOutputs) -> list[Boxes3D]:
        """Boxes of every sample in the BEV frame, best first; empty sets without a detection head.

        A perspective head that works alone gives its proposals.

        Args:
            outputs: of :meth:`forward`.
        """
        if self.config.perspective.alone:
            assert self.perspective is not None
            assert outputs.perspective is not None
            return [sample.boxes for sample in self.perspective.proposals(outputs.perspective)]
        if outputs.detection is None:
            empty = outputs.bev.new_zeros(0)
            return [Boxes3D(empty.view(0, 9), empty.long(), empty) for _ in range(outputs.bev.shape[0])]
        settings, found = self.config.detection, outputs.detection.group(0)
        logits, codes = found.class_logits[-1].float(), found.box_codes[-1].float()
        valid = torch.ones(logits.shape[:2], dtype=torch.bool) if found.valid is None else found.valid
        decoded = [
            decode_detections(
                logits[b][valid[b]],
                codes[b][valid[b]],
                self.codec,
                settings.max_boxes,
                settings.score_range_m,
            )
            for b in range(logits.shape[0])
        ]
        if not settings.merge_share:
            return decoded
        return [drop_duplicates(boxes, settings.merge_share) for boxes in decoded]


def _range_m(config: ModelConfig) -> tuple[float, float, float, float, float, float]:
    (x0, x1), (y0, y1), (z0, z1) = config.bev.x_range_m, config.bev.y_range_m, config.bev.z_range_m
    return (x0, y0, z0, x1, y1, z1)


def build_bev_transformer(config: ModelConfig) -> BEVTransformer:
    """The part between image features and BEV features."""
    bev, levels = config.bev, config.bev.feature_levels or config.neck.levels
    layers = [
        BEVEncoderLayer(
            bev.channels,
            bev.heads,
            bev.temporal_points,
            bev.spatial_points,
            levels,
            bev.feedforward_channels,
            bev.dropout,
            bev.temporal_heads,
        )
        for _ in range(bev.layers)
    ]
    for layer in layers:
        layer.temporal_attention.start_within(bev.first_temporal_reach_cells)
        layer.spatial_attention.start_within(bev.first_reach_cells, bev.pillar_points)
    return BEVTransformer(
        BEVEncoder(layers, bev.rows, bev.columns, _range_m(config), bev.pillar_points),
        bev.grid,
        bev.channels,
        bev.feature_levels_embedding or levels,
        bev.camera_embedding,
        bev.can_bus,
        alignment=bev.alignment,
        rotate_center=bev.rotate_center,
        size_divisor=config.size_divisor,
    )


def build_hybrid(config: ModelConfig) -> HybridQueries | None:
    """What makes object queries of proposals; None for learned queries alone."""
    if config.detection.query_mode == "learned":
        return None
    return HybridQueries(config.bev.channels, len(DETECTION_CLASSES), _range_m(config))


def build_fusion(config: ModelConfig) -> TemporalFusion | None:
    """The fusion of several frames' BEV features; None for a model that needs none."""
    temporal = config.temporal
    if temporal.mode == "recurrent" or temporal.frames == 1:
        return None
    return TemporalFusion(
        config.bev.channels,
        temporal.frames,
        temporal.inner_channels,
        temporal.blocks,
        temporal.norm,
        temporal.coverage,
        temporal.residual,
        temporal.checkpointing,
    )


def build_detection_head(config: ModelConfig) -> DetectionHead:
    """Decoder and detection head."""
    bev, detection = config.bev, config.detection
    layers = [
        DecoderLayer(bev.channels, detection.heads, detection.points, bev.feedforward_channels, bev.dropout)
        for _ in range(detection.layers)
    ]
    for layer in layers:
        layer.cross_attention.start_within(detection.first_reach_cells)
    return DetectionHead(
        DetectionDecoder(layers),
        bev.channels,
        len(DETECTION_CLASSES),
        detection.queries,
        detection.hidden_layers,
        _range_m(config),
        detection.groups,
        class_columns(detection.classes),
    )


def build_segmentation_head(config: ModelConfig) -> SegmentationHead:
    """Segmentation head on its own grid."""
    head = config.segmentation
    return SegmentationHead(
        config.bev.channels, head.channels, head.blocks, len(head.classes), config.bev.grid, head.grid
    )


def build_centre_head(config: ModelConfig) -> CentreHead | None:
    """Dense supervision of the BEV features; None without."""
    if not config.centres.enabled:
        return None
    return CentreHead(config.bev.channels, len(DETECTION_CLASSES), config.centres.compare)


def build_detection_loss(config: DetectionConfig) -> DetectionLoss:
    """Loss of the detection head from its settings."""
    return DetectionLoss(
        BoxCodec(config.yaw_convention),
        config.class_loss_weight,
        config.box_loss_weight,
        config.class_cost_weight,
        config.box_cost_weight,
        config.code_weights,
        config.focal_alpha,
        config.focal_gamma,
        smooth=config.box_loss == "smooth_l1",
        smooth_cost=config.box_loss == "smooth_l1",
        keep_unknown_velocity=config.unknown_velocity == "velocity",
    )


def build_segmentation_loss(config: SegmentationConfig) -> SegmentationLoss:
    """Loss of the segmentation head from its settings."""
    return SegmentationLoss(config.focal_weight, config.dice_weight, config.focal_alpha, config.focal_gamma)
