"""Alignment of an earlier BEV with the current frame by ego motion.

Two alignments: :func:`warp_bev` samples the earlier map bilinearly with the full planar motion;
:func:`rotate_bev` and :func:`published_shift` do what the published v1 checkpoints were trained with.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from bevperception.geometry import MAX_COORDINATE_M, BEVGrid
from bevperception.models.selection import all_true
from bevperception.structures import BEVMemory, CameraFrames

BEVWithCoverage = tuple[Tensor, Tensor]
"""BEV features (B, C, rows, columns), and how much of every cell they cover (B, rows, columns) in [0, 1]."""

_SNAP = 2.0**20
"""Sampling positions are rounded to 1/_SNAP of a cell, so that no motion samples cells exactly."""


def known_poses(frames: CameraFrames) -> Tensor:
    """Whether each sample's pose and CAN-bus vector are possible: finite and on Earth.

    Args:
        frames: B samples.

    Returns:
        (B,) bool. Where it is False, the frame neither uses a memory nor becomes one.
    """
    # not a comparison with >, so that NaN counts as unknown
    known = (frames.bev_to_global.abs() <= MAX_COORDINATE_M).flatten(1).all(1)  # (B, 4, 4) -> (B,)
    if frames.can_bus is not None:
        known = known & (frames.can_bus.abs() <= MAX_COORDINATE_M).all(1)
    return known


def relative_pose(a_to_global: Tensor, b_to_global: Tensor) -> Tensor:
    """``a_to_b`` of each sample; NaN for samples whose matrices are not finite or not invertible.

    Args:
        a_to_global, b_to_global: (B, 4, 4), any invertible matrices.

    Returns:
        (B, 4, 4) float64.
    """
    # solve_ex: solve refuses the whole batch for one bad sample.
    a_to_b, failed = torch.linalg.solve_ex(b_to_global.double(), a_to_global.double())
    return torch.where((failed == 0)[:, None, None], a_to_b, math.nan)


def cells_in_previous(grid: BEVGrid, bev_to_global: Tensor, previous_bev_to_global: Tensor) -> Tensor:
    """Positions of the current cells' centres in the earlier map.

    Args:
        grid: of both maps.
        bev_to_global: (B, 4, 4) of the current frame, float64; any invertible matrix, so BEV frames
            that augmentation turned, scaled or mirrored are right too.
        previous_bev_to_global: (B, 4, 4) of the earlier frame.

    Returns:
        (B, rows, columns, 2) continuous (column, row) in the earlier map, float64; not finite for samples
        whose poses do not tell.
    """
    current_to_previous = relative_pose(bev_to_global, previous_bev_to_global)
    centres = grid.cell_centres().to(bev_to_global.device)
    planar = current_to_previous[:, None, None, :2, :2]
    moved = (planar @ centres[..., None]).squeeze(-1) + current_to_previous[:, None, None, :2, 3]
    return (grid.to_cells(moved) * _SNAP).round() / _SNAP


def sample_bilinear(features: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear samples of maps at continuous cells; zeros come in from outside.

    A sample that falls on a cell's centre returns that cell bit for bit.

    Args:
        features: (B, C, rows, columns).
        cells: (B, h, w, 2) continuous (column, row), the centre of the first cell at (0, 0); what is not
            finite lies outside.

    Returns:
        samples (B, C, h, w), and coverage (B, h, w) in [0, 1]: how much of each sample's weight lies
        inside the map.
    """
    batch, channels, rows, columns = features.shape
    height, width = cells.shape[1:3]
    # Cells as rows, as the encoder makes them: a sample then copies rows, not numbers from all over the map.
    # (B, C, rows, columns) -> (B*rows*columns, C)
    cells_of_map = features.flatten(2).transpose(1, 2).reshape(batch * rows * columns, channels)
    first = torch.arange(batch, device=features.device)[:, None] * (rows * columns)
    low = cells.floor()
    fraction = cells - low
    samples = features.new_zeros(batch, height * width, channels)
    coverage = features.new_zeros(batch, height, width)
    for dx in (0, 1):
        for dy in (0, 1):
            column, row = low[..., 0] + dx, low[..., 1] + dy
            inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
            weight_x = fraction[..., 0] if dx else 1 - fraction[..., 0]
            weight_y = fraction[..., 1] if dy else 1 - fraction[..., 1]
            # where, not products: of cells that are not finite, neither is the weight.
            weight = torch.where(inside, weight_x * weight_y, 0.0).to(features.dtype)
            index = torch.where(inside, row * columns + column, 0.0)
            index = (index.long().flatten(1) + first).flatten()  # (B, h, w) -> (B*h*w,)
            # (B*h*w, C) -> (B, h*w, C)
            corner = cells_of_map.index_select(0, index).view(batch, height * width, channels)
            samples = samples + corner * weight.flatten(1)[..., None]  # (B, h, w) -> (B, h*w, 1)
            coverage = coverage + weight
    # (B, h*w, C) -> (B, C, h, w)
    return samples.transpose(1, 2).unflatten(2, (height, width)), coverage


