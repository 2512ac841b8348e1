"""Pinhole cameras from projection matrices, and boxes between the BEV frame and the cameras.

The model is given ``bev_to_image`` alone. Taking it apart gives an intrinsic matrix with positive focal
lengths and a ``bev_to_camera`` that holds whatever else there is: motion between the exposures, and the
turns, scales and mirrors of augmentation. Depth is in the metres of the real scene, whatever the scale of
an augmented BEV frame, since that is what an image shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bevperception.geometry import transform_points


@dataclass(frozen=True)
class PinholeCameras:
    """M cameras.

    Attributes:
        intrinsics: (M, 3, 3) float64, upper triangular with a positive diagonal, 1 at the end.
        bev_to_camera: (M, 4, 4) float64: rotation times scale, possibly mirrored, and translation.
    """

    intrinsics: Tensor
    bev_to_camera: Tensor

    @property
    def scale(self) -> Tensor:
        """(M,) real metres a metre of the BEV frame."""
        determinant: Tensor = torch.linalg.det(self.bev_to_camera[:, :3, :3])
        return determinant.abs() ** (1.0 / 3.0)

    def __getitem__(self, index: Tensor) -> PinholeCameras:
        return PinholeCameras(self.intrinsics[index], self.bev_to_camera[index])


def decompose_projection(bev_to_image: Tensor) -> PinholeCameras:
    """Take projections apart.

    Args:
        bev_to_image: (M, 4, 4) finite; the third row gives the depth in real metres.
    """
    projection = bev_to_image.double()[:, :3]
    # RQ decomposition by a QR of the matrix turned upside down.
    q, r = torch.linalg.qr(projection[:, :, :3].flip(1).transpose(1, 2))
    del q
    signs = torch.diagonal(r, dim1=1, dim2=2).sign()
    intrinsics = (signs[:, :, None] * r).transpose(1, 2).flip(1, 2)
    intrinsics = intrinsics / intrinsics[:, 2:3, 2:3]
    bev_to_camera = torch.zeros_like(bev_to_image, dtype=torch.float64)
    bev_to_camera[:, :3] = torch.linalg.solve(intrinsics, projection)
    bev_to_camera[:, 3, 3] = 1.0
    return PinholeCameras(intrinsics, bev_to_camera)


@dataclass(frozen=True)
class CameraBoxes:
    """Boxes as a camera sees them.

    Attributes:
        rotation: (n, 3, 3) object (x along the length, z up) to camera.
        centre_px: (n, 2) projected centre in pixels.
        depth_m: (n,) of the centre along the optical axis.
        size_m: (n, 3) width, length, height.
        inverse_intrinsics: (n, 3, 3) of the camera each box belongs to.
    """

    rotation: Tensor
    centre_px: Tensor
    depth_m: Tensor
    size_m: Tensor
    inverse_intrinsics: Tensor

    def centre_m(self) -> Tensor:
        """(n, 3) centres in the camera frame."""
        return unproject(self.centre_px, self.inverse_intrinsics) * self.depth_m[:, None]

    def corners_m(self) -> Tensor:
        """(n, 8, 3) corners in the camera frame, front face first (nuScenes' order)."""
        signs = self.size_m.new_tensor(_CORNER_SIGNS)
        local = 0.5 * signs * self.size_m[:, None, [1, 0, 2]]
        # (n, 8, 3) @ (n, 3, 3) -> (n, 8, 3)
        return local @ self.rotation.transpose(1, 2) + self.centre_m()[:, None]


_CORNER_SIGNS = (
    (1.0, 1.0, 1.0),
    (1.0, -1.0, 1.0),
    (1.0, -1.0, -1.0),
    (1.0, 1.0, -1.0),
    (-1.0, 1.0, 1.0),
    (-1.0, -1.0, 1.0),
    (-1.0, -1.0, -1.0),
    (-1.0, 1.0, -1.0),
)
_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))


def unproject(pixels: Tensor, inverse_intrinsics: Tensor) -> Tensor:
    """Rays of pixels at depth one.

    Args:
        pixels: (n, 2).
        inverse_intrinsics: (n, 3, 3).

    Returns:
        (n, 3).
    """
    homogeneous = torch.cat((pixels, torch.ones_like(pixels[:, :1])), dim=-1)
    return (inverse_intrinsics @ homogeneous[..., None]).squeeze(-1)


def allocentric_frame(pixels: Tensor, inverse_intrinsics: Tensor) -> Tensor:
    """The frame that looks along a pixel's ray, upright: an object turned in it looks the same anywhere.

    Args:
        pixels: (n, 2).
        inverse_intrinsics: (n, 3, 3).

    Returns:
        (n, 3, 3) rotation of that frame to the camera's.
    """
    ray = unproject(pixels, inverse_intrinsics)
    z = ray / ray.norm(dim=1, keepdim=True)
    y = z.new_tensor([[0.0, 1.0, 0.0]]) - z[:, 1:2] * z
    y = y / y.norm(dim=1, keepdim=True)
    return torch.stack((torch.linalg.cross(y, z), y, z), dim=-1)


