"""Interpolate the vehicle's pose at any instant from the odometry of the last seconds."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bevperception.calibration import TimedPose
from bevperception.geometry import pose_matrix


@dataclass(frozen=True)
class PoseLimits:
    """How far poses are interpolated and extrapolated, and how long they are kept.

    Args:
        keep_s: poses older than this against the newest are forgotten.
        max_gap_s: longest interval that is interpolated over.
        max_extrapolation_s: longest time beyond the newest or before the oldest pose.
    """

    keep_s: float = 5.0
    max_gap_s: float = 1.0
    max_extrapolation_s: float = 0.25


class PoseBuffer:
    """Keeps poses in the order of their stamps, and interpolates between them.

    Args:
        limits: see :class:`PoseLimits`.
    """

    def __init__(self, limits: PoseLimits | None = None) -> None:
        self.limits = limits or PoseLimits()
        self._poses: list[TimedPose] = []
        self._stamps: list[int] = []

    def __len__(self) -> int:
        return len(self._poses)

    @property
    def newest_ns(self) -> int | None:
        """Stamp of the newest pose; None when there is none."""
        return self._stamps[-1] if self._stamps else None

    def clear(self) -> None:
        """Forget all poses."""
        self._poses.clear()
        self._stamps.clear()

    def add(self, pose: TimedPose) -> None:
        """Insert a pose at its place in time; it replaces one of the same stamp.

        Raises:
            ValueError: if it is impossible.
        """
        if not pose.is_possible:
            raise ValueError(f"not a pose: {pose}")
        at = bisect.bisect_left(self._stamps, pose.stamp_ns)
        if at < len(self._stamps) and self._stamps[at] == pose.stamp_ns:
            self._poses[at] = pose
            return
        self._stamps.insert(at, pose.stamp_ns)
        self._poses.insert(at, pose)
        old = bisect.bisect_left(self._stamps, self._stamps[-1] - round(self.limits.keep_s * 1e9))
        if old:
            del self._stamps[:old], self._poses[:old]

    def covers(self, stamp_ns: int) -> bool:
        """Whether a pose as new as a stamp has arrived, so that waiting longer would change nothing."""
        return bool(self._stamps) and self._stamps[-1] >= stamp_ns

    def at(self, stamp_ns: int) -> Tensor | None:
        """Interpolate ``ego_to_global`` at an instant.

        Positions are interpolated linearly and rotations by slerp; beyond the ends the motion of the two
        nearest poses goes on.

        Returns:
            (4, 4) float64; None where the poses do not tell.
        """
        at = bisect.bisect_left(self._stamps, stamp_ns)
        if at < len(self._stamps) and self._stamps[at] == stamp_ns:
            return self._poses[at].matrix()
        if 0 < at < len(self._poses):
            before, after = self._poses[at - 1], self._poses[at]
            if after.stamp_ns - before.stamp_ns > self.limits.max_gap_s * 1e9:
                return self._held(stamp_ns)
            return _between(before, after, stamp_ns)
        return self._held(stamp_ns)

    def _held(self, stamp_ns: int) -> Tensor | None:
        """Extrapolate from the nearest pose beyond the poses or in a gap; None if it is too far."""
        at = bisect.bisect_left(self._stamps, stamp_ns)
        near = [index for index in (at - 1, at) if 0 <= index < len(self._poses)]
        if not near:
            return None
        nearest = min(near, key=lambda index: abs(self._stamps[index] - stamp_ns))
        if abs(self._stamps[nearest] - stamp_ns) > self.limits.max_extrapolation_s * 1e9:
            return None
        # The pose on the far side of the nearest tells how the vehicle moves there.
        first = nearest if nearest == at else nearest - 1
        if not 0 <= first < len(self._poses) - 1:
            return self._poses[nearest].matrix()
        before, after = self._poses[first], self._poses[first + 1]
        if after.stamp_ns - before.stamp_ns > self.limits.max_gap_s * 1e9:
            return self._poses[nearest].matrix()
        return _between(before, after, stamp_ns)


def _between(before: TimedPose, after: TimedPose, stamp_ns: int) -> Tensor:
    """The pose at a stamp on the line through two, also beyond them."""
    share = (stamp_ns - before.stamp_ns) / (after.stamp_ns - before.stamp_ns)
    pairs = zip(before.translation_m, after.translation_m, strict=True)
    translation = tuple(a + share * (b - a) for a, b in pairs)
    turn = _slerp(before.quaternion_wxyz, after.quaternion_wxyz, share)
    return pose_matrix(
        torch.tensor(translation, dtype=torch.float64), torch.tensor(turn, dtype=torch.float64)
    )


def _slerp(a: Sequence[float], b: Sequence[float], share: float) -> tuple[float, ...]:
    """Unit quaternion between two along the shorter arc."""
    norm_a, norm_b = math.hypot(*a), math.hypot(*b)
    a, b = [v / norm_a for v in a], [v / norm_b for v in b]
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    if dot < 0.0:
        b, dot = [-v for v in b], -dot
    angle = math.acos(min(1.0, dot))
    if angle < 1e-9:
        return tuple(x + share * (y - x) for x, y in zip(a, b, strict=True))
    from_a, from_b = math.sin((1 - share) * angle), math.sin(share * angle)
    return tuple((from_a * x + from_b * y) / math.sin(angle) for x, y in zip(a, b, strict=True))
