"""Track one camera's calibration, pose and images, and whether they can be used now."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from bevperception.streaming.camera_model import CalibrationFault, CameraInfo, CameraModel
from bevperception.streaming.images import CameraImage, digest
from bevperception.streaming.statistics import Rate


class CameraState(Enum):
    """Whether a camera's images are used, and if not, which kind of reason there is."""

    WAITING = "waiting"
    """Its calibration, its pose or its first image has not arrived yet."""
    ACTIVE = "active"
    STALE = "stale"
    """Its images stopped coming."""
    MASKED = "masked"
    """Its images arrive but cannot be used."""


@dataclass(frozen=True)
class CameraReport:
    """A camera's state, rate and counts, for diagnostics.

    Attributes:
        state: see :class:`CameraState`.
        reason: why it is not active; '' if it is.
        rate_hz: of its images.
        age_s: since its newest image arrived; None before the first.
        counts: images received, used, and refused by reason.
    """

    state: CameraState
    reason: str
    rate_hz: float
    age_s: float | None
    counts: dict[str, int]


class Camera:
    """The state of one camera: calibration, pose, and what happened to its images.

    Args:
        channel: for example CAM_FRONT.
        rectified, undistort: see :class:`CameraModel`.

    Attributes:
        channel: as given.
        model: from its camera info; None before the first one, and while the newest is refused.
        camera_to_base: (4, 4) float64; None before it is known.
        pose_problem: what is doubtful about the pose; '' for nothing.
        counts: images received, used and refused.
    """

    def __init__(self, channel: str, rectified: bool, undistort: bool) -> None:
        self.channel = channel
        self.model: CameraModel | None = None
        self.camera_to_base: Tensor | None = None
        self.pose_problem = ""
        self.counts: Counter[str] = Counter()
        self._options = (rectified, undistort)
        self._info: CameraInfo | None = None
        self._info_problem = "waiting for camera info"
        self._rate = Rate()
        self._heard_s: float | None = None
        self._fault = ""
        self._last_digest: int | None = None
        self._same = 0

    def take_info(self, info: CameraInfo) -> bool:
        """Build the camera model of new camera info; info that changed nothing is ignored.

        Returns:
            whether it was new.
        """
        if info == self._info:
            return False
        self._info = info
        try:
            self.model, self._info_problem = CameraModel(info, *self._options), ""
        except CalibrationFault as fault:
            self.model, self._info_problem = None, f"camera info refused: {fault}"
        return True

    @property
    def frame_id(self) -> str:
        """The camera's TF frame as its camera info names it; '' before that came."""
        return "" if self._info is None else self._info.frame_id

    def hear(self, now_s: float) -> None:
        """Count an image that arrived; ``now_s`` is of a monotonic clock."""
        self.counts["received"] += 1
        self._rate.add(now_s)
        self._heard_s = now_s

    def is_frozen(self, image: CameraImage, after: int) -> bool:
        """Whether the camera has sent the same image many times in a row.

        Args:
            image: the newest; each one is to be asked about once.
            after: so many equal ones in a row make a frozen camera; 0 for never.
        """
        number = digest(image)
        self._same = self._same + 1 if number == self._last_digest else 1
        self._last_digest = number
        return 0 < after <= self._same

    def record_outcome(self, fault: str) -> None:
        """Count the newest image as used or refused.

        Args:
            fault: why it could not be used; '' if it was.
        """
        self._fault = fault
        self.counts["used" if not fault else "refused"] += 1

    def missing(self) -> str:
        """Which calibration or pose the camera lacks to be used at all; '' for none."""
        if self.model is None:
            return self._info_problem
        if self.camera_to_base is None:
            return self.pose_problem or "waiting for the camera's pose on the vehicle"
        return ""

    def forget(self) -> None:
        """Forget the images so far, as after a jump of the clock; calibration and counts stay."""
        self._fault, self._last_digest, self._same = "", None, 0

    def report(self, now_s: float, timeout_s: float) -> CameraReport:
        """Report the state at an instant.

        Args:
            now_s: monotonic clock.
            timeout_s: without an image for longer it is stale.
        """
        age_s = None if self._heard_s is None else now_s - self._heard_s
        state, reason = self._state(age_s, timeout_s)
        return CameraReport(state, reason, self._rate.hz(now_s), age_s, dict(self.counts))

    def _state(self, age_s: float | None, timeout_s: float) -> tuple[CameraState, str]:
        missing = self.missing()
        if missing:
            waiting = missing.startswith("waiting")
            return (CameraState.WAITING if waiting else CameraState.MASKED), missing
        if age_s is None:
            return CameraState.WAITING, "waiting for images"
        if age_s > timeout_s:
            return CameraState.STALE, f"no image for {age_s:.1f} s"
        if self._fault:
            return CameraState.MASKED, self._fault
        return CameraState.ACTIVE, self.pose_problem
