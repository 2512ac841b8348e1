"""A vehicle's camera calibration, poses and ego motion.

Calibration is checked when it is made. Matrices may be tensors, NumPy arrays or nested lists of real numbers,
and are kept as float64 copies. Rigid transforms may be given as (3, 4), without their last row (0, 0, 0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bevperception.geometry import MAX_COORDINATE_M, invert_rigid, pose_matrix, rigid_problem

MatrixLike = Tensor | NDArray[Any] | Sequence[Sequence[float]]

QUATERNION_TOLERANCE = 1e-2
"""How far the length of a rotation's quaternion may be from 1 (tf2's own tolerance)."""
MAX_EXPOSURE_SHIFT_M = 80.0
"""Farthest that a vehicle can be at a camera's exposure from where it was at the frame's instant, metres."""


@dataclass(frozen=True)
class PinholeCamera:
    """A pinhole camera on a vehicle; the values are taken as they are.

    Attributes:
        width, height: size in pixels of the images that the intrinsics belong to.
        intrinsics: (3, 3) float64 camera frame to pixels.
        camera_to_ego: (4, 4) float64.
    """

    width: int
    height: int
    intrinsics: Tensor
    camera_to_ego: Tensor

    def projection(self, ego_to_global: Tensor, bev_to_global: Tensor) -> Tensor:
        """Project the BEV frame into the image: intrinsics @ global_to_camera @ bev_to_global.

        Args:
            ego_to_global: (4, 4) float64 at the camera's exposure.
            bev_to_global: (4, 4) float64 at the frame's instant.

        Returns:
            ``bev_to_image`` (4, 4) float64, BEV frame to homogeneous pixels of the image as it is.
        """
        intrinsics = torch.eye(4, dtype=torch.float64)
        intrinsics[:3, :3] = self.intrinsics
        return intrinsics @ invert_rigid(ego_to_global @ self.camera_to_ego) @ bev_to_global


@dataclass(frozen=True, init=False)
class CameraCalibration(PinholeCamera):
    """A pinhole camera whose values are checked when it is made, since they come from a user or a vehicle.

    Raises:
        ValueError: if the size is not positive, a matrix has another shape, the intrinsics are not those of a
            pinhole camera, or ``camera_to_ego`` is not rigid.
    """

    def __init__(self, width: int, height: int, intrinsics: MatrixLike, camera_to_ego: MatrixLike) -> None:
        sizes = (width, height)
        if not all(isinstance(size, Integral) and size >= 1 for size in sizes):
            raise ValueError(
                "a camera's images need a width and height that are whole numbers of at least 1, "
                f"got {width!r} x {height!r}"
            )
        _set(
            self,
            width=int(width),
            height=int(height),
            intrinsics=_intrinsics(intrinsics),
            camera_to_ego=_mounting(camera_to_ego, "camera_to_ego"),
        )


@dataclass(frozen=True, init=False)
class RigCalibration:
    """All cameras of a vehicle.

    Attributes:
        cameras: by channel, for example CAM_FRONT.
        bev_to_ego: (4, 4) float64; the identity for models that reason in the ego frame.

    Raises:
        ValueError: if ``cameras`` maps no names to calibrations, or ``bev_to_ego`` has another shape or is
            not rigid.
    """

    cameras: Mapping[str, CameraCalibration]
    bev_to_ego: Tensor

    def __init__(
        self, cameras: Mapping[str, CameraCalibration], bev_to_ego: MatrixLike | None = None
    ) -> None:
        _check_by_channel(cameras, "cameras")
        for channel, camera in cameras.items():
            if not isinstance(camera, CameraCalibration):
                raise ValueError(
                    f"cameras[{channel!r}] must be a CameraCalibration, got a {type(camera).__name__}"
                )
        frame = torch.eye(4, dtype=torch.float64) if bev_to_ego is None else bev_to_ego
        _set(self, cameras=cameras, bev_to_ego=_mounting(frame, "bev_to_ego"))


@dataclass(frozen=True, init=False)
class EgoMotion:
    """Poses of the vehicle at a frame's instant and at the exposures of its cameras.

    Values are not judged here: localisation fails on the road, and :meth:`problem` says how.

    Attributes:
        ego_to_global: (4, 4) float64 at the frame's instant; global is any frame that stands still.
        at_exposure: ``ego_to_global`` (4, 4) by channel; a camera without one took its image at the
            frame's instant.

    Raises:
        ValueError: if a matrix has another shape, or ``at_exposure`` does not map channels to them.
    """

    ego_to_global: Tensor
    at_exposure: Mapping[str, Tensor]

    def __init__(
        self, ego_to_global: MatrixLike, at_exposure: Mapping[str, MatrixLike] | None = None
    ) -> None:
        if at_exposure is not None:
            _check_by_channel(at_exposure, "at_exposure")
        poses = {
            channel: _matrix(pose, f"at_exposure[{channel!r}]", rigid=True)
            for channel, pose in (at_exposure or {}).items()
        }
        _set(self, ego_to_global=_matrix(ego_to_global, "ego_to_global", rigid=True), at_exposure=poses)

    def problem(self, channels: Iterable[str]) -> str:
        """Why the motion cannot be a vehicle's; '' if it can.

        Args:
            channels: cameras whose exposures count.
        """
        problem = rigid_problem(self.ego_to_global)
        if problem:
            return f"ego_to_global {problem}"
        for channel in channels:
            pose = self.at_exposure.get(channel)
            if pose is None:
                continue
            problem = rigid_problem(pose)
            if problem:
                return f"ego_to_global at the exposure of {channel} {problem}"
            shift_m = float((pose[:3, 3] - self.ego_to_global[:3, 3]).norm())
            if shift_m > MAX_EXPOSURE_SHIFT_M:
                return f"the exposure of {channel} lies {shift_m:.4g} m away from the frame"
        return ""


@dataclass(frozen=True)
class TimedPose:
    """The vehicle's pose at one instant.

    Attributes:
        stamp_ns: the instant.
        translation_m: (x, y, z) of the ego frame (base_link) in a frame that stands still: odometry's.
        quaternion_wxyz: ego frame to that frame.
    """

    stamp_ns: int
    translation_m: tuple[float, float, float]
    quaternion_wxyz: tuple[float, float, float, float]

    @property
    def is_possible(self) -> bool:
        """Whether it is a pose at all: finite, on Earth, and turned by a quaternion of about unit length."""
        values = (*self.translation_m, *self.quaternion_wxyz)
        if not all(map(math.isfinite, values)):
            return False
        on_earth = all(abs(value) <= MAX_COORDINATE_M for value in self.translation_m)
        return on_earth and abs(math.hypot(*self.quaternion_wxyz) - 1.0) <= QUATERNION_TOLERANCE

    def matrix(self) -> Tensor:
        """(4, 4) float64 ``ego_to_global``."""
        translation = torch.tensor(self.translation_m, dtype=torch.float64)
        return pose_matrix(translation, torch.tensor(self.quaternion_wxyz, dtype=torch.float64))


def is_pinhole(intrinsics: Tensor) -> bool:
    """Whether a matrix projects as a pinhole camera does, with positive focal lengths.

    Args:
        intrinsics: (3, 3) camera frame to homogeneous pixels.
    """
    (fx, skew, _), (tilt, fy, _), last = intrinsics.tolist()
    invertible = fx > 0 and fy > 0 and abs(fx * fy - skew * tilt) > 1e-9 * fx * fy
    return bool(intrinsics.isfinite().all()) and last == [0.0, 0.0, 1.0] and invertible


def _set(instance: object, **values: object) -> None:
    """Give a frozen dataclass its fields."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


