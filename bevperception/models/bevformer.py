"""The whole model, top to bottom: images become features, then a BEV, and the BEV becomes boxes and maps.

BEVFormer (Li et al., ECCV 2022) and BEVFormer v2 (Yang et al., CVPR 2023), by settings. The model keeps no
hidden state: what it remembers goes out as :class:`~bevperception.structures.BEVMemory` and comes back in
with the next frame.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bevperception.config_model import ModelConfig
from bevperception.models.backbones import build_backbone
from bevperception.models.bev.fusion import build_fusion
from bevperception.models.bev.grid import LearnedPositionalEncoding
from bevperception.models.bev.temporal import build_temporal
from bevperception.models.bev.transformer import build_bev_transformer
from bevperception.models.heads.centres import CentreHead
from bevperception.models.heads.detection import DetectionHead
from bevperception.models.heads.focal_loss import ReduceMean
from bevperception.models.heads.hybrid import HybridQueries, ProposalQueries
from bevperception.models.heads.perspective.head import PerspectiveHead
from bevperception.models.heads.segmentation import SegmentationHead
from bevperception.models.image_features import encode_images
from bevperception.models.necks import FPN
from bevperception.structures import (
    BEVMemory,
    Boxes3D,
    CameraFrames,
    CentreOutputs,
    ModelOutputs,
    PerspectiveOutputs,
    Targets,
)


class BEVFormer(nn.Module):
    """BEVFormer with a detection head, a segmentation head or both.

    Args:
        config: see :class:`bevperception.config_model.ModelConfig`.

    Raises:
        ConfigError: the configuration names an unknown part.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bev = config.bev
        self.config = config
        self.backbone = build_backbone(config.backbone)
        self.neck = FPN(self.backbone.out_channels, bev.channels, config.neck.levels)
        self.bev_queries = nn.Embedding(bev.rows * bev.columns, bev.channels)
        self.bev_position = LearnedPositionalEncoding(bev.channels, bev.rows, bev.columns)
        self.bev_transformer = build_bev_transformer(config)
        self.detection: DetectionHead | None = None
        if config.detection.enabled:
            self.detection = DetectionHead(settings=config.detection, bev=bev)
        self.segmentation: SegmentationHead | None = None
        if config.segmentation.enabled:
            self.segmentation = SegmentationHead(settings=config.segmentation, bev=bev)
        # Last, so that one seed gives the parts above the same initial weights with and without these.
        self.fusion = build_fusion(config)
        self.perspective: PerspectiveHead | None = None
        if config.perspective.enabled:
            self.perspective = PerspectiveHead(
                settings=config.perspective, in_channels=bev.channels, strides=config.level_strides
            )
        self.hybrid = HybridQueries(bev=bev) if config.detection.query_mode == "hybrid" else None
        self.centres: CentreHead | None = None
        if config.centres.enabled:
            self.centres = CentreHead(settings=config.centres, bev=bev)
        self.temporal = build_temporal(config.temporal, bev.grid, self.fusion)

    def forward(
        self, frames: CameraFrames, memory: BEVMemory | None = None
    ) -> tuple[ModelOutputs, BEVMemory]:
        """Perceive one frame.

        Args:
            frames: images and calibration of B vehicles at one instant.
            memory: returned by the call on the frame before; None starts a sequence.

        Returns:
            outputs, and the memory for the next frame. The memory carries gradients; detach it
            (``memory.detach()``) to train through the current frame only.
        """
        return self.perceive(self.image_features(frames), frames, memory)

    def perceive(
        self, features: list[Tensor], frames: CameraFrames, memory: BEVMemory | None
    ) -> tuple[ModelOutputs, BEVMemory]:
        """Perceive one frame from the features of its images.

        Args:
            features: of :meth:`image_features`.
            frames, memory: see :meth:`forward`.
        """
        perspective = self._perspective_outputs(features, frames)
        current_bev = self.encode(features, frames, memory)
        bev = self.temporal.fuse(current_bev, frames, memory)
        centres = self._centre_outputs(bev, frames, memory)
        segmentation = None if self.segmentation is None else self.segmentation(bev)
        detection = None
        if self.detection is not None:
            velocity = centres.velocity if centres is not None and self.reads_cell_velocities else None
            detection = self.detection(bev, self.propose(perspective), velocity)
        outputs = ModelOutputs(bev, detection, segmentation, perspective, centres)
        return outputs, self.temporal.remember(current_bev, frames, memory)

    def image_features(self, frames: CameraFrames) -> list[Tensor]:
        """Features of all images, padded to whole cells; zeros for missing cameras.

        Args:
            frames: images (B, N, 3, H, W) of any size.

        Returns:
            per level (B, N, C, h, w), finest first.
        """
        return encode_images(lambda x: self.neck(self.backbone(x)), frames, self.config.size_divisor)

    def encode(self, features: list[Tensor], frames: CameraFrames, memory: BEVMemory | None) -> Tensor:
        """BEV features of one frame, before other frames are fused with it.

        Args:
            features: per level (B, N, C, h, w).
            frames: calibration and poses.
            memory: of the frames before, or None; a model that fuses frames does not use it here.

        Returns:
            (B, C, rows, columns).
        """
        bev = self.config.bev
        tokens: Tensor = self.bev_transformer(
            features[: bev.feature_levels],
            frames,
            self.bev_queries.weight,
            self.bev_position(bev.rows, bev.columns),
            self.temporal.encoder_memory(frames, memory),
        )
        # (B, rows*columns, C) -> (B, C, rows, columns)
        maps: Tensor = tokens.transpose(1, 2).unflatten(2, (bev.rows, bev.columns))
        return maps

    def propose(self, outputs: PerspectiveOutputs | None) -> ProposalQueries | None:
        """Object queries from the perspective head's predictions; None for learned queries alone.

        Args:
            outputs: of the perspective head.
        """
        if self.hybrid is None:
            return None
        assert self.perspective is not None
        assert outputs is not None
        queries: ProposalQueries = self.hybrid(self.perspective.proposals(outputs))
        return queries

    @property
    def reads_can_bus(self) -> bool:
        """Whether frames need a CAN-bus vector."""
        return self.bev_transformer.published is not None

    @property
    def reads_cell_velocities(self) -> bool:
        """Whether boxes take their velocities from the centre head."""
        return self.config.detection.velocity == "cells"

    def losses(
        self, outputs: ModelOutputs, targets: Targets, reduce_mean: ReduceMean = lambda x: x
    ) -> dict[str, Tensor]:
        """Weighted losses by name; their sum is what training minimises.

        Args:
            outputs: of :meth:`forward`.
            targets: ground truth of the same frame.
            reduce_mean: mean of a scalar tensor over processes, for losses that do not depend on how
                a global batch is split.

        Raises:
            ValueError: a segmentation head is to be trained without segmentation targets.
        """
        predictions: list[tuple[str, Any, Any]] = [
            ("perspective", self.perspective, outputs.perspective),
            ("detection", self.detection, outputs.detection),
            ("segmentation", self.segmentation, outputs.segmentation_logits),
            ("centres", self.centres, outputs.centres),
        ]
        losses: dict[str, Tensor] = {}
        for name, head, predicted in predictions:
            if head is not None and predicted is not None:
                of_head = head.losses(predicted, targets, reduce_mean)
                losses |= {f"{name}.{part}": value for part, value in of_head.items()}
        return losses

    def decode(self, outputs: ModelOutputs) -> list[Boxes3D]:
        """Boxes of every sample in the BEV frame, best first; empty sets without a detection head.

        Args:
            outputs: of :meth:`forward`.
        """
        if self.detection is not None and outputs.detection is not None:
            return self.detection.decode(outputs.detection)
        empty = outputs.bev.new_zeros(0)
        return [Boxes3D(empty.view(0, 9), empty.long(), empty) for _ in range(outputs.bev.shape[0])]

    def _perspective_outputs(self, features: list[Tensor], frames: CameraFrames) -> PerspectiveOutputs | None:
        """Predictions in the images, in training and where object queries need them."""
        if self.perspective is None or not (self.training or self.hybrid is not None):
            return None
        outputs: PerspectiveOutputs = self.perspective(features, frames)
        return outputs

    def _centre_outputs(
        self, bev: Tensor, frames: CameraFrames, memory: BEVMemory | None
    ) -> CentreOutputs | None:
        """Predictions in every cell, in training and where boxes need them."""
        if self.centres is None or not (self.training or self.reads_cell_velocities):
            return None
        previous = self.temporal.previous_bev(frames, memory) if self.centres.compares else None
        outputs: CentreOutputs = self.centres(bev, previous)
        return outputs
