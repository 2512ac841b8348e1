"""From image features to BEV features: embeddings, ego-motion alignment, encoder (PerceptionTransformer)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from bevperception.can_bus import relative_can_bus
from bevperception.geometry import BEVGrid
from bevperception.models.bev.encoder import BEVEncoder, CameraFeatures, PreviousBEV
from bevperception.models.bev.memory import (
    CanBusEmbedding,
    known_poses,
    published_shift,
    rotate_bev,
    warp_bev,
)
from bevperception.models.image_padding import padded_size
from bevperception.structures import BEVMemory, CameraFrames

Alignment = Literal["warp", "published"]


class BEVTransformer(nn.Module):
    """Adds camera, level and CAN-bus embeddings, aligns the earlier BEV and runs the encoder.

    Args:
        encoder: the BEV encoder.
        grid: BEV grid in metres.
        channels: width.
        level_embeddings: rows of the level embedding, at least the number of levels used.
        camera_embeddings: cameras with a learned embedding, by position; 0 for none.
        can_bus: embed the CAN-bus vector.
        can_bus_norm: LayerNorm on that embedding.
        alignment: see ``config.BEVConfig.alignment``.
        rotate_center: (column, row) the published alignment turns about.
        rotate: whether the published alignment turns the earlier BEV.
        shift: whether the published alignment shifts reference points.
        size_divisor: the features are those of images padded to a multiple of this.
    """

    def __init__(
        self,
        encoder: BEVEncoder,
        grid: BEVGrid,
        channels: int,
        level_embeddings: int,
        camera_embeddings: int = 0,
        can_bus: bool = False,
        can_bus_norm: bool = True,
        alignment: Alignment = "warp",
        rotate_center: tuple[float, float] = (100.0, 100.0),
        rotate: bool = True,
        shift: bool = True,
        size_divisor: int = 1,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.grid = grid
        self.alignment = alignment
        self.rotate_center, self.rotate, self.shift = rotate_center, rotate, shift
        self.size_divisor = size_divisor
        self.level_embeds = nn.Parameter(torch.randn(level_embeddings, channels))
        self.camera_embeds = (
            nn.Parameter(torch.randn(camera_embeddings, channels)) if camera_embeddings else None
        )
        self.can_bus_embedding = CanBusEmbedding(channels, can_bus_norm) if can_bus else None

    def camera_features(self, features: Sequence[Tensor], frames: CameraFrames) -> CameraFeatures:
        """Flatten the levels and add the embeddings.

        Args:
            features: per level (B, N, C, h, w).
            frames: the images' calibration and size.

        Raises:
            ValueError: if there are more cameras than camera embeddings.
        """
        levels = []
        for level, maps in enumerate(features):
            tokens = maps.flatten(3).transpose(2, 3)
            if self.camera_embeds is not None:
                cameras = tokens.shape[1]
                if cameras > self.camera_embeds.shape[0]:
                    raise ValueError(
                        f"the model has embeddings for {self.camera_embeds.shape[0]} cameras but got "
                        f"{cameras}; bev.camera_embedding must be at least the number of cameras, or 0"
                    )
                tokens = tokens + self.camera_embeds[:cameras, None]
            levels.append(tokens + self.level_embeds[level])
        shapes = [(int(maps.shape[-2]), int(maps.shape[-1])) for maps in features]
        height, width = frames.images.shape[-2:]
        size = (int(height), int(width))
        return CameraFeatures(
            torch.cat(levels, dim=2),
            shapes,
            frames.bev_to_image,
            size,
            padded_size(size, self.size_divisor),
            frames.camera_mask,
        )

    def embed_queries(self, queries: Tensor, relative_can: Tensor | None) -> Tensor:
        """(B, Q, C) BEV queries plus the CAN-bus embedding of (B, 18), if the model has one."""
        if self.can_bus_embedding is None or relative_can is None:
            return queries
        embedding: Tensor = self.can_bus_embedding(relative_can.to(queries.dtype))
        return queries + embedding[:, None]

    def published_previous(self, features: Tensor, relative_can: Tensor, valid: Tensor) -> PreviousBEV:
        """The earlier BEV turned (nearest) and its reference points shifted, as published.

        Args:
            features: (B, C, rows, columns) of the earlier frame.
            relative_can: (B, 18), see ``bevperception.can_bus.relative_can_bus``.
            valid: (B,) bool.
        """
        if self.rotate:
            features = rotate_bev(features, relative_can[:, -1], self.rotate_center)
        shift = published_shift(relative_can, self.grid)
        if not self.shift:
            shift = torch.zeros_like(shift)
        return PreviousBEV(features.flatten(2).transpose(1, 2), shift, valid)

    def align(self, frames: CameraFrames, memory: BEVMemory, relative_can: Tensor | None) -> PreviousBEV:
        """The memory's features in the current frame, by the model's alignment.

        Args:
            frames: the current frame.
            memory: of the earlier frame.
            relative_can: (B, 18) CAN bus relative to the memory; needed by 'published'.

        Raises:
            ValueError: if 'published' lacks CAN-bus vectors.
        """
        if self.alignment == "published":
            if relative_can is None:
                raise ValueError(
                    "alignment 'published' needs the CAN-bus vector of this frame and of the memory, "
                    "and one of them has none (frames.can_bus is None?)"
                )
            return self.published_previous(memory.features, relative_can, memory.valid)
        # A forgotten sample's matrices may hold anything: let them stand still.
        previous_to_global = torch.where(
            memory.valid[:, None, None], memory.bev_to_global, frames.bev_to_global
        )
        features, _ = warp_bev(memory.features, self.grid, frames.bev_to_global, previous_to_global)
        shift = features.new_zeros(features.shape[0], 2)
        return PreviousBEV(features.flatten(2).transpose(1, 2), shift, memory.valid)

    def forward(
        self,
        features: Sequence[Tensor],
        frames: CameraFrames,
        queries: Tensor,
        position: Tensor,
        memory: BEVMemory | None,
    ) -> Tensor:
        """BEV features of one frame.

        Args:
            features: image features per level, (B, N, C, h, w).
            frames: calibration, poses, CAN bus.
            queries: (rows * columns, C) learned BEV queries.
            position: (rows * columns, C) positional encoding.
            memory: of the frame before, or None.

        Returns:
            (B, rows * columns, C).
        """
        batch = frames.batch_size
        relative_can = None
        if frames.can_bus is not None and (
            self.can_bus_embedding is not None or self.alignment == "published"
        ):
            relative_can = self._relative_can_bus(frames, memory)
        previous = None if memory is None else self.align(frames, memory, relative_can)
        embedded = self.embed_queries(queries.expand(batch, -1, -1), relative_can)
        encoded: Tensor = self.encoder(
            embedded, position[None], self.camera_features(features, frames), previous
        )
        return encoded

    def _relative_can_bus(self, frames: CameraFrames, memory: BEVMemory | None) -> Tensor | None:
        assert frames.can_bus is not None
        # Zeros are what the published data hold where nothing was measured.
        can_bus = torch.where(known_poses(frames)[:, None], frames.can_bus, 0.0)
        if memory is None:
            none = torch.zeros(frames.batch_size, dtype=torch.bool, device=can_bus.device)
            return relative_can_bus(can_bus, can_bus, none)
        if memory.can_bus is None:
            return None
        return relative_can_bus(can_bus, memory.can_bus, memory.valid)
