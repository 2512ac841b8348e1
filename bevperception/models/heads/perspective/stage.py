"""The first stage of BEVFormer v2 as the whole model uses it: predictions, losses, proposals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from bevperception.config_model import ModelConfig, PerspectiveConfig
from bevperception.models.heads.perspective.camera import pinholes
from bevperception.models.heads.perspective.codec import CANONICAL_SIZES_M, PerspectiveCodec, flatten
from bevperception.models.heads.perspective.loss import PerspectiveLoss, ReduceMean
from bevperception.models.heads.perspective.network import PerspectiveHead, locations
from bevperception.models.heads.perspective.proposals import ProposalRules, Proposals, propose
from bevperception.models.heads.perspective.targets import Assigner, ImageTargets, image_targets
from bevperception.structures import Boxes3D, CameraFrames, PerspectiveOutputs
from bevperception.taxonomy import DETECTION_CLASSES, MAX_ATTRIBUTES


class PerspectiveStage(nn.Module):
    """The perspective head on the cameras that are there.

    Args:
        config: its settings.
        channels: width of the features.
        strides: of the levels it looks at, in pixels.
    """

    own_class: Tensor

    def __init__(self, config: PerspectiveConfig, channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        levels, depth = len(strides), config.convolutions
        self.config = config
        self.strides = tuple(strides)
        self.head = PerspectiveHead(
            channels,
            len(config.classes),
            strides,
            config.mean_depth_m[:levels],
            config.std_depth_m[:levels],
            depth,
            depth,
            depth,
            MAX_ATTRIBUTES,
            config.norm,
            channels=config.channels,
        )
        sizes = torch.tensor([CANONICAL_SIZES_M[name] for name in config.classes], dtype=torch.float64)
        self.codec = PerspectiveCodec(sizes, max_depth_m=config.max_depth_m)
        limits = (-1.0, *config.size_limits_px[: levels - 1], float("inf"))
        self.assigner = Assigner(
            len(config.classes),
            self.strides,
            tuple(pairwise(limits)),
            config.radius,
        )
        self.loss = PerspectiveLoss(self.codec)
        self.rules = ProposalRules(
            config.score_threshold,
            config.per_image,
            config.image_iou,
            config.merge_share,
            config.max_proposals,
        )
        # The head's classes in the project's order, and the other way round.
        order = torch.tensor([DETECTION_CLASSES.index(name) for name in config.classes])
        self.register_buffer("own_class", order, persistent=False)

    def forward(self, features: Sequence[Tensor], frames: CameraFrames) -> PerspectiveOutputs:
        """Predict in every image.

        Args:
            features: per level (B, N, C, h, w), finest first; levels beyond the stage's are not used.
            frames: images' size, calibration and mask.
        """
        batch, cameras = frames.images.shape[:2]
        mask = frames.camera_mask
        present: Tensor | None = None
        if mask is None:
            images = torch.arange(batch * cameras, device=frames.images.device)
        elif torch.compiler.is_compiling():
            # How many cameras are there is not known: look at all, and let none propose that is not there.
            images, present = torch.arange(batch * cameras, device=mask.device), mask.flatten()
        else:
            images = mask.flatten().nonzero().squeeze(-1)
        there = [level.flatten(0, 1)[images] for level in features[: len(self.strides)]]
        height, width = frames.images.shape[-2:]
        return PerspectiveOutputs(
            self.head(there),
            there,
            images,
            frames.bev_to_image.flatten(0, 1)[images],
            (int(height), int(width)),
            (int(batch), int(cameras)),
            present,
        )

    def targets(self, outputs: PerspectiveOutputs, boxes: Sequence[Boxes3D]) -> list[ImageTargets]:
        """Ground truth of every image.

        Args:
            outputs: for the images and their calibration.
            boxes: of B samples, BEV frame.
        """
        project_to_own = self.own_class.argsort()
        renamed = [Boxes3D(b.values, project_to_own[b.labels], None, b.attributes) for b in boxes]
        config = self.config
        return image_targets(
            [renamed[image // outputs.shape[1]] for image in outputs.images.tolist()],
            pinholes(outputs.bev_to_image),
            outputs.image_size,
            MAX_ATTRIBUTES,
            config.min_side_px,
            config.min_visible,
            config.max_depth_m,
        )

    def losses(
        self, outputs: PerspectiveOutputs, boxes: Sequence[Boxes3D], reduce_mean: ReduceMean
    ) -> dict[str, Tensor]:
        """Losses by name, times the stage's weight.

        Args:
            outputs: of :meth:`forward`.
            boxes: ground truth of B samples, BEV frame.
            reduce_mean: over processes.
        """
        outputs = _of_present(outputs)
        targets = self.targets(outputs, boxes)
        assigned = self.assigner(locations(outputs.levels, self.strides), targets)
        inverse = torch.linalg.inv(pinholes(outputs.bev_to_image).intrinsics)
        found = self.loss(flatten(outputs.levels), assigned, targets, inverse, reduce_mean)
        return {name: self.config.weight * value for name, value in found.items()}

    def proposals(self, outputs: PerspectiveOutputs) -> list[Proposals]:
        """Proposals of B samples with the project's labels, best first."""
        found = propose(outputs, self.strides, self.codec, self.rules)
        for sample in found:
            sample.boxes.labels = self.own_class[sample.boxes.labels]
        return found


def _of_present(outputs: PerspectiveOutputs) -> PerspectiveOutputs:
    """The predictions in images of cameras that are there."""
    if outputs.present is None:
        return outputs
    there = outputs.present.nonzero().squeeze(-1)
    return replace(
        outputs,
        levels=[level._map(lambda value: value[there]) for level in outputs.levels],
        features=[level[there] for level in outputs.features],
        images=outputs.images[there],
        bev_to_image=outputs.bev_to_image[there],
        present=None,
    )


def build_perspective(config: ModelConfig) -> PerspectiveStage | None:
    """The first stage; None where it is not enabled."""
    if not config.perspective.enabled:
        return None
    strides = config.level_strides[: config.perspective.levels]
    return PerspectiveStage(config.perspective, config.bev.channels, strides)
