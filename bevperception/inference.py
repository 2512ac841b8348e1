"""Streaming perception of one vehicle: the model, its memory, and when the memory must be forgotten."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bevperception.calibration import CameraCalibration, EgoMotion, RigCalibration
from bevperception.can_bus import CAN_BUS_SIZE, CanBusTrail
from bevperception.config import DataConfig
from bevperception.data.image_input import ImageInput
from bevperception.data.transforms import ImageFit
from bevperception.errors import ConfigError, DataError
from bevperception.frame_checks import (
    all_finite,
    check_shapes,
    check_types,
    check_values,
    checked_image,
    seconds,
)
from bevperception.geometry import MAX_COORDINATE_M, rigid_problem
from bevperception.models.precision import resolve_precision
from bevperception.structures import BEVMemory, Boxes3D, CameraFrames, ModelOutputs

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_COMPILED_PARTS = ("backbone", "neck")
_DEVICES = ("cpu", "cuda", "mps")
_FIRST = "first frame"
_NO_MOTION = "no ego motion"
_NOT_FINITE = "BEV features that are NaN or infinite"


@dataclass(frozen=True)
class ResetRules:
    """When the memory of earlier frames is forgotten before the next one.

    Args:
        max_gap_s: longest time between two frames, seconds.
        max_jump_m: farthest that the vehicle's pose moves between two frames, metres; farther means
            that localisation jumped.

    Raises:
        ConfigError: if one of them is negative or no number.
    """

    max_gap_s: float = 2.0
    max_jump_m: float = 80.0

    def __post_init__(self) -> None:
        for name, value in (("max_gap_s", self.max_gap_s), ("max_jump_m", self.max_jump_m)):
            # not <, so that NaN counts as wrong: nothing is farther than NaN, and memory would never go
            if not isinstance(value, Real) or not value >= 0.0:
                raise ConfigError(f"{name} must be a number of at least 0, got {value!r}")

    def reason(self, memory: BEVMemory, frames: CameraFrames, new_scene: bool) -> str | None:
        """Decide why the memory must be forgotten before a frame; None to keep it.

        Args:
            memory: of the frame before, one vehicle.
            frames: the current frame, one vehicle.
            new_scene: whether it belongs to another scene or drive.
        """
        if new_scene:
            return "new scene"
        gap_s = float(frames.timestamps_s[0]) - float(memory.timestamps_s[0])
        if gap_s < 0.0:
            return f"the clock went back by {-gap_s:.3f} s"
        if gap_s > self.max_gap_s:
            return f"{gap_s:.3f} s without a frame"
        moved = frames.bev_to_global[0, :3, 3].cpu() - memory.bev_to_global[0, :3, 3].cpu()
        jump_m = float(moved.norm())
        # not <=, so that a NaN pose counts as a jump
        if not jump_m <= self.max_jump_m:
            return f"the pose jumped by {jump_m:.1f} m"
        return None


@dataclass(frozen=True)
class Perception:
    """Boxes and segmentation of one frame, with what was used for them.

    Attributes:
        stamp_s: the frame's instant.
        boxes: BEV frame, scored, best first, on the CPU.
        segmentation: (classes, rows, columns) float32 probabilities on the CPU, or None without that head.
        bev_to_ego: (4, 4) float64.
        bev_to_global: (4, 4) float64 at the frame's instant; None where the vehicle's pose was unknown or
            impossible, so that nothing can be placed in the global frame.
        cameras: channels that were used, in the model's order.
        reset: why the memory was forgotten before this frame; None where it was used.
        stages_ms: duration of prepare, model and decode in milliseconds.
    """

    stamp_s: float
    boxes: Boxes3D
    segmentation: Tensor | None
    bev_to_ego: Tensor
    bev_to_global: Tensor | None
    cameras: tuple[str, ...]
    reset: str | None
    stages_ms: Mapping[str, float]


class StreamingPredictor:
    """Perceives one vehicle's frames in order by :meth:`step`; owns the model's memory between them.

    A frame whose pose is impossible (not finite, not rigid, not on Earth) stands alone: it is perceived
    without memory, its results are in the BEV frame only, and nothing of it is remembered. The frame after it
    begins a new memory. :attr:`last_reset` says so.

    Args:
        model: a BEVFormer; put in evaluation mode and moved to the device.
        device: where it runs.
        precision: Lightning's names, 32-true, bf16-mixed or 16-mixed, or auto; see
            :func:`~bevperception.models.precision.resolve_precision`.
        rules: when memory is forgotten.
        data: cameras, image size and normalisation that the model was trained with; needed by
            :meth:`step` and :meth:`warm_up`, not by :meth:`observe`.
        compiled: run the image backbone and neck through torch.compile; the first frames are slow.

    Attributes:
        last_reset: why the newest frame started a new memory; None when the memory was used.

    Raises:
        ConfigError: there is no such device or precision.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str = "cpu",
        precision: str = "32-true",
        rules: ResetRules | None = None,
        data: DataConfig | None = None,
        compiled: bool = False,
    ) -> None:
        self.device = _checked_device(device)
        self.model = model.to(self.device).eval()
        self.precision = resolve_precision(precision, self.device)
        self.rules = rules or ResetRules()
        self.last_reset: str | None = None
        self._why_empty = _FIRST
        self._memory: BEVMemory | None = None
        self._scene_token: str | None = None
        self._canvas = None if data is None else _Canvas(data)
        self._can_bus: CanBusTrail | None = None
        if data is not None and getattr(model, "reads_can_bus", False):
            self._can_bus = CanBusTrail(data.can_bus)
        if compiled:
            for name in _COMPILED_PARTS:
                getattr(model, name).compile()

    def reset(self) -> None:
        """Forget everything; the next frame starts a sequence."""
        self._memory, self._scene_token, self._why_empty = None, None, _FIRST

    def step(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        calibration: RigCalibration,
        ego_pose: EgoMotion | None,
        stamp: float,
        sequence: str = "",
    ) -> Perception:
        """Perceive one frame from any of the model's cameras; the others count as missing.

        Args:
            images: (height, width, 3) uint8 BGR by channel, undistorted, of the calibration's size or reduced
                by exactly :meth:`reduction`.
            calibration: of at least the cameras with images.
            ego_pose: of the vehicle; None where it is unknown. Without it, and with an impossible one, the
                frame stands alone (see the class), as if the vehicle had stood still during the exposures.
            stamp: the frame's instant, seconds.
            sequence: name of the drive; another one than the last frame's starts a new memory.

        Raises:
            ConfigError: if the predictor was made without ``data``.
            ValueError: if there is no image, a camera is unknown or not calibrated, an argument is of another
                type, an image of another size, or the stamp is not finite. The memory then stays as it was,
                unless the pose is impossible, too.
            DataError: as :meth:`observe`.
        """
        canvas = self._require_canvas()
        check_types(images, calibration, ego_pose)
        stamp = seconds(stamp)
        stages = _Stopwatch(self.device)
        alone = _why_alone(ego_pose, images)
        motion = EgoMotion(torch.eye(4, dtype=torch.float64)) if alone or ego_pose is None else ego_pose
        bev_to_global = motion.ego_to_global @ calibration.bev_to_ego
        with stages.time("prepare"):
            frames = canvas.frames(images, calibration, motion, bev_to_global, stamp)
            frames = self._with_can_bus(frames, motion, sequence, alone)
        with stages.time("model"):
            outputs = self._observe(frames, sequence, alone)
        with stages.time("decode"):
            boxes = self.decode(outputs)[0]
            logits = outputs.segmentation_logits
            segmentation = None if logits is None else logits[0].float().sigmoid().cpu()
        return Perception(
            stamp_s=stamp,
            boxes=boxes,
            segmentation=segmentation,
            bev_to_ego=calibration.bev_to_ego,
            bev_to_global=None if alone else bev_to_global,
            cameras=tuple(channel for channel in canvas.cameras if channel in images),
            reset=self.last_reset,
            stages_ms=stages.stages_ms,
        )

    def reduction(self, width: int, height: int) -> int:
        """1, 2, 4 or 8: the fraction of its size that a camera image may be decoded at for :meth:`step`.

        Args:
            width, height: of the camera's images in pixels.

        Raises:
            ConfigError: if the predictor was made without ``data``, or images of this size do not fit.
        """
        return self._require_canvas().reduction((width, height))

    def warm_up(self, frames: int = 2) -> float:
        """Run blank frames, with and without memory, so that the first real one is not slow; then reset.

        Args:
            frames: how many, at least 1.

        Returns:
            Milliseconds that the last of them took.

        Raises:
            ConfigError: if the predictor was made without ``data``.
            ValueError: if there are no frames to run.
        """
        if frames < 1:
            raise ValueError(f"warming up needs at least 1 frame, got {frames}")
        canvas = self._require_canvas()
        calibration = canvas.blank_rig()
        width, height = canvas.size
        blank = np.zeros((height, width, 3), dtype=np.uint8)
        self.reset()
        spent_ms = 0.0
        for index in range(frames):
            begin = time.perf_counter()
            images = dict.fromkeys(canvas.cameras, blank)
            self.step(images, calibration, EgoMotion(torch.eye(4, dtype=torch.float64)), 0.1 * index)
            spent_ms = 1e3 * (time.perf_counter() - begin)
        self.reset()
        return spent_ms

    def observe(self, frames: CameraFrames, scene_token: str) -> ModelOutputs:
        """Run the model on one frame of a data set, whose images are already the network's input.

        For evaluation, which needs raw outputs; vehicles call :meth:`step`. With an impossible pose they are
        those of this frame alone.

        Args:
            frames: of one vehicle (B = 1), on any device.
            scene_token: another one than the last frame's starts a new memory.

        Returns:
            raw outputs on the model's device; :meth:`decode` makes boxes of them.

        Raises:
            ValueError: if there is more than one vehicle, the images are not normalised numbers, or a time or
                the projection of a camera is not finite. The memory then stays as it was, unless the pose is
                impossible, too.
            DataError: if the BEV features that the model makes are not finite. They are not remembered, and
                the next frame begins a new memory.
        """
        check_shapes(frames)
        problem = rigid_problem(frames.bev_to_global[0])
        if problem:
            return self._observe(frames, scene_token, f"the pose is impossible: bev_to_global {problem}")
        # not <=, so that NaN counts as wrong
        if frames.can_bus is not None and not bool((frames.can_bus.abs() <= MAX_COORDINATE_M).all()):
            return self._observe(
                frames, scene_token, "the CAN-bus vector is impossible: not finite or too far"
            )
        return self._observe(frames, scene_token, "")

    def _observe(self, frames: CameraFrames, scene_token: str, alone: str) -> ModelOutputs:
        """As :meth:`observe`; ``alone`` says why a frame stands alone, '' where it does not."""
        if alone:
            self._memory, self._why_empty = None, f"the frame before stood alone ({alone})"
            frames = _without_motion(frames)
        check_values(frames)
        if alone:
            self.last_reset = alone
        elif self._memory is None:
            self.last_reset = self._why_empty
        else:
            self.last_reset = self.rules.reason(self._memory, frames, scene_token != self._scene_token)
        if self.last_reset is not None:
            self._memory = None
        model: Any = self.model
        with torch.inference_mode(), self._autocast():
            outputs, memory = model(frames.to(self.device), self._memory)
        if not all_finite(memory.features):
            # Remembered, they would make every later frame as bad, which then shows no boxes at all.
            self._memory, self._why_empty = None, f"the frame before gave {_NOT_FINITE}"
            raise DataError(
                f"the frame at {float(frames.timestamps_s[0]):g} s gave {_NOT_FINITE}\n"
                "likely causes: images that are not normalised, damaged weights, or half precision"
            )
        # Without a pose the next frame could not tell where this one's features lie.
        self._memory = None if alone else memory
        self._scene_token = scene_token
        assert isinstance(outputs, ModelOutputs)
        return outputs

    def _with_can_bus(
        self, frames: CameraFrames, motion: EgoMotion, scene_token: str, alone: str
    ) -> CameraFrames:
        """The frame with the CAN-bus vector that its pose and those before give, for models that read one."""
        if self._can_bus is None:
            return frames
        if alone:
            self._can_bus.forget()
            return replace(frames, can_bus=torch.zeros(1, CAN_BUS_SIZE, dtype=torch.float64))
        if self._memory is None or self.rules.reason(self._memory, frames, scene_token != self._scene_token):
            self._can_bus.forget()
        vector = self._can_bus.vector(float(frames.timestamps_s[0]), motion.ego_to_global)
        return replace(frames, can_bus=vector[None])

    def decode(self, outputs: ModelOutputs) -> list[Boxes3D]:
        """Decode raw outputs to boxes: a list of one, BEV frame, with scores, best first, on the CPU."""
        model: Any = self.model
        with torch.inference_mode():
            return [boxes.to("cpu") for boxes in model.decode(outputs)]

    def _require_canvas(self) -> _Canvas:
        if self._canvas is None:
            raise ConfigError("this StreamingPredictor has no data settings: give it data=config.data")
        return self._canvas

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "32-true":
            return nullcontext()
        dtype = _AUTOCAST[self.precision]
        if dtype is torch.float16 and self.device.type == "cpu":
            dtype = torch.bfloat16  # as Lightning does: CPUs have no float16 autocast of use
        return torch.autocast(self.device.type, dtype)


