"""Turn a vehicle's messages into perceptions: received in one thread, perceived in another."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bevperception.calibration import CameraCalibration, EgoMotion, RigCalibration, TimedPose
from bevperception.errors import ConfigError
from bevperception.inference import Perception, StreamingPredictor
from bevperception.streaming.camera_model import CameraInfo
from bevperception.streaming.cameras import Camera, CameraReport
from bevperception.streaming.images import CameraImage, ImageFault, decode, is_black
from bevperception.streaming.poses import PoseBuffer, PoseLimits
from bevperception.streaming.rig import CameraExtrinsics, TransformTree, difference, read_extrinsics
from bevperception.streaming.settings import NodeSettings
from bevperception.streaming.stamps import StampGuard, Verdict
from bevperception.streaming.statistics import Durations, Rate
from bevperception.streaming.synchroniser import ImageSet, Synchroniser, SyncSettings

_HELD_SUSPECTS = 64
_IMPOSSIBLE = "odometry with an impossible pose"


@dataclass(frozen=True)
class ImageSetResult:
    """The perception of one image set, or why there is none.

    Attributes:
        stamp_ns: the set's instant.
        perception: None where nothing is to be published.
        masked: why cameras were not used, by channel.
        note: what is out of the ordinary; '' for nothing.
        last_arrival_s: when the newest image arrived, monotonic clock.
        stages_ms: durations by stage.
    """

    stamp_ns: int
    perception: Perception | None
    masked: Mapping[str, str]
    note: str
    last_arrival_s: float
    stages_ms: dict[str, float]


@dataclass(frozen=True)
class Health:
    """The state of cameras, ego motion and results, for diagnostics.

    Attributes:
        cameras: by channel.
        usable: cameras that the newest set used.
        published, refused: sets with and without results.
        since_result_s: since the last result; None before the first.
        note: what the newest set said; '' for nothing out of the ordinary.
        motion: what is wrong with ego motion; '' for nothing.
        trigger: what opens sets.
        rate_hz: of results.
        stages_ms: median and 95th percentile by stage.
        counts: messages and sets that were dropped, by reason.
        resets: how often the memory was forgotten, by reason.
    """

    cameras: Mapping[str, CameraReport]
    usable: int
    published: int
    refused: int
    since_result_s: float | None
    note: str
    motion: str
    trigger: str
    rate_hz: float
    stages_ms: Mapping[str, tuple[float, float]]
    counts: Mapping[str, int]
    resets: Mapping[str, int]


class Pipeline:
    """Collects messages, synchronises images, and runs the predictor on each image set.

    ``add_*`` only store and are quick; :meth:`wait` and :meth:`process` belong to one worker thread.

    Args:
        predictor: with data settings; its cameras are the pipeline's.
        channels: the model's cameras.
        settings: of the node.

    Raises:
        ConfigError: if the settings contradict each other or the calibration file is wrong.
    """

    def __init__(
        self, predictor: StreamingPredictor, channels: tuple[str, ...], settings: NodeSettings
    ) -> None:
        if settings.anchor not in channels:
            raise ConfigError(
                f"anchor {settings.anchor!r} is none of the model's cameras: {', '.join(channels)}"
            )
        if settings.min_cameras > len(channels):
            raise ConfigError(f"min_cameras is {settings.min_cameras}, the model has {len(channels)} cameras")
        self.settings = settings
        self.channels = channels
        self.counts: Counter[str] = Counter()
        self.resets: Counter[str] = Counter()
        self._predictor = predictor
        self._lock = threading.Condition()
        self._tree = TransformTree()
        limits = PoseLimits(max_extrapolation_s=settings.max_extrapolation_s)
        self._poses = PoseBuffer(limits)
        self._guard = StampGuard(settings.clock_jump_s)
        self._held: list[Callable[[], object]] = []
        self._cameras = {c: Camera(c, settings.rectified, settings.undistort) for c in channels}
        self._sync = Synchroniser(channels, _sync_settings(settings))
        self._extrinsics = CameraExtrinsics({})
        if settings.calibration_file:
            self._extrinsics = read_extrinsics(Path(settings.calibration_file).expanduser())
            self._place_cameras()
        self._stages: dict[str, Durations] = {}
        self._results = Rate()
        self._last_result_s: float | None = None
        self._motion_problem = "waiting for ego motion"
        self._motion_refused = ""
        self._note = ""
        self._usable = 0
        self._published = self._refused = 0
        self._sequence = 0

    def warm_up(self) -> float:
        """Run decoding and the model on blank images, since both are slow the first time.

        Returns:
            milliseconds that the model takes for a frame.
        """
        size = (64, 64)
        done, data = cv2.imencode(".jpg", np.zeros((size[1], size[0], 3), dtype=np.uint8))
        assert done
        is_black(decode(CameraImage("", 0, 0.0, data.tobytes()), size, 2), 1)
        return self._predictor.warm_up()

    # ------------------------------------------------------------------ messages in

    def add_image(self, image: CameraImage) -> None:
        """Take in an image of one of the cameras."""
        with self._lock:
            self._cameras[image.channel].hear(image.arrived_s)
            self._take_if_plausible(image.stamp_ns, image.channel, lambda: self._take_image(image))
            self._lock.notify()

    def add_sweep(self, stamp_ns: int) -> None:
        """Take in the stamp of a lidar sweep."""
        now_s = time.monotonic()
        with self._lock:
            self._take_if_plausible(stamp_ns, "sweep", lambda: self._sync.add_sweep(stamp_ns, now_s))
            self._lock.notify()

    def add_pose(self, pose: TimedPose) -> None:
        """Take in a pose of the vehicle from odometry."""
        with self._lock:
            if not pose.is_possible:
                self._doubt_motion()
                return
            self._motion_refused = ""
            self._take_if_plausible(pose.stamp_ns, "odometry", lambda: self._poses.add(pose))
            self._lock.notify()

    def refuse_motion(self, reason: str) -> None:
        """Count odometry that cannot be used, for example of another frame."""
        with self._lock:
            self.counts["odometry refused"] += 1
            self._motion_refused = reason

    def add_camera_info(self, channel: str, info: CameraInfo) -> None:
        """Take in the calibration of a camera."""
        with self._lock:
            if self._cameras[channel].take_info(info):
                self._place_cameras()

    def add_transform(self, parent: str, child: str, child_to_parent: Tensor) -> None:
        """Take in a static transform (4, 4) between two frames."""
        with self._lock:
            self._tree.add(parent, child, child_to_parent)
            self._place_cameras()

    def reset(self) -> None:
        """Forget images, poses and the model's memory."""
        with self._lock:
            self._forget("asked for")

    def change(self, settings: NodeSettings) -> None:
        """Use other values of the parameters that may change while the node runs."""
        with self._lock:
            self.settings = settings

    # ------------------------------------------------------------------ results out

    def wait(self, timeout_s: float) -> ImageSet | None:
        """Wait for the newest complete image set.

        Args:
            timeout_s: longest wait.
        """
        end_s = time.monotonic() + timeout_s
        with self._lock:
            while True:
                now_s = time.monotonic()
                images = self._sync.poll(now_s, self._motion_known)
                if images is not None:
                    return images
                next_s = self._sync.wait_s(now_s)
                left_s = end_s - now_s if next_s is None else min(end_s - now_s, max(next_s, 1e-3))
                if left_s <= 0:
                    return None
                self._lock.wait(left_s)

    def process(self, images: ImageSet) -> ImageSetResult:
        """Perceive one image set.

        Args:
            images: from :meth:`wait`.
        """
        begin_s = time.perf_counter()
        with self._lock:
            settings, sequence = self.settings, self._sequence
            motion, motion_note = self._motion(images)
        pixels, masked = self._pixels(images, settings)
        stages_ms = {"decode images": 1e3 * (time.perf_counter() - begin_s)}
        stages_ms["wait"] = 1e3 * (time.monotonic() - images.last_arrival_s) - stages_ms["decode images"]
        notes = [motion_note] if motion_note else []
        perception: Perception | None = None
        if len(pixels) < settings.min_cameras:
            notes.append(
                f"only {len(pixels)} of {len(self.channels)} cameras usable, {settings.min_cameras} needed"
            )
        elif motion is None and settings.without_motion == "stop":
            notes.append("nothing is published without ego motion")
        else:
            perception = self._perceive(images, pixels, motion, sequence)
            stages_ms |= perception.stages_ms
        note = "; ".join(notes)
        self._record_outcome(images, pixels, masked, motion_note, note, perception)
        return ImageSetResult(images.stamp_ns, perception, masked, note, images.last_arrival_s, stages_ms)

    def finished(self, result: ImageSetResult, stages_ms: Mapping[str, float]) -> None:
        """Count a result that was published, with its latency.

        Args:
            result: from :meth:`process`.
            stages_ms: durations of converting and publishing.
        """
        now_s = time.monotonic()
        with self._lock:
            everything = {**result.stages_ms, **stages_ms}
            everything["latency"] = 1e3 * (now_s - result.last_arrival_s)
            for name, value in everything.items():
                self._stages.setdefault(name, Durations()).add(value)
            self._results.add(now_s)
            self._last_result_s = now_s

    def health(self) -> Health:
        """Report the state of cameras, ego motion and results."""
        now_s = time.monotonic()
        with self._lock:
            timeout_s = self.settings.camera_timeout_s
            stages = {name: kept.percentiles_ms() for name, kept in self._stages.items()}
            return Health(
                cameras={c: camera.report(now_s, timeout_s) for c, camera in self._cameras.items()},
                usable=self._usable,
                published=self._published,
                refused=self._refused,
                since_result_s=None if self._last_result_s is None else now_s - self._last_result_s,
                note=self._note,
                motion=self._motion_state(),
                trigger=self._sync.trigger(now_s),
                rate_hz=self._results.hz(now_s),
                stages_ms={name: value for name, value in stages.items() if value is not None},
                counts=dict(self.counts + self._sync.counts),
                resets=dict(self.resets),
            )

    # ------------------------------------------------------------------ inside, with the lock held

    def _take_if_plausible(self, stamp_ns: int, source: str, take: Callable[[], object]) -> None:
        """Take in a message unless its stamp is suspect; after a jump of the clock, start over."""
        offset_s = self._guard.offset_s(stamp_ns)
        verdict = self._guard.classify(stamp_ns, source)
        if verdict is Verdict.GOOD:
            self._held.clear()
            take()
            return
        self.counts["stamp far ahead" if offset_s > 0 else "stamp far back"] += 1
        self._held = [*self._held[-_HELD_SUSPECTS:], take]
        if verdict is Verdict.JUMP:
            self._forget(f"the clock jumped {'ahead' if offset_s > 0 else 'back'}")
            held, self._held = self._held, []
            for again in held:
                again()

    def _take_image(self, image: CameraImage) -> None:
        camera = self._cameras[image.channel]
        if camera.missing():
            camera.counts[camera.missing()] += 1
        self._sync.add_image(image)

    def _forget(self, reason: str) -> None:
        self._sync.clear()
        self._poses.clear()
        self.resets[reason] += 1
        for camera in self._cameras.values():
            camera.forget()
        # A new sequence makes the predictor forget, in the thread that uses it.
        self._sequence += 1

    def _doubt_motion(self) -> None:
        """Count an impossible pose and forget the memory: localisation failed, and its frame may change."""
        self.counts[_IMPOSSIBLE] += 1
        if self._motion_refused != _IMPOSSIBLE:
            self._motion_refused = _IMPOSSIBLE
            self.resets[_IMPOSSIBLE] += 1
            self._sequence += 1

    def _motion_known(self, stamp_ns: int) -> bool:
        return self.settings.motion_source == "none" or self._poses.covers(stamp_ns)

    def _motion_state(self) -> str:
        return self._motion_refused or self._motion_problem

    def _motion(self, images: ImageSet) -> tuple[EgoMotion | None, str]:
        """Look up the ego motion of an image set, or say why there is none."""
        if self.settings.motion_source == "none":
            return None, ""
        reference = self._poses.at(images.stamp_ns)
        at_exposure = {c: self._poses.at(image.stamp_ns) for c, image in images.images.items()}
        if reference is None or any(pose is None for pose in at_exposure.values()):
            return None, self._no_motion_reason(images.stamp_ns)
        motion = EgoMotion(reference, {c: p for c, p in at_exposure.items() if p is not None})
        problem = motion.problem(at_exposure)
        return (None, f"ego motion is impossible: {problem}") if problem else (motion, "")

    def _no_motion_reason(self, stamp_ns: int) -> str:
        if self._motion_refused:
            return f"ego motion refused: {self._motion_refused}"
        newest_ns = self._poses.newest_ns
        if newest_ns is None:
            return "no ego motion has come"
        behind_s = (stamp_ns - newest_ns) * 1e-9
        if behind_s > 0:
            return f"ego motion is lost: the newest is {behind_s:.2f} s older than the images"
        return "ego motion has a gap at the images' stamps"

    def _place_cameras(self) -> None:
        """Set the poses of all cameras from the calibration file and TF, and compare the two."""
        base, settings = self.settings.base_frame, self.settings
        for channel, camera in self._cameras.items():
            from_file = self._extrinsics.camera_to_base.get(channel)
            frame = camera.frame_id or self._extrinsics.frame_ids.get(channel, "")
            from_tf = self._tree.between(frame, base) if frame and settings.use_tf else None
            camera.camera_to_base = from_file if from_file is not None else from_tf
            camera.pose_problem = ""
            if from_file is None and from_tf is None:
                if frame:
                    camera.pose_problem = f"waiting for the transform from {frame} to {base}"
            elif from_file is not None and from_tf is not None:
                metres, degrees = difference(from_file, from_tf)
                if metres > settings.tf_check_m or degrees > settings.tf_check_deg:
                    camera.pose_problem = (
                        f"TF and calibration file differ by {metres:.3f} m and {degrees:.2f} degrees; "
                        "the file is used"
                    )

    # ------------------------------------------------------------------ inside, in the worker thread

    def _pixels(
        self, images: ImageSet, settings: NodeSettings
    ) -> tuple[dict[str, NDArray[np.uint8]], dict[str, str]]:
        """Decode the usable images by channel; say why the others are not usable."""
        pixels: dict[str, NDArray[np.uint8]] = {}
        masked: dict[str, str] = {}
        for channel in self.channels:
            image = images.images.get(channel)
            fault = "no image in this set"
            if image is not None:
                try:
                    pixels[channel] = self._usable_pixels(image, settings)
                    fault = ""
                except ImageFault as error:
                    fault = str(error)
                with self._lock:
                    self._cameras[channel].record_outcome(fault)
            if fault:
                masked[channel] = fault
        return pixels, masked

    def _usable_pixels(self, image: CameraImage, settings: NodeSettings) -> NDArray[np.uint8]:
        camera = self._cameras[image.channel]
        with self._lock:
            frozen = camera.is_frozen(image, settings.frozen_after)
            missing, model = camera.missing(), camera.model
        if missing or model is None:
            raise ImageFault(missing)
        if frozen:
            raise ImageFault(f"frozen: the same image {settings.frozen_after} times in a row or more")
        width, height = model.size
        decoded = decode(image, model.size, self._predictor.reduction(width, height))
        if is_black(decoded, settings.black_level):
            raise ImageFault(f"black: nothing in the image is brighter than {settings.black_level}")
        return model.undistort(decoded)

    def _perceive(
        self,
        images: ImageSet,
        pixels: Mapping[str, NDArray[np.uint8]],
        motion: EgoMotion | None,
        sequence: int,
    ) -> Perception:
        with self._lock:
            rig = self._rig(pixels)
        perception = self._predictor.step(pixels, rig, motion, images.stamp_ns * 1e-9, str(sequence))
        if perception.reset is not None:
            with self._lock:
                self.resets[_without_numbers(perception.reset)] += 1
        return perception

    def _rig(self, pixels: Mapping[str, NDArray[np.uint8]]) -> RigCalibration:
        cameras = {}
        for channel in pixels:
            camera = self._cameras[channel]
            assert camera.model is not None
            assert camera.camera_to_base is not None
            width, height = camera.model.size
            cameras[channel] = CameraCalibration(
                width, height, camera.model.intrinsics, camera.camera_to_base
            )
        rig = RigCalibration(cameras)
        if self._extrinsics.bev_to_base is not None:
            rig = replace(rig, bev_to_ego=self._extrinsics.bev_to_base)
        return rig

    def _record_outcome(
        self,
        images: ImageSet,
        pixels: Mapping[str, object],
        masked: Mapping[str, str],
        motion_note: str,
        note: str,
        perception: Perception | None,
    ) -> None:
        with self._lock:
            self._usable = len(pixels)
            self._note = note
            self._motion_problem = motion_note
            if perception is None:
                self._refused += 1
            else:
                self._published += 1
            for channel in masked:
                if channel not in images.images:
                    self._cameras[channel].counts["missing in a set"] += 1


def _sync_settings(settings: NodeSettings) -> SyncSettings:
    return SyncSettings(
        anchor=settings.anchor,
        sweep=settings.sweep_trigger,
        tolerance_s=settings.sync_tolerance_s,
        max_wait_s=settings.max_wait_s,
        min_period_s=settings.min_period_s,
        trigger_timeout_s=settings.trigger_timeout_s,
        reference_offset_s=settings.reference_offset_s,
    )


def _without_numbers(reason: str) -> str:
    """Remove the numbers from a reset's reason, so that counting reasons stays bounded."""
    return " ".join(word for word in reason.split() if not any(c.isdigit() for c in word))
