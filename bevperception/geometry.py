"""Frames, rigid transforms, projection and boxes.

A matrix is named ``a_to_b`` and maps points of a to points of b: ``p_b = a_to_b @ p_a``. Metres and
radians throughout; 4x4 matrices are float64 outside the model. Boxes are rows of
(x, y, z, length, width, height, yaw, vx, vy): the centre of the volume, length along the heading, yaw
counter-clockwise from the x axis of the frame, velocity in metres a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BOX_COLUMNS = ("x", "y", "z", "length", "width", "height", "yaw", "vx", "vy")
MIN_DEPTH_M = 1e-5
"""Points nearer than this to the camera's plane, or behind it, are not projected (BEVFormer)."""
MAX_COORDINATE_M = 1e8
"""Coordinates beyond this are no place on Earth, in any map."""
RIGID_TOLERANCE = 1e-3
"""How far products of a rotation's columns may be from the identity's, for matrices rounded in files."""

# Corners in units of half the size (length, width, height): bottom face first, counter-clockwise from
# the front left; corner k + 4 stands above corner k.
_CORNER_SIGNS = (
    (1.0, 1.0, -1.0),
    (-1.0, 1.0, -1.0),
    (-1.0, -1.0, -1.0),
    (1.0, -1.0, -1.0),
    (1.0, 1.0, 1.0),
    (-1.0, 1.0, 1.0),
    (-1.0, -1.0, 1.0),
    (1.0, -1.0, 1.0),
)


