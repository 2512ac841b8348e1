"""Perspective head: the first stage of BEVFormer v2 with its predictions, losses and proposals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from bevperception.config_model import PerspectiveConfig
from bevperception.models.heads.focal_loss import ReduceMean
from bevperception.models.heads.perspective.camera import decompose_projection
from bevperception.models.heads.perspective.codec import CANONICAL_SIZES_M, PerspectiveCodec, flatten
from bevperception.models.heads.perspective.loss import PerspectiveLoss
from bevperception.models.heads.perspective.network import NetworkSettings, PerspectiveNetwork, locations
from bevperception.models.heads.perspective.proposals import ProposalRules, Proposals, propose
from bevperception.models.heads.perspective.targets import Assigner, ImageTargets, image_targets
from bevperception.models.selection import Selection, select_rows
from bevperception.structures import Boxes3D, CameraFrames, PerspectiveOutputs, Targets
from bevperception.taxonomy import DETECTION_CLASSES, MAX_ATTRIBUTES


class PerspectiveHead(nn.Module):
    """Predicts boxes in every image of the cameras that are present (BEVFormer v2, section 3.2).

    Args:
        settings: of the head.
        in_channels: width of the features.
        strides: of the levels in pixels.
    """

    taxonomy_class: Tensor

    def __init__(self, *, settings: PerspectiveConfig, in_channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        levels, depth = len(strides), settings.convolutions
        self.settings = settings
        self.strides = tuple(strides)
        self.head = PerspectiveNetwork(
            NetworkSettings(
                in_channels=in_channels,
                classes=len(settings.classes),
                strides=strides,
                mean_depth_m=settings.mean_depth_m[:levels],
                std_depth_m=settings.std_depth_m[:levels],
                channels=settings.channels,
                class_convolutions=depth,
                box2d_convolutions=depth,
                box3d_convolutions=depth,
                norm=settings.norm,
            )
        )
        sizes = torch.tensor([CANONICAL_SIZES_M[name] for name in settings.classes], dtype=torch.float64)
        self.codec = PerspectiveCodec(sizes)
        limits = (-1.0, *settings.size_limits_px[: levels - 1], float("inf"))
        self.assigner = Assigner(len(settings.classes), self.strides, tuple(pairwise(limits)))
        self.loss = PerspectiveLoss(self.codec)
        self.rules = ProposalRules(settings.score_threshold, settings.max_proposals)
        # From the head's order of classes to the project's.
        order = torch.tensor([DETECTION_CLASSES.index(name) for name in settings.classes])
        self.register_buffer("taxonomy_class", order, persistent=False)

    def forward(self, features: Sequence[Tensor], frames: CameraFrames) -> PerspectiveOutputs:
        """Predict in every image.

        Args:
            features: per level (B, N, C, h, w), finest first.
            frames: size, calibration and mask of the images.
        """
        batch, cameras = frames.images.shape[:2]
        if frames.camera_mask is None:
            selected = Selection(torch.arange(batch * cameras, device=frames.images.device), None)
        else:
            selected = select_rows(frames.camera_mask.flatten())  # (B, N) -> (B*N,)
        # (B, N, C, h, w) -> (M, C, h, w)
        maps = [level.flatten(0, 1)[selected.index] for level in features]
        height, width = frames.images.shape[-2:]
        return PerspectiveOutputs(
            levels=self.head(maps),
            features=maps,
            images=selected.index,
            # (B, N, 4, 4) -> (M, 4, 4)
            bev_to_image=frames.bev_to_image.flatten(0, 1)[selected.index],
            image_size=(int(height), int(width)),
            shape=(int(batch), int(cameras)),
            present=selected.valid,
        )

    def targets(self, outputs: PerspectiveOutputs, boxes: Sequence[Boxes3D]) -> list[ImageTargets]:
        """Project the ground truth into every image.

        Args:
            outputs: for the images and their calibration.
            boxes: of B samples, BEV frame.
        """
        head_class = self.taxonomy_class.argsort()
        renamed = [Boxes3D(b.values, head_class[b.labels], None, b.attributes) for b in boxes]
        return image_targets(
            [renamed[image // outputs.shape[1]] for image in outputs.images.tolist()],
            decompose_projection(outputs.bev_to_image),
            outputs.image_size,
            MAX_ATTRIBUTES,
        )

    def losses(
        self, outputs: PerspectiveOutputs, targets: Targets, reduce_mean: ReduceMean
    ) -> dict[str, Tensor]:
        """Losses by name, times the head's weight.

        Args:
            outputs: of :meth:`forward`.
            targets: ground truth of the same frame.
            reduce_mean: over processes.
        """
        outputs = _of_present(outputs)
        in_images = self.targets(outputs, targets.boxes)
        assigned = self.assigner(locations(outputs.levels, self.strides), in_images)
        inverse = torch.linalg.inv(decompose_projection(outputs.bev_to_image).intrinsics)
        losses = self.loss(flatten(outputs.levels), assigned, in_images, inverse, reduce_mean)
        return {name: self.settings.weight * value for name, value in losses.items()}

    def proposals(self, outputs: PerspectiveOutputs) -> list[Proposals]:
        """Proposals of B samples, best first, with labels of ``taxonomy.DETECTION_CLASSES``."""
        proposals = propose(outputs, self.strides, self.codec, self.rules)
        for sample in proposals:
            sample.boxes.labels = self.taxonomy_class[sample.boxes.labels]
        return proposals

    def decode(self, outputs: PerspectiveOutputs) -> list[Boxes3D]:
        """Boxes of B samples in the BEV frame, best first: the proposals.

        Args:
            outputs: of :meth:`forward`.
        """
        return [sample.boxes for sample in self.proposals(outputs)]


def _of_present(outputs: PerspectiveOutputs) -> PerspectiveOutputs:
    """The predictions in images of cameras that are there."""
    if outputs.present is None:
        return outputs
    index = outputs.present.nonzero().squeeze(-1)
    return replace(
        outputs,
        levels=[level._map(lambda value: value[index]) for level in outputs.levels],
        features=[level[index] for level in outputs.features],
        images=outputs.images[index],
        bev_to_image=outputs.bev_to_image[index],
        present=None,
    )
