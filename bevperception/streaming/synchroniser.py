"""Group the images of several cameras into sets of one instant.

A trigger (a sweep's header, the anchor camera, or, where those are silent, the next camera that is not)
opens a set; every camera adds the image whose stamp lies nearest to the set's, within a tolerance. The set
closes when all cameras that are not silent are in it and the odometry has reached it, when it has waited
long enough, or when the next one opens. Of closed sets only the newest is kept. Nothing here grows: an open
set, a closed one, and one image a camera that came before its trigger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bevperception.streaming.images import CameraImage

SWEEP = "sweep"
"""Name of the trigger that is not a camera."""


@dataclass(frozen=True)
class SyncSettings:
    """Which images belong to one set, and how long a set waits for them.

    Args:
        anchor: camera whose images open sets.
        sweep: whether the stamps of a sweep topic open them instead, while they come.
        tolerance_s: farthest that a camera's stamp lies from the set's.
        max_wait_s: longest wait for cameras and odometry after the trigger.
        min_period_s: sets come at least so far apart; 0 for every trigger.
        trigger_timeout_s: a trigger that is silent for longer hands over to the next.
        reference_offset_s: the set's instant is the anchor's stamp plus this.
    """

    anchor: str
    sweep: bool = False
    tolerance_s: float = 0.05
    max_wait_s: float = 0.1
    min_period_s: float = 0.0
    trigger_timeout_s: float = 1.0
    reference_offset_s: float = 0.0


@dataclass(frozen=True)
class ImageSet:
    """Images of several cameras that belong to one instant.

    Attributes:
        stamp_ns: the instant.
        images: by channel; cameras without an image have no entry.
        trigger: camera or :data:`SWEEP`.
        last_arrival_s: when the newest image arrived, monotonic clock.
    """

    stamp_ns: int
    images: Mapping[str, CameraImage]
    trigger: str
    last_arrival_s: float


@dataclass
class _OpenSet:
    stamp_ns: int
    trigger: str
    opened_s: float
    images: dict[str, CameraImage] = field(default_factory=dict)


class Synchroniser:
    """Groups images into sets as the module describes. Not thread-safe: the pipeline holds a lock around it.

    Args:
        cameras: channels, in the order in which they stand in for a silent anchor.
        settings: see :class:`SyncSettings`.

    Attributes:
        counts: how many images and sets were dropped, and why.
    """

    GIVE_UP_AFTER = 2
    """A camera that missed so many sets in a row is not waited for until it sends again."""

    def __init__(self, cameras: Sequence[str], settings: SyncSettings) -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter()
        others = [camera for camera in cameras if camera != settings.anchor]
        self._cameras = tuple(cameras)
        self._triggers = ((SWEEP,) if settings.sweep else ()) + (settings.anchor, *others)
        self.clear()

    def clear(self) -> None:
        """Forget all images, sets and who was silent; the counts stay."""
        self._open: _OpenSet | None = None
        self._closed: ImageSet | None = None
        self._early: dict[str, CameraImage] = {}
        self._newest_ns: dict[str, int] = {}
        self._heard_s: dict[str, float] = {}
        self._missed: Counter[str] = Counter()
        self._last_stamp_ns: int | None = None
        self._begun_s: float | None = None

    def add_image(self, image: CameraImage) -> bool:
        """Put an image into the open set, or keep it for the next one.

        Returns:
            whether it was kept; otherwise it came out of order, too late or twice, and was counted.
        """
        channel, now_s = image.channel, image.arrived_s
        if image.stamp_ns <= self._newest_ns.get(channel, image.stamp_ns - 1):
            self.counts["out of order"] += 1
            return False
        self._newest_ns[channel] = image.stamp_ns
        self._hear(channel, now_s)
        self._missed[channel] = 0
        taken = self._offer(image)
        if channel == self._trigger(now_s):
            self._begin(image.stamp_ns + round(self.settings.reference_offset_s * 1e9), channel, now_s)
        return taken

    def add_sweep(self, stamp_ns: int, arrived_s: float) -> None:
        """Open a set at the stamp of a lidar sweep, if sweeps are the trigger now."""
        self._hear(SWEEP, arrived_s)
        if self._trigger(arrived_s) == SWEEP:
            self._begin(stamp_ns, SWEEP, arrived_s)

    def poll(self, now_s: float, motion_known: Callable[[int], bool]) -> ImageSet | None:
        """Return the newest complete set, once; None while there is none.

        Args:
            now_s: monotonic clock.
            motion_known: whether the vehicle's motion is known up to a stamp in nanoseconds.
        """
        waiting = self._open
        if waiting is not None:
            stamps = [waiting.stamp_ns, *(image.stamp_ns for image in waiting.images.values())]
            complete = self._is_complete(waiting) and motion_known(max(stamps))
            if complete or now_s - waiting.opened_s >= self.settings.max_wait_s:
                self._close()
        closed, self._closed = self._closed, None
        return closed

    def wait_s(self, now_s: float) -> float | None:
        """Seconds until :meth:`poll` should be called even if nothing arrives; None for never."""
        if self._closed is not None:
            return 0.0
        if self._open is None:
            return None
        return max(0.0, self._open.opened_s + self.settings.max_wait_s - now_s)

    def trigger(self, now_s: float) -> str:
        """The camera, or :data:`SWEEP`, that opens sets now."""
        return self._trigger(now_s)

    def _hear(self, source: str, now_s: float) -> None:
        self._heard_s[source] = now_s
        if self._begun_s is None:
            self._begun_s = now_s

    def _trigger(self, now_s: float) -> str:
        """The first source that is not silent; before any was, the first is given time to speak."""
        begun_s = now_s if self._begun_s is None else self._begun_s
        for source in self._triggers:
            if now_s - self._heard_s.get(source, begun_s) <= self.settings.trigger_timeout_s:
                return source
        return self._triggers[0]

    def _offer(self, image: CameraImage) -> bool:
        """Put an image into the open set if it lies nearest, else keep it for the next one."""
        channel = image.channel
        if self._open is not None and self._fits(image, self._open.stamp_ns):
            held = self._open.images.get(channel)
            if held is None or _distance(image, self._open) < _distance(held, self._open):
                self._open.images[channel] = image
                if held is not None:
                    self.counts["replaced by a nearer image"] += 1
                return True
        newest = self._open.stamp_ns if self._open is not None else self._last_stamp_ns
        if newest is not None and image.stamp_ns < newest:
            self.counts["too late for its set"] += 1
            return False
        if channel in self._early:
            self.counts["replaced by a newer image"] += 1
        self._early[channel] = image
        return True

    def _begin(self, stamp_ns: int, trigger: str, now_s: float) -> None:
        last = self._open.stamp_ns if self._open is not None else self._last_stamp_ns
        # Half the tolerance keeps a stand-in and a returning anchor from opening two sets of one instant.
        apart_s = max(self.settings.min_period_s, self.settings.tolerance_s)
        if last is not None and stamp_ns - last < apart_s * 1e9:
            return
        if self._open is not None:
            self._close()
        self._open = _OpenSet(stamp_ns, trigger, now_s)
        for channel, image in list(self._early.items()):
            if self._fits(image, stamp_ns):
                self._open.images[channel] = self._early.pop(channel)
            elif image.stamp_ns < stamp_ns:
                del self._early[channel]
                self.counts["outside of every set"] += 1

    def _close(self) -> None:
        done = self._open
        assert done is not None
        self._open, self._last_stamp_ns = None, done.stamp_ns
        for channel in self._cameras:
            self._missed[channel] = 0 if channel in done.images else self._missed[channel] + 1
        if self._closed is not None:
            self.counts["sets replaced by a newer set"] += 1
        arrivals = [image.arrived_s for image in done.images.values()]
        last_s = max(arrivals, default=done.opened_s)
        self._closed = ImageSet(done.stamp_ns, done.images, done.trigger, last_s)

    def _is_complete(self, waiting: _OpenSet) -> bool:
        return all(
            channel in waiting.images or self._missed[channel] >= self.GIVE_UP_AFTER
            for channel in self._cameras
        )

    def _fits(self, image: CameraImage, stamp_ns: int) -> bool:
        return abs(image.stamp_ns - stamp_ns) <= self.settings.tolerance_s * 1e9


def _distance(image: CameraImage, opened: _OpenSet) -> int:
    return abs(image.stamp_ns - opened.stamp_ns)
