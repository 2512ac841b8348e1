"""Evaluation of BEVFormer v2 as published: every past frame is encoded anew in the current BEV frame.

A vehicle keeps the BEV features of past frames and warps them: a frame's cost hardly grows with their number.
The published model keeps the images and encodes each past frame with the calibration that the current frame
sees it by; published numbers are of that. Image features are kept here, so the backbone runs once a frame.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from bevperception.config_model import ModelConfig
from bevperception.errors import ConfigError
from bevperception.models.bev.alignment import seen_from
from bevperception.models.bevformer import BEVFormer
from bevperception.structures import BEVMemory, Boxes3D, CameraFrames, ModelOutputs

History = Literal["published", "warped"]
"""How a model that fuses frames as published sees past ones; see :func:`with_history`."""


class CurrentFrameHistory(nn.Module):
    """A BEVFormer v2 whose past frames are encoded in the BEV frame of the current one.

    Called like the model itself, one vehicle's frames in order. A call without memory begins a sequence.

    Args:
        model: fuses frames as published.

    Source: ``obtain_history_bev`` and ``simple_test`` of the published BEVFormer v2.
    """

    def __init__(self, model: BEVFormer) -> None:
        super().__init__()
        self.model = model
        self._past: deque[tuple[list[Tensor], CameraFrames]] = deque(maxlen=model.config.temporal.past)

    def forward(
        self, frames: CameraFrames, memory: BEVMemory | None = None
    ) -> tuple[ModelOutputs, BEVMemory]:
        """Perceive one frame, see :meth:`BEVFormer.forward`.

        Args:
            frames: of one vehicle.
            memory: of the call before; only whether it is there counts.
        """
        model = self.model
        if memory is None:
            self._past.clear()
        features = model.image_features(frames)
        history: BEVMemory | None = None
        for past_features, past in self._past:
            moved = seen_from(past, frames.bev_to_global)
            bev = model.encode(past_features, moved, history)
            history = model.temporal.remember(bev, moved, history)
        outputs, newest = model.perceive(features, frames, history)
        # Of the images only their size is needed again.
        size_alone = frames.images[:, :, :1, :1, :1].expand(frames.images.shape)
        self._past.append((features, replace(frames, images=size_alone)))
        return outputs, newest

    def decode(self, outputs: ModelOutputs) -> list[Boxes3D]:
        """Boxes of every sample, see :meth:`BEVFormer.decode`."""
        return self.model.decode(outputs)


def with_history(model: nn.Module, config: ModelConfig, history: History | None = None) -> nn.Module:
    """The model as it is to be evaluated.

    Args:
        model: of the configuration.
        config: of the model.
        history: ``published`` encodes past frames anew, as published numbers need; ``warped`` warps the
            memory, as on a vehicle. None takes the first for models that fuse frames as published.

    Raises:
        ConfigError: ``published`` for a model of another kind.
    """
    fuses = config.temporal.published_fusion and config.temporal.past > 0
    if history == "published" and not fuses:
        raise ConfigError(
            "history=published is for models with temporal.mode=fusion_published and past frames, "
            f"this one has mode={config.temporal.mode} and past={config.temporal.past}\n"
            "leave the option out: there is one way to evaluate it"
        )
    if history == "warped" or not fuses or not isinstance(model, BEVFormer):
        return model
    return CurrentFrameHistory(model)