@dataclass(frozen=True)
class BEVGrid:
    """A rectangular grid on the ground of the BEV frame.

    Maps over it are (..., rows, columns) = (..., y, x) with row 0 at ``y_min_m`` and column 0 at
    ``x_min_m``; the centre of a cell is half a cell in.

    Args:
        x_min_m, x_max_m, y_min_m, y_max_m: edges in metres, BEV frame.
        rows, columns: number of cells along y and x.

    Raises:
        ValueError: if the grid is empty.
    """

    x_min_m: float
    x_max_m: float
    y_min_m: float
    y_max_m: float
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if not (self.x_max_m > self.x_min_m and self.y_max_m > self.y_min_m):
            raise ValueError(f"a BEV grid needs max > min in x and y, got {self}")
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"a BEV grid needs at least one row and one column, got {self}")

    @property
    def cell_x_m(self) -> float:
        """Size of a cell along x (one column) in metres."""
        return (self.x_max_m - self.x_min_m) / self.columns

    @property
    def cell_y_m(self) -> float:
        """Size of a cell along y (one row) in metres."""
        return (self.y_max_m - self.y_min_m) / self.rows

    def cell_centres(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Centres of all cells.

        Returns:
            (rows, columns, 2) x and y in metres, BEV frame.
        """
        x = self.x_min_m + (torch.arange(self.columns, dtype=dtype) + 0.5) * self.cell_x_m
        y = self.y_min_m + (torch.arange(self.rows, dtype=dtype) + 0.5) * self.cell_y_m
        yy, xx = torch.meshgrid(y, x, indexing="ij")
        return torch.stack((xx, yy), dim=-1)

    def contains(self, points_m: Tensor) -> Tensor:
        """Whether points lie over the grid, its edges included.

        Args:
            points_m: (..., 2 or more) x, y in metres, BEV frame.

        Returns:
            (...) bool.
        """
        x, y = points_m[..., 0], points_m[..., 1]
        inside_x = (x >= self.x_min_m) & (x <= self.x_max_m)
        return inside_x & (y >= self.y_min_m) & (y <= self.y_max_m)

    def to_cells(self, points_m: Tensor) -> Tensor:
        """Continuous (column, row) of points; the centre of cell (row 0, column 0) is (0, 0).

        Args:
            points_m: (..., 2 or more) x, y in metres, BEV frame.

        Returns:
            (..., 2) column and row.
        """
        column = (points_m[..., 0] - self.x_min_m) / self.cell_x_m - 0.5
        row = (points_m[..., 1] - self.y_min_m) / self.cell_y_m - 0.5
        return torch.stack((column, row), dim=-1)


def rotation_from_quaternion(quaternion_wxyz: Tensor) -> Tensor:
    """Rotation matrix of a unit quaternion.

    Args:
        quaternion_wxyz: (..., 4) w, x, y, z; normalised here.

    Returns:
        (..., 3, 3).
    """
    w, x, y, z = (quaternion_wxyz / quaternion_wxyz.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = (
        torch.stack((1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)), -1),
        torch.stack((2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)), -1),
        torch.stack((2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)), -1),
    )
    return torch.stack(rows, -2)


def pose_matrix(translation_m: Tensor, quaternion_wxyz: Tensor) -> Tensor:
    """``a_to_b`` from where a's origin lies in b and how a is turned in b (nuScenes' records).

    Args:
        translation_m: (..., 3) metres.
        quaternion_wxyz: (..., 4).

    Returns:
        (..., 4, 4).
    """
    rotation = rotation_from_quaternion(quaternion_wxyz)
    top = torch.cat((rotation, translation_m.unsqueeze(-1)), dim=-1)
    bottom = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*top.shape[:-2], 1, 4)
    return torch.cat((top, bottom), dim=-2)


def invert_rigid(a_to_b: Tensor) -> Tensor:
    """Inverse of rigid transforms, ``b_to_a``.

    Args:
        a_to_b: (..., 4, 4) rotation and translation; a scale or a reflection gives a wrong result.

    Returns:
        (..., 4, 4).
    """
    rotation_t = a_to_b[..., :3, :3].transpose(-1, -2)
    translation = -(rotation_t @ a_to_b[..., :3, 3:])
    return torch.cat((torch.cat((rotation_t, translation), -1), a_to_b[..., 3:, :]), -2)


def is_valid_intrinsics(intrinsics: Tensor) -> bool:
    """Whether a matrix can be a camera's.

    Args:
        intrinsics: camera frame to homogeneous pixels.

    Returns:
        True if it is (3, 3), finite (below a million pixels), invertible beyond rounding, and its last row
        is 0, 0, 1.
    """
    if tuple(intrinsics.shape) != (3, 3) or not bool((intrinsics.abs() < 1e6).all()):
        return False
    last = intrinsics.new_tensor([0.0, 0.0, 1.0])
    singular_values = torch.linalg.svdvals(intrinsics)
    return bool((intrinsics[2] - last).abs().max() < 1e-6 and singular_values[-1] > 1e-9 * singular_values[0])


def rigid_problem(a_to_b: Tensor) -> str:
    """The reason why a matrix is no rigid transform between places on Earth; '' if it is one.

    Args:
        a_to_b: (4, 4).

    Returns:
        the end of a sentence about the matrix, such as 'is not finite'; '' where nothing is wrong.
    """
    # Python's numbers: for one small matrix that takes a tenth of the time of tensors.
    rows: list[list[float]] = a_to_b.tolist()
    if not all(math.isfinite(value) for row in rows for value in row):
        return "is not finite"
    if any(abs(a - b) > RIGID_TOLERANCE for a, b in zip(rows[3], (0.0, 0.0, 0.0, 1.0), strict=True)):
        return f"has the last row {rows[3]} instead of [0, 0, 0, 1]"
    columns = [[row[k] for row in rows[:3]] for k in range(3)]
    for i in range(3):
        for j in range(i, 3):
            product = sum(a * b for a, b in zip(columns[i], columns[j], strict=True))
            # not <=, so that NaN, of numbers whose squares overflow, counts as wrong
            if not abs(product - (i == j)) <= RIGID_TOLERANCE:
                return f"is not a rotation: product of columns {i} and {j} is {product:.4g}, not {i == j:d}"
    x, y, z = columns
    cross = (x[1] * y[2] - x[2] * y[1], x[2] * y[0] - x[0] * y[2], x[0] * y[1] - x[1] * y[0])
    if sum(a * b for a, b in zip(cross, z, strict=True)) < 0.0:
        return "mirrors"
    farthest_m = max(abs(row[3]) for row in rows[:3])
    if farthest_m > MAX_COORDINATE_M:
        return f"lies {farthest_m:.3g} m away"
    return ""


def planar_pose(x_m: float, y_m: float, yaw_rad: float) -> Tensor:
    """``a_to_b`` of a motion in the ground plane.

    Args:
        x_m, y_m: a's origin in b, metres.
        yaw_rad: heading of a's x axis in b, radians, counter-clockwise.

    Returns:
        (4, 4) float64.
    """
    c, s = math.cos(yaw_rad), math.sin(yaw_rad)
    return torch.tensor([[c, -s, 0, x_m], [s, c, 0, y_m], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)


def yaw_of(a_to_b: Tensor) -> Tensor:
    """Heading of a's x axis in b's ground plane.

    Args:
        a_to_b: (..., 4, 4) or (..., 3, 3).

    Returns:
        (...) radians in (-pi, pi].
    """
    return torch.atan2(a_to_b[..., 1, 0], a_to_b[..., 0, 0])


def quaternion_of_yaw(yaw_rad: Tensor) -> Tensor:
    """Quaternions of turns about z.

    Args:
        yaw_rad: (n,) radians, counter-clockwise.

    Returns:
        (n, 4) w, x, y, z.
    """
    zero = torch.zeros_like(yaw_rad)
    return torch.stack(((yaw_rad / 2).cos(), zero, zero, (yaw_rad / 2).sin()), dim=-1)


def transform_points(points: Tensor, a_to_b: Tensor) -> Tensor:
    """Points of a in frame b.

    Args:
        points: (..., n, 3) metres, frame a.
        a_to_b: (..., 4, 4).

    Returns:
        (..., n, 3) metres, frame b.
    """
    return points @ a_to_b[..., :3, :3].transpose(-1, -2) + a_to_b[..., None, :3, 3]


def transform_boxes(boxes: Tensor, a_to_b: Tensor) -> Tensor:
    """Boxes of frame a in frame b.

    The heading and the velocity go through the planar part of the matrix, so a reflection mirrors
    the heading and a uniform scale scales sizes and velocities: BEV augmentation is a case of this.

    Args:
        boxes: (n, 9) rows as in :data:`BOX_COLUMNS`, frame a. NaN velocities stay NaN.
        a_to_b: (4, 4) rotation, uniform scale, reflection and translation.

    Returns:
        (n, 9) frame b.
    """
    a_to_b = a_to_b.to(boxes)
    scale = a_to_b[:3, :3].det().abs() ** (1.0 / 3.0)
    centre = transform_points(boxes[:, :3], a_to_b)
    heading = torch.stack((boxes[:, 6].cos(), boxes[:, 6].sin()), -1) @ a_to_b[:2, :2].T
    yaw = torch.atan2(heading[:, 1], heading[:, 0])
    velocity = boxes[:, 7:9] @ a_to_b[:2, :2].T
    return torch.cat((centre, boxes[:, 3:6] * scale, yaw[:, None], velocity), dim=-1)


def box_corners(boxes: Tensor) -> Tensor:
    """The eight corners of boxes.

    Args:
        boxes: (n, 7 or more) rows as in :data:`BOX_COLUMNS`.

    Returns:
        (n, 8, 3): the bottom face counter-clockwise from the front left (seen from above), then the
        top face in the same order; corners 0, 3, 7, 4 are the front face.
    """
    signs = boxes.new_tensor(_CORNER_SIGNS)
    local = signs * boxes[:, None, 3:6] * 0.5
    c, s = boxes[:, 6].cos()[:, None], boxes[:, 6].sin()[:, None]
    x = local[..., 0] * c - local[..., 1] * s
    y = local[..., 0] * s + local[..., 1] * c
    return torch.stack((x, y, local[..., 2]), -1) + boxes[:, None, :3]


def project_points(points: Tensor, frame_to_image: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels and depths of 3D points.

    Args:
        points: (..., n, 3) metres.
        frame_to_image: (..., 4, 4) the points' frame to homogeneous pixels (intrinsics @ extrinsics).

    Returns:
        pixels (..., n, 2) as (u, v) = (x, y);
        depth (..., n) metres along the optical axis. The depth is held at
        :data:`MIN_DEPTH_M` for the division, so pixels of points at or behind the camera mean nothing.
    """
    homogeneous = transform_points(points, frame_to_image)
    depth = homogeneous[..., 2]
    return homogeneous[..., :2] / depth.clamp_min(MIN_DEPTH_M)[..., None], depth