def _checked_device(device: torch.device | str) -> torch.device:
    """The device of a name; one that is not there is refused."""
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        parsed = None
    if parsed is None or parsed.type not in _DEVICES:
        raise ConfigError(f"device must be one of {', '.join(_DEVICES)} or cuda:NUMBER, got {str(device)!r}")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {parsed}, but this PyTorch sees {torch.cuda.device_count()} GPUs")
    if parsed.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device is mps, but this PyTorch cannot compute on it")
    return parsed


def _why_alone(motion: EgoMotion | None, channels: Iterable[str]) -> str:
    if motion is None:
        return _NO_MOTION
    problem = motion.problem(channels)
    return f"the pose is impossible: {problem}" if problem else ""


def _without_motion(frames: CameraFrames) -> CameraFrames:
    """The same images with a pose and a CAN-bus vector that are harmless to a model without memory."""
    eye = torch.eye(4, dtype=torch.float64, device=frames.bev_to_global.device)
    can_bus = None if frames.can_bus is None else torch.zeros_like(frames.can_bus)
    return replace(frames, bev_to_global=eye.expand_as(frames.bev_to_global), can_bus=can_bus)


class _Stopwatch:
    """Times named stages; waits for the device at each stage's end."""

    def __init__(self, device: torch.device) -> None:
        self.stages_ms: dict[str, float] = {}
        self._device = device

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.stages_ms[name] = 1e3 * (time.perf_counter() - begin)


