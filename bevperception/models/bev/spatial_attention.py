"""Spatial cross-attention: BEV queries look into the cameras that see them (BEVFormer, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bevperception.geometry import MIN_DEPTH_M, project_points
from bevperception.models.bev.deformable import DeformableAttention, SpatialShapes
from bevperception.ops import CompressedRows, deform_attn


def project_pillars(
    points_m: Tensor, bev_to_image: Tensor, image_size: tuple[int, int], padded_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Project the points of the pillars into the images.

    Args:
        points_m: (D, Q, 3) metres, BEV frame.
        bev_to_image: (B, N, 4, 4) BEV frame to homogeneous pixels.
        image_size: (height, width) of the images in pixels.
        padded_size: (height, width) that the feature maps cover in pixels, at least ``image_size``.

    Returns:
        reference points (B, N, Q, D, 2) float64, (x, y) as fractions of the padded size, and visible
        (B, N, Q, D) bool: strictly inside the image and in front of the camera. Where a point is not
        visible its reference point means nothing.
    """
    depth_points, queries, _ = points_m.shape
    # float64: rounded to float32, what a camera sees at its edges would depend on the size of the batch.
    # (D, Q, 3) -> (1, 1, Q*D, 3)
    flat = points_m.double().transpose(0, 1).reshape(1, 1, queries * depth_points, 3)
    pixels, depth = project_points(flat, bev_to_image.double())
    pixels = pixels.unflatten(2, (queries, depth_points))  # (B, N, Q * D, 2) -> (B, N, Q, D, 2)
    inside = ((pixels > 0) & (pixels < pixels.new_tensor(image_size[::-1]))).all(-1)
    fractions = pixels / pixels.new_tensor(padded_size[::-1])
    # (B, N, Q*D) -> (B, N, Q, D)
    return fractions, inside & (depth > MIN_DEPTH_M).unflatten(2, (queries, depth_points))


@dataclass(frozen=True)
class CameraHits:
    """Which cameras see each query, and where; nothing is padded.

    Attributes:
        rows: a row for each of the B * Q queries; its maps are b * N + n for the cameras n that see it.
        reference_points: (entries, D, 2) fractions of the padded image.
    """

    rows: CompressedRows
    reference_points: Tensor


def find_hits(
    reference_points: Tensor, visible: Tensor, camera_mask: Tensor | None, dtype: torch.dtype
) -> CameraHits:
    """Collect the cameras that see each query; a query any of whose points is visible counts whole.

    Args:
        reference_points: (B, N, Q, D, 2) from :func:`project_pillars`.
        visible: (B, N, Q, D) bool.
        camera_mask: (B, N) bool, False for missing cameras; None for all there.
        dtype: in which attention will run.
    """
    hit = visible.any(-1)
    if camera_mask is not None:
        hit = hit & camera_mask[:, :, None]
    by_query = hit.transpose(1, 2)  # (B, Q, N)
    b, q, n = by_query.nonzero(as_tuple=True)
    # (B, Q, N) -> (B*Q + 1,)
    row_start = functional.pad(by_query.sum(-1).flatten().cumsum(0), (1, 0))
    return CameraHits(CompressedRows(row_start, b * hit.shape[1] + n), reference_points[b, n, q].to(dtype))


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
        offsets, logits = self.predict(query)
        depth_points = hits.reference_points.shape[1]
        sampled = deform_attn(
            # (B, N, cells, heads, C/heads) -> (B*N, cells, heads, C/heads)
            self.project_value(value).flatten(0, 1),
            spatial_shapes,
            offsets,
            logits,
            hits.reference_points,
            [p % depth_points for _ in spatial_shapes for p in range(self.points)],
            rows=hits.rows,
        )
        return self.add_to(query, sampled.view_as(query))