def boxes_to_camera(boxes: Tensor, cameras: PinholeCameras) -> tuple[CameraBoxes, Tensor]:
    """Boxes of the BEV frame as one camera each sees them.

    Args:
        boxes: (n, 9) rows as in ``geometry.BOX_COLUMNS``, BEV frame; velocity may be NaN.
        cameras: n cameras, one a box.

    Returns:
        the boxes, in float64, and (n,) speeds in metres a second, NaN where unknown.
    """
    boxes = boxes.double()
    linear, scale = cameras.bev_to_camera[:, :3, :3], cameras.scale
    centre = transform_points(boxes[:, None, :3], cameras.bev_to_camera)[:, 0]
    yaw = boxes[:, 6]
    heading = torch.stack((yaw.cos(), yaw.sin(), torch.zeros_like(yaw)), dim=-1)
    forward = (linear @ heading[..., None]).squeeze(-1) / scale[:, None]
    up = linear[:, :, 2] / scale[:, None]
    # Right-handed also where the matrix mirrors: a box is its own mirror image.
    rotation = torch.stack((forward, torch.linalg.cross(up, forward), up), dim=-1)
    projected = (cameras.intrinsics @ centre[..., None]).squeeze(-1)
    size = boxes[:, [4, 3, 5]] * scale[:, None]
    # Where the depth is zero or negative the pixel means nothing; such boxes are left out later.
    depth = centre[:, 2]
    pixels = projected[:, :2] / torch.where(depth.abs() < 1e-6, torch.full_like(depth, 1e-6), depth)[:, None]
    inverse = torch.linalg.inv(cameras.intrinsics)
    speed = boxes[:, 7:9].norm(dim=-1) * scale
    return CameraBoxes(rotation, pixels, depth, size, inverse), speed


def boxes_to_bev(boxes: CameraBoxes, speed: Tensor, cameras: PinholeCameras) -> Tensor:
    """The inverse of :func:`boxes_to_camera`; the velocity points along the heading.

    Args:
        boxes: n boxes.
        speed: (n,) metres a second.
        cameras: n cameras, one a box.

    Returns:
        (n, 9) BEV frame, in the boxes' dtype.
    """
    dtype = boxes.depth_m.dtype
    camera_to_bev, scale = torch.linalg.inv(cameras.bev_to_camera).to(dtype), cameras.scale.to(dtype)
    centre = transform_points(boxes.centre_m()[:, None], camera_to_bev)[:, 0]
    forward = (camera_to_bev[:, :3, :3] @ boxes.rotation[:, :, :1]).squeeze(-1)
    planar = forward[:, :2] / forward[:, :2].norm(dim=-1, keepdim=True).clamp_min(1e-6)
    yaw = torch.atan2(planar[:, 1], planar[:, 0])
    size = boxes.size_m[:, [1, 0, 2]] / scale[:, None]
    velocity = planar * (speed / scale)[:, None]
    return torch.cat((centre, size, yaw[:, None], velocity), dim=-1)


def image_rectangles(
    boxes: CameraBoxes, intrinsics: Tensor, size: tuple[int, int], near_m: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Rectangles around boxes in the image.

    Args:
        boxes: n boxes.
        intrinsics: (n, 3, 3).
        size: (height, width) of the images in pixels.
        near_m: only what lies farther from the camera than this is projected.

    Returns:
        (n, 4) x0, y0, x1, y1 in pixels, cut at the image's edges (empty where nothing is in the image);
        (n,) share of the whole rectangle's area that lies in the image.
    """
    corners = boxes.corners_m()
    starts, ends = (corners[:, [edge[i] for edge in _EDGES]] for i in (0, 1))
    fall = ends[..., 2] - starts[..., 2]
    share = (near_m - starts[..., 2]) / torch.where(fall.abs() < 1e-9, torch.ones_like(fall), fall)
    crossing = (starts[..., 2] > near_m) != (ends[..., 2] > near_m)
    cuts = starts + share.clamp(0, 1)[..., None] * (ends - starts)
    points = torch.cat((corners, cuts), dim=1)
    in_front = torch.cat((corners[..., 2] > near_m, crossing), dim=1)
    homogeneous = points @ intrinsics.transpose(1, 2)  # (n, P, 3) @ (n, 3, 3) -> (n, P, 3)
    pixels = homogeneous[..., :2] / homogeneous[..., 2:].clamp_min(0.5 * near_m)
    infinity = pixels.new_tensor(float("inf"))
    low = torch.where(in_front[..., None], pixels, infinity).amin(1)
    high = torch.where(in_front[..., None], pixels, -infinity).amax(1)
    low, high = torch.where(low.isfinite(), low, 0.0), torch.where(high.isfinite(), high, 0.0)
    limits = pixels.new_tensor([size[1], size[0]])
    inside_low, inside_high = low.clamp_min(0.0).minimum(limits), high.clamp_min(0.0).minimum(limits)
    whole = (high - low).clamp_min(0.0).prod(-1)
    part = (inside_high - inside_low).clamp_min(0.0).prod(-1)
    return torch.cat((inside_low, inside_high), dim=-1), part / whole.clamp_min(1e-9)