class _Canvas:
    """The network's input, filled anew for every frame in the same memory."""

    def __init__(self, data: DataConfig) -> None:
        self.cameras = tuple(data.cameras)
        self._input = ImageInput(data)
        self.size = self._input.size
        width, height = self.size
        # NumPy asks for huge pages where torch does not: some 30 times fewer page faults.
        self._images = torch.from_numpy(np.zeros((1, len(self.cameras), 3, height, width), dtype=np.float32))
        self._fits: dict[str, ImageFit] = {}

    def reduction(self, source: tuple[int, int]) -> int:
        return self._input.reduction(self._input.plan(source))

    def blank_rig(self) -> RigCalibration:
        width, height = self.size
        intrinsics = torch.tensor(
            [[width / 2, 0, width / 2], [0, width / 2, height / 2], [0, 0, 1]], dtype=torch.float64
        )
        camera = CameraCalibration(width, height, intrinsics, torch.eye(4, dtype=torch.float64))
        return RigCalibration(dict.fromkeys(self.cameras, camera))

    def frames(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        rig: RigCalibration,
        motion: EgoMotion,
        bev_to_global: Tensor,
        stamp_s: float,
    ) -> CameraFrames:
        unknown = [channel for channel in images if channel not in self.cameras]
        if unknown or not images:
            have = ", ".join(map(str, unknown)) or "none"
            raise ValueError(f"images of some of {', '.join(self.cameras)} are needed, got {have}")
        unknown_exposures = [c for c in motion.at_exposure if c not in self.cameras and c not in rig.cameras]
        if unknown_exposures:
            raise ValueError(
                f"at_exposure names {', '.join(unknown_exposures)}, "
                "which neither the calibration nor the model has"
            )
        projections = torch.eye(4, dtype=torch.float64).repeat(len(self.cameras), 1, 1)
        for slot, channel in enumerate(self.cameras):
            if channel not in images:
                continue
            if channel not in rig.cameras:
                raise ValueError(f"{channel} has an image but no calibration")
            camera = rig.cameras[channel]
            image = checked_image(images[channel], channel)
            fit = self._write(slot, channel, image, (camera.width, camera.height))
            ego_to_global = motion.at_exposure.get(channel, motion.ego_to_global)
            projections[slot] = fit.matrix() @ camera.projection(ego_to_global, bev_to_global)
        present = [channel in images for channel in self.cameras]
        return CameraFrames(
            images=self._images,
            bev_to_image=projections[None].float(),
            bev_to_global=bev_to_global[None],
            timestamps_s=torch.tensor([stamp_s], dtype=torch.float64),
            camera_mask=None if all(present) else torch.tensor([present]),
        )

    def _write(self, slot: int, channel: str, image: NDArray[np.uint8], source: tuple[int, int]) -> ImageFit:
        fit = self._input.plan(source)
        reduction = self._input.reduction(fit)
        size = (image.shape[1], image.shape[0])
        allowed = [(source[0] // factor, source[1] // factor) for factor in sorted({1, reduction})]
        if size not in allowed:
            wanted = " or ".join(f"{width}x{height}" for width, height in allowed)
            raise ValueError(
                f"{channel} has an image of {size[0]}x{size[1]} pixels, its calibration {wanted}"
            )
        if self._fits.get(channel) != fit:
            self._images[0, slot].zero_()  # the padding may lie elsewhere now
            self._fits[channel] = fit
        self._input.write(image, fit, self._images[0, slot])
        return fit
