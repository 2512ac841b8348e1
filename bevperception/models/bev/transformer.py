"""From image features to BEV features: embeddings, alignment by ego motion, encoder.

The published PerceptionTransformer (BEVFormer, ECCV 2022, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bevperception.can_bus import relative_can_bus
from bevperception.config_model import ModelConfig
from bevperception.geometry import BEVGrid
from bevperception.models.bev.alignment import (
    known_poses,
    published_shift,
    rotate_bev,
    warp_memory,
)
from bevperception.models.bev.encoder import BEVEncoder, BEVEncoderLayer, CameraFeatures, PreviousBEV
from bevperception.models.image_padding import padded_size
from bevperception.models.precision import LayerNorm
from bevperception.structures import BEVMemory, CameraFrames

PILLAR_POINTS = 4
"""Points that a pillar is lifted to, as in all published models."""
SPATIAL_POINTS = 8
"""Sampling points per head and level of spatial cross-attention, as in all published models."""


class CanBusEmbedding(nn.Module):
    """The published models' embedding of the 18-number CAN-bus vector, added to every BEV query.

    Args:
        channels: width of the BEV queries.
        norm: LayerNorm on the result.
    """

    def __init__(self, channels: int, norm: bool = True) -> None:
        super().__init__()
        self.linear1 = nn.Linear(18, channels // 2)
        self.linear2 = nn.Linear(channels // 2, channels)
        self.norm = LayerNorm(channels) if norm else nn.Identity()

    def forward(self, relative_can_bus: Tensor) -> Tensor:
        """(B, 18) to (B, channels); raw values, not normalised."""
        hidden = torch.relu(self.linear1(relative_can_bus))
        embedded: Tensor = self.norm(torch.relu(self.linear2(hidden)))
        return embedded


@dataclass(frozen=True)
class PublishedAlignment:
    """How the published v1 models bring the earlier BEV into the current frame, from CAN-bus vectors.

    Attributes:
        rotate_center: (column, row) that the earlier BEV turns about.
        rotate: turn the earlier BEV.
        shift: shift the reference points.
        can_bus_norm: LayerNorm on the CAN-bus embedding.
    """

    rotate_center: tuple[float, float] = (100.0, 100.0)
    rotate: bool = True
    shift: bool = True
    can_bus_norm: bool = True


class BEVTransformer(nn.Module):
    """Adds the embeddings, aligns the earlier BEV and runs the encoder.

    Args:
        encoder: the BEV encoder.
        grid: BEV grid.
        channels: width.
        level_embeddings: rows of the level embedding, at least the number of levels used.
        camera_embeddings: cameras with a learned embedding, by position; 0 for none.
        published: align by CAN-bus vectors and embed them, as the published v1 models; None warps by the full
            planar motion.
        size_divisor: images were padded to a multiple of this many pixels.
    """

    def __init__(
        self,
        encoder: BEVEncoder,
        grid: BEVGrid,
        channels: int,
        level_embeddings: int,
        *,
        camera_embeddings: int = 0,
        published: PublishedAlignment | None = None,
        size_divisor: int = 1,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.grid = grid
        self.published = published
        self.size_divisor = size_divisor
        self.level_embeds = nn.Parameter(torch.randn(level_embeddings, channels))
        self.camera_embeds = (
            nn.Parameter(torch.randn(camera_embeddings, channels)) if camera_embeddings else None
        )
        self.can_bus_embedding = (
            None if published is None else CanBusEmbedding(channels, published.can_bus_norm)
        )

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
            tokens = maps.flatten(3).transpose(2, 3)  # (B, N, C, h, w) -> (B, N, h*w, C)
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
        assert self.published is not None
        if self.published.rotate:
            features = rotate_bev(features, relative_can[:, -1], self.published.rotate_center)
        shift = published_shift(relative_can, self.grid)
        if not self.published.shift:
            shift = torch.zeros_like(shift)
        # (B, C, rows, columns) -> (B, rows*columns, C)
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
        if self.published is not None:
            if relative_can is None:
                raise ValueError(
                    "alignment 'published' needs the CAN-bus vector of this frame and of the memory, "
                    "and one of them has none (frames.can_bus is None?)"
                )
            return self.published_previous(memory.features, relative_can, memory.valid)
        features, _ = warp_memory(self.grid, memory, frames.bev_to_global)
        shift = features.new_zeros(features.shape[0], 2)
        # (B, C, rows, columns) -> (B, rows*columns, C)
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
        if self.published is not None and frames.can_bus is not None:
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


def build_bev_transformer(config: ModelConfig) -> BEVTransformer:
    """The part between image features and BEV features, with its initial sampling offsets.

    Args:
        config: of the whole model.
    """
    bev = config.bev
    layers = [
        BEVEncoderLayer(
            channels=bev.channels,
            heads=bev.heads,
            temporal_points=bev.temporal_points,
            spatial_points=SPATIAL_POINTS,
            levels=config.feature_levels,
            feedforward_channels=bev.feedforward_channels,
            dropout=bev.dropout,
            temporal_heads=bev.temporal_heads,
        )
        for _ in range(bev.layers)
    ]
    for layer in layers:
        layer.temporal_attention.init_offsets(bev.initial_temporal_reach_cells)
        layer.spatial_attention.init_offsets(bev.initial_reach_cells, PILLAR_POINTS)
    return BEVTransformer(
        BEVEncoder(layers, bev.rows, bev.columns, bev.range_m, PILLAR_POINTS),
        bev.grid,
        bev.channels,
        config.level_embeddings,
        camera_embeddings=bev.camera_embedding,
        published=PublishedAlignment() if bev.alignment == "published" else None,
        size_divisor=config.size_divisor,
    )