def warp_bev(
    features: Tensor, grid: BEVGrid, bev_to_global: Tensor, previous_bev_to_global: Tensor
) -> tuple[Tensor, Tensor]:
    """Earlier BEV features in the current frame, with the full planar motion.

    Args:
        features: (B, C, rows, columns) of the earlier frame.
        grid: of both frames.
        bev_to_global, previous_bev_to_global: (B, 4, 4) float64.

    Returns:
        features (B, C, rows, columns) and coverage (B, rows, columns), see :func:`sample_bilinear`.
    """
    return sample_bilinear(features, cells_in_previous(grid, bev_to_global, previous_bev_to_global))


def warp_memory(grid: BEVGrid, memory: BEVMemory, bev_to_global: Tensor) -> BEVWithCoverage:
    """Warp a remembered frame into another frame; zeros with coverage 0 for samples without one.

    Args:
        grid: of both frames.
        memory: one frame, which may hold anything for invalid samples.
        bev_to_global: (B, 4, 4) of the frame to warp into.
    """
    valid = memory.valid[:, None, None]
    pose = torch.where(valid, memory.bev_to_global, bev_to_global)
    features = memory.features
    if not all_true(memory.valid):
        # where, not a product: forgotten features may be NaN.
        features = torch.where(valid[..., None], features, 0.0)
    warped, coverage = warp_bev(features, grid, bev_to_global, pose)
    return warped, coverage * valid


def seen_from(frames: CameraFrames, bev_to_global: Tensor) -> CameraFrames:
    """The same images with a calibration for another BEV frame.

    Args:
        frames: what was seen, B samples.
        bev_to_global: (B, 4, 4) float64 of the BEV frame that is asked for; any invertible matrix.

    Returns:
        the frames with ``bev_to_image`` and ``bev_to_global`` replaced.

    Source: the published BEVFormer v2 encodes past frames in the current LiDAR frame this way.
    """
    asked_to_own = relative_pose(bev_to_global, frames.bev_to_global)
    bev_to_image = frames.bev_to_image.double() @ asked_to_own[:, None]
    return replace(frames, bev_to_image=bev_to_image.to(frames.bev_to_image), bev_to_global=bev_to_global)


def rotate_bev(features: Tensor, angle_deg: Tensor, center: tuple[float, float]) -> Tensor:
    """Turn maps about a point, nearest cell, zeros from outside (torchvision's ``rotate``).

    Args:
        features: (B, C, rows, columns).
        angle_deg: (B,) degrees, counter-clockwise as displayed with row 0 at the top; a map whose angle is
            not finite becomes zeros.
        center: (column, row) measured from the upper left corner of the map, in cells.

    Returns:
        (B, C, rows, columns).
    """
    _, _, rows, columns = features.shape
    dtype, device = features.dtype, features.device
    # Pixel centres relative to the middle of the map; the matrix maps outputs to inputs.
    x = torch.arange(columns, dtype=dtype, device=device) + 0.5 - columns * 0.5
    y = torch.arange(rows, dtype=dtype, device=device) + 0.5 - rows * 0.5
    center_x, center_y = center[0] - columns * 0.5, center[1] - rows * 0.5
    grids = []
    outside = torch.full((rows, columns, 2), 2.0, dtype=dtype, device=device)
    for angle in angle_deg.double().tolist():
        if not math.isfinite(angle):
            grids.append(outside)
            continue
        c, s = math.cos(math.radians(-angle)), math.sin(math.radians(-angle))
        theta = torch.tensor(
            [
                [c, s, center_x - c * center_x - s * center_y],
                [-s, c, center_y + s * center_x - c * center_y],
            ],
            dtype=dtype,
            device=device,
        ) / torch.tensor([[0.5 * columns], [0.5 * rows]], dtype=dtype, device=device)
        gx = theta[0, 0] * x[None, :] + theta[0, 1] * y[:, None] + theta[0, 2]
        gy = theta[1, 0] * x[None, :] + theta[1, 1] * y[:, None] + theta[1, 2]
        grids.append(torch.stack((gx, gy), -1))
    return functional.grid_sample(
        features, torch.stack(grids), mode="nearest", padding_mode="zeros", align_corners=False
    )


def published_shift(relative_can_bus: Tensor, grid: BEVGrid) -> Tensor:
    """How far the earlier BEV's reference points move, as the published v1 computes it.

    Args:
        relative_can_bus: (B, 18): ``[:2]`` the ego's displacement in metres, global frame, and ``[-2]``
            its yaw in radians (see ``bevperception.can_bus.relative_can_bus``).
        grid: BEV grid in the lidar frame (y forward).

    Returns:
        (B, 2) (x, y) as fractions of the BEV.
    """
    dx, dy = relative_can_bus[:, 0], relative_can_bus[:, 1]
    bev_angle = relative_can_bus[:, -2] - torch.atan2(dy, dx)
    distance = torch.sqrt(dx * dx + dy * dy)
    shift_y = distance * torch.cos(bev_angle) / grid.cell_y_m / grid.rows
    shift_x = distance * torch.sin(bev_angle) / grid.cell_x_m / grid.columns
    return torch.stack((shift_x, shift_y), dim=-1)
