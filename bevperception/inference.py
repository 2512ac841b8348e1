"""Streaming perception of one vehicle: the model, its memory, and when the memory must be forgotten."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bevperception.structures import BEVMemory, Boxes3D, CameraFrames, ModelOutputs

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class ResetRules:
    """When the frame before is of no use for the current one.

    Args:
        max_gap_s: longest time between two frames, seconds.
        max_jump_m: farthest that the vehicle's pose moves between two frames, metres; farther means
            that localisation jumped.
    """

    max_gap_s: float = 2.0
    max_jump_m: float = 80.0

    def reason(self, memory: BEVMemory, frames: CameraFrames, new_scene: bool) -> str | None:
        """Why the memory must be forgotten before the frames are looked at; None to keep it.

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


class StreamingPredictor:
    """Frames of one vehicle in, boxes and segmentation out; owns the memory between them.

    Args:
        model: a BEVFormer; put in evaluation mode and moved to the device.
        device: where it runs.
        precision: Lightning's names: 32-true, bf16-mixed or 16-mixed.
        rules: when memory is forgotten.

    Attributes:
        last_reset: why the newest frame started a new memory; None when the memory was used.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str = "cpu",
        precision: str = "32-true",
        rules: ResetRules | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.precision = precision
        self.rules = rules or ResetRules()
        self.last_reset: str | None = None
        self._memory: BEVMemory | None = None
        self._scene_token: str | None = None

    def reset(self) -> None:
        """Forget everything; the next frame starts a sequence."""
        self._memory, self._scene_token = None, None

    def step(self, frames: CameraFrames, scene_token: str) -> tuple[list[Boxes3D], Tensor | None]:
        """Perceive one frame.

        Args:
            frames: of one vehicle (B = 1), on any device.
            scene_token: another one than the last frame's starts a new memory.

        Returns:
            boxes (a list of one) in the BEV frame with scores, best first, on the CPU;
            segmentation probabilities (1, classes, rows, columns) float32 on the model's device, or
            None without a segmentation head.

        Raises:
            ValueError: if there is more than one vehicle.
        """
        outputs = self.observe(frames, scene_token)
        logits = outputs.segmentation_logits
        return self.decode(outputs), None if logits is None else logits.float().sigmoid()

    def observe(self, frames: CameraFrames, scene_token: str) -> ModelOutputs:
        """The model's raw outputs of one frame, on its device; arguments and errors as :meth:`step`."""
        if frames.batch_size != 1:
            raise ValueError(f"a StreamingPredictor follows one vehicle, got frames of {frames.batch_size}")
        if self._memory is None:
            self.last_reset = "first frame"
        else:
            self.last_reset = self.rules.reason(self._memory, frames, scene_token != self._scene_token)
        if self.last_reset is not None:
            self._memory = None
        model: Any = self.model
        with torch.inference_mode(), self._autocast():
            outputs, memory = model(frames.to(self.device), self._memory)
        self._memory, self._scene_token = memory, scene_token
        assert isinstance(outputs, ModelOutputs)
        return outputs

    def decode(self, outputs: ModelOutputs) -> list[Boxes3D]:
        """Boxes of raw outputs, see :meth:`step`."""
        model: Any = self.model
        with torch.inference_mode():
            return [found.to("cpu") for found in model.decode(outputs)]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "32-true":
            return nullcontext()
        dtype = _AUTOCAST[self.precision]
        if dtype is torch.float16 and self.device.type == "cpu":
            dtype = torch.bfloat16  # as Lightning does: CPUs have no float16 autocast of use
        return torch.autocast(self.device.type, dtype)