def _check_by_channel(values: object, name: str) -> None:
    if not isinstance(values, Mapping) or not all(isinstance(channel, str) for channel in values):
        raise ValueError(
            f"{name} must map channels such as CAM_FRONT to values, got a {type(values).__name__}"
        )


def _matrix(value: MatrixLike, name: str, rigid: bool) -> Tensor:
    """A float64 copy on the CPU, (4, 4) of a rigid transform and (3, 3) else.

    Raises:
        ValueError: if the value is no matrix of real numbers, or has another shape.
    """
    wanted = "(4, 4), or (3, 4) without the last row" if rigid else "(3, 3)"
    if isinstance(value, Tensor):
        real = not (value.dtype.is_complex or value.dtype == torch.bool)
        kind, shape = str(value.dtype), tuple(value.shape)
        matrix = value.detach().cpu().double() if real else torch.empty(0)
    else:
        try:
            array = np.asarray(value)
        except ValueError as error:  # rows of different lengths
            raise ValueError(f"{name} must be a matrix {wanted}: {error}") from error
        real, kind, shape = array.dtype.kind in "fiu", str(array.dtype), array.shape
        matrix = torch.from_numpy(array.astype(np.float64)) if real else torch.empty(0)
    if not real:
        raise ValueError(f"{name} must be a matrix of real numbers, got {type(value).__name__} of {kind}")
    if rigid and shape == (3, 4):
        return torch.cat((matrix, matrix.new_tensor([[0.0, 0.0, 0.0, 1.0]])))
    if shape != ((4, 4) if rigid else (3, 3)):
        raise ValueError(f"{name} must be a matrix {wanted}, got shape {shape}")
    return matrix.clone()


def _mounting(value: MatrixLike, name: str) -> Tensor:
    matrix = _matrix(value, name, rigid=True)
    problem = rigid_problem(matrix)
    if problem:
        raise ValueError(f"{name} must be a rotation and a translation in metres, but it {problem}")
    return matrix


def _intrinsics(value: MatrixLike) -> Tensor:
    matrix = _matrix(value, "intrinsics", rigid=False)
    if not is_pinhole(matrix):
        raise ValueError(
            "intrinsics must be finite, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels with positive focal "
            f"lengths fx and fy, got {matrix.tolist()}"
        )
    return matrix
