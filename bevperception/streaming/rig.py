"""Poses of the cameras on the vehicle, from calibration files and from TF.

A calibration file is YAML::

    base_frame: base_link
    cameras:
      CAM_FRONT:
        frame_id: cam_front
        translation_m: [1.72, 0.0, 1.49]         # of the camera in base_link
        rotation_xyzw: [-0.5, 0.5, -0.5, 0.5]    # camera (x right, y down, z forward) to base_link
    bev:                                         # only for models that reason in a lidar's frame
      translation_m: [0.94, 0.0, 1.84]
      rotation_xyzw: [0.0, 0.0, -0.7071068, 0.7071068]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bevperception.calibration import QUATERNION_TOLERANCE
from bevperception.documents import read_yaml
from bevperception.errors import ConfigError
from bevperception.files import write_text
from bevperception.geometry import MAX_COORDINATE_M, invert_rigid, pose_matrix


@dataclass(frozen=True)
class CameraExtrinsics:
    """Poses of the cameras on the vehicle, as a calibration file holds them.

    Attributes:
        camera_to_base: (4, 4) float64 by channel.
        bev_to_base: (4, 4) float64, None where the model reasons in the vehicle's own frame.
        frame_ids: TF frame by channel.
    """

    camera_to_base: Mapping[str, Tensor]
    bev_to_base: Tensor | None = None
    frame_ids: Mapping[str, str] = field(default_factory=dict)


def pose_from_xyzw(translation_m: list[float], rotation_xyzw: list[float]) -> Tensor:
    """(4, 4) float64 child to parent from a translation and a quaternion in the order of ROS.

    Raises:
        ValueError: if there are not 3 and 4 finite numbers, the quaternion is not of unit length, or the
            place is not on Earth.
    """
    values = [float(v) for v in (*translation_m, *rotation_xyzw)]
    if len(translation_m) != 3 or len(values) != 7 or not all(map(math.isfinite, values)):
        raise ValueError(
            f"a pose needs 3 and 4 finite numbers, got {list(translation_m)} and {list(rotation_xyzw)}"
        )
    x, y, z, w = values[3:]
    if abs(math.hypot(x, y, z, w) - 1.0) > QUATERNION_TOLERANCE:
        raise ValueError(f"the quaternion {list(rotation_xyzw)} is not of unit length")
    if max(map(abs, values[:3])) > MAX_COORDINATE_M:
        raise ValueError(f"the translation {list(translation_m)} in metres leads off the Earth")
    translation = torch.tensor(values[:3], dtype=torch.float64)
    return pose_matrix(translation, torch.tensor([w, x, y, z], dtype=torch.float64))


def read_extrinsics(path: Path) -> CameraExtrinsics:
    """Read a calibration file.

    Raises:
        ConfigError: if it is missing, or something in it is.
    """
    content = read_yaml(path, f"calibration file {path}")
    cameras = content.get("cameras") if isinstance(content, dict) else None
    if not isinstance(cameras, dict) or not cameras:
        raise ConfigError(f"calibration file {path} has no section 'cameras' with an entry for each camera")
    poses = {str(channel): _pose(path, f"cameras.{channel}", entry) for channel, entry in cameras.items()}
    bev = content.get("bev")
    return CameraExtrinsics(
        camera_to_base=poses,
        bev_to_base=None if bev is None else _pose(path, "bev", bev),
        frame_ids={str(c): str(e.get("frame_id", "")) for c, e in cameras.items()},
    )


def _pose(path: Path, where: str, entry: Any) -> Tensor:
    try:
        return pose_from_xyzw(entry["translation_m"], entry["rotation_xyzw"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"calibration file {path}: {where} needs translation_m and rotation_xyzw: {error}"
        ) from error


def write_extrinsics(path: Path, content: Mapping[str, Any]) -> None:
    """Write a calibration file; see the module for its content."""
    write_text(path, yaml.safe_dump(dict(content), sort_keys=False))


def difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Distance in metres and angle in degrees between two poses (4, 4) of the same frames."""
    between = invert_rigid(one) @ other
    trace = float(between.diagonal()[:3].sum())
    # The arc cosine alone cannot see angles below 1e-6 degrees, which is fine here.
    angle = math.degrees(math.acos(max(-1.0, min(1.0, (trace - 1.0) / 2.0))))
    return float(between[:3, 3].norm()), angle


class TransformTree:
    """Static transforms between named frames: the part of tf2 that is needed here."""

    MAX_DEPTH = 100

    def __init__(self) -> None:
        self._child_to_parent: dict[str, tuple[str, Tensor]] = {}

    def add(self, parent: str, child: str, child_to_parent: Tensor) -> None:
        """Add the transform from a child frame to its parent; it replaces an older one of the same child.

        Args:
            parent, child: frame names; a leading slash is dropped.
            child_to_parent: (4, 4) float64.
        """
        self._child_to_parent[child.lstrip("/")] = (parent.lstrip("/"), child_to_parent)

    def between(self, source: str, target: str) -> Tensor | None:
        """``source_to_target`` (4, 4) float64; None where the frames are not connected."""
        from_source, from_target = (
            self._to_ancestors(source.lstrip("/")),
            self._to_ancestors(target.lstrip("/")),
        )
        for frame, source_to_frame in from_source.items():
            if frame in from_target:
                return invert_rigid(from_target[frame]) @ source_to_frame
        return None

    def _to_ancestors(self, frame: str) -> dict[str, Tensor]:
        frame_to_ancestor = torch.eye(4, dtype=torch.float64)
        ancestors = {frame: frame_to_ancestor}
        for _ in range(self.MAX_DEPTH):
            if frame not in self._child_to_parent:
                break
            frame, child_to_parent = self._child_to_parent[frame]
            if frame in ancestors:
                break
            frame_to_ancestor = child_to_parent @ frame_to_ancestor
            ancestors[frame] = frame_to_ancestor
        return ancestors
