"""Spatial cross-attention: BEV queries look into the cameras that see them (BEVFormer, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bevperception.geometry import MIN_DEPTH_M, project_points
from bevperception.models.bev.deformable import DeformableAttention, SpatialShapes
from bevperception.ops import ms_deform_attn


def project_pillars(
    points_m: Tensor, bev_to_image: Tensor, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Where the points of the pillars fall in the images.

    Args:
        points_m: (D, Q, 3) metres, BEV frame.
        bev_to_image: (B, N, 4, 4) BEV frame to homogeneous pixels; the projection runs in its dtype.
        image_size: (height, width) of the network's (padded) input in pixels.

    Returns:
        reference points (B, N, Q, D, 2), (x, y) as fractions of the image, and visible
        (B, N, Q, D) bool: strictly inside the image and in front of the camera. Where a point is not
        visible its reference point means nothing.
    """
    depth_points, queries, _ = points_m.shape
    flat = points_m.to(bev_to_image.dtype).transpose(0, 1).reshape(1, 1, queries * depth_points, 3)
    pixels, depth = project_points(flat, bev_to_image)
    size = pixels.new_tensor([image_size[1], image_size[0]])
    fractions = (pixels / size).unflatten(2, (queries, depth_points))
    inside = ((fractions > 0) & (fractions < 1)).all(-1)
    return fractions, inside & (depth > MIN_DEPTH_M).unflatten(2, (queries, depth_points))


@dataclass(frozen=True)
class CameraHits:
    """Which queries each camera sees, and where.

    Attributes:
        pairs: for every (sample, camera) that sees something: sample, camera, the queries' indices
            (n,) and their reference points (n, D, 2).
        count: (B, Q, 1) in how many cameras a query is seen, at least 1.
    """

    pairs: Sequence[tuple[int, int, Tensor, Tensor]]
    count: Tensor


def find_hits(
    reference_points: Tensor, visible: Tensor, camera_mask: Tensor | None, dtype: torch.dtype
) -> CameraHits:
    """Collect the queries each camera sees; a query any of whose points is visible counts whole.

    Args:
        reference_points: (B, N, Q, D, 2) from :func:`project_pillars`.
        visible: (B, N, Q, D) bool.
        camera_mask: (B, N) bool, False for missing cameras; None for all there.
        dtype: in which attention will run.
    """
    hit = visible.any(-1)
    if camera_mask is not None:
        hit = hit & camera_mask[:, :, None]
    batch, cameras, _ = hit.shape
    pairs = []
    for b in range(batch):
        for n in range(cameras):
            queries = hit[b, n].nonzero().squeeze(-1)
            if queries.numel():
                pairs.append((b, n, queries, reference_points[b, n, queries].to(dtype)))
    return CameraHits(pairs, hit.sum(1).clamp_min(1).unsqueeze(-1).to(dtype))


class SpatialCrossAttention(DeformableAttention):
    """Deformable attention around the projected points of each query's pillar.

    Sampling point p of a head and level starts from pillar point p mod D. A query's result is the
    mean over the cameras that see it; queries that no camera sees get only the output bias and keep
    their content. Samples of a batch are independent of each other (unlike in the published code).

    Args:
        channels: width of queries and image features.
        heads: attention heads, dividing ``channels``.
        points: sampling points per head and level, a multiple of the pillar points D.
        levels: feature levels of the images.
        dropout: on the output before the residual sum.
    """

    def __init__(self, channels: int, heads: int, points: int, levels: int, dropout: float = 0.0) -> None:
        super().__init__(channels, heads, (levels,), points, dropout)

    def sample(
        self,
        value: Tensor,
        spatial_shapes: SpatialShapes,
        reference_points: Tensor,
        offsets: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Sample one set of projected values around reference points.

        Args:
            value: (B, sum(h * w), heads, C / heads), see :meth:`project_value`.
            spatial_shapes: (h, w) of the levels.
            reference_points: (B, Q, D, 2) fractions of the image.
            offsets, weights: see :meth:`offsets_and_weights`.

        Returns:
            (B, Q, C).
        """
        depth_points = reference_points.shape[-2]
        anchors = reference_points[:, :, None, None, None]
        locations = (offsets.unflatten(-2, (-1, depth_points)) + anchors).flatten(-3, -2)
        return ms_deform_attn(value, spatial_shapes, locations, weights)

    def forward(
        self, query: Tensor, value: Tensor, spatial_shapes: SpatialShapes, hits: CameraHits
    ) -> Tensor:
        """Attend and add to the query.

        Args:
            query: (B, Q, C) running BEV queries.
            value: (B, N, sum(h * w), C) image features of all cameras, levels concatenated.
            spatial_shapes: (h, w) of the levels.
            hits: which queries each camera sees.

        Returns:
            (B, Q, C).
        """
        projected = self.project_value(value)
        offsets, weights = self.offsets_and_weights(query, spatial_shapes)
        batch, queries, channels = query.shape
        slots = query.new_zeros(batch * queries, channels)
        if hits.pairs:
            attended = [
                self.sample(
                    projected[b, n][None],
                    spatial_shapes,
                    points[None],
                    offsets[b, q][None],
                    weights[b, q][None],
                )[0]
                for b, n, q, points in hits.pairs
            ]
            rows = torch.cat([b * queries + q for b, _, q, _ in hits.pairs])
            slots = slots.index_add(0, rows, torch.cat(attended))
        return self.add_to(query, slots.view_as(query) / hits.count)
