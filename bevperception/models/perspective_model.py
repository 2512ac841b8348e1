"""A model of the perspective head alone: images become features, features become boxes; there is no BEV.

The first stage of a two-stage training (BEVFormer v2, CVPR 2023, section 3.5): a whole model then starts from
its backbone, neck and perspective head.
"""

from __future__ import annotations

from torch import Tensor, nn

from bevperception.config_model import ModelConfig
from bevperception.models.backbones import build_backbone
from bevperception.models.bev.temporal import as_memory
from bevperception.models.heads.focal_loss import ReduceMean
from bevperception.models.heads.perspective.head import PerspectiveHead
from bevperception.models.image_features import encode_images
from bevperception.models.necks import FPN
from bevperception.structures import BEVMemory, Boxes3D, CameraFrames, ModelOutputs, Targets


class PerspectiveModel(nn.Module):
    """Backbone, neck and perspective head, with the interface of ``bevformer.BEVFormer``.

    Args:
        config: ``perspective.only`` is set; settings of the BEV and of the other heads are not used.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone)
        self.neck = FPN(self.backbone.out_channels, config.bev.channels, config.neck.levels)
        self.perspective = PerspectiveHead(
            settings=config.perspective, in_channels=config.bev.channels, strides=config.level_strides
        )

    def forward(
        self, frames: CameraFrames, memory: BEVMemory | None = None
    ) -> tuple[ModelOutputs, BEVMemory]:
        """Predict boxes in every image.

        Args:
            frames: images and calibration of B vehicles at one instant.
            memory: not used: every frame is predicted alone.

        Returns:
            outputs, whose BEV features are empty (B, C, 0, 0), and a memory of them.
        """
        features = self.image_features(frames)
        bev = features[0].new_zeros(frames.batch_size, self.config.bev.channels, 0, 0)
        outputs = ModelOutputs(bev, None, None, self.perspective(features, frames))
        return outputs, as_memory(bev, frames)

    def image_features(self, frames: CameraFrames) -> list[Tensor]:
        """Features per level (B, N, C, h, w) of all images; zeros for missing cameras."""
        return encode_images(lambda x: self.neck(self.backbone(x)), frames, self.config.size_divisor)

    def losses(
        self, outputs: ModelOutputs, targets: Targets, reduce_mean: ReduceMean = lambda x: x
    ) -> dict[str, Tensor]:
        """Weighted losses of the perspective head by name; see ``BEVFormer.losses``."""
        assert outputs.perspective is not None
        of_head = self.perspective.losses(outputs.perspective, targets, reduce_mean)
        return {f"perspective.{name}": value for name, value in of_head.items()}

    def decode(self, outputs: ModelOutputs) -> list[Boxes3D]:
        """Boxes of every sample in the BEV frame, best first."""
        assert outputs.perspective is not None
        return self.perspective.decode(outputs.perspective)
