"""Load the model that the node's settings name, ready to stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bevperception.checkpoints.weights import load_model, read_weights
from bevperception.config_io import config_from_dict, load_config
from bevperception.config_model import SegmentationConfig
from bevperception.errors import ConfigError
from bevperception.inference import ResetRules, StreamingPredictor
from bevperception.streaming.settings import NodeSettings


@dataclass(frozen=True)
class Loaded:
    """A loaded model with what the node needs to know about it.

    Attributes:
        predictor: with data settings.
        channels: its cameras.
        segmentation: settings of its segmentation head; None without one.
        bev_frame: ego or lidar.
    """

    predictor: StreamingPredictor
    channels: tuple[str, ...]
    segmentation: SegmentationConfig | None
    bev_frame: str


def load_predictor(settings: NodeSettings) -> Loaded:
    """Load weights, configuration and device that the settings name into a streaming predictor.

    Raises:
        ConfigError: no weights are named, the configuration is wrong, the device is not there, or the model
            needs what a vehicle's topics do not give.
        CheckpointError: the weights are missing, damaged or of another architecture.
    """
    if not settings.weights:
        raise ConfigError("the parameter weights is empty: name weights.safetensors or a run's folder")
    weights = read_weights(settings.weights)
    if settings.config:
        config = load_config(settings.config)
    else:
        config = config_from_dict(weights.card.config, str(weights.path))
    if config.data.bev_frame == "lidar" and not settings.calibration_file:
        raise ConfigError(
            "the model reasons in the lidar's frame: name a calibration_file with a section 'bev'"
        )
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise ConfigError("device is cuda, but this PyTorch sees no GPU")
    device = "cuda" if cuda and settings.device != "cpu" else "cpu"
    rules = ResetRules(settings.max_gap_s, settings.max_jump_m)
    model = load_model(weights, config)
    return Loaded(
        StreamingPredictor(model, device, settings.precision, rules, config.data, settings.compiled),
        tuple(config.data.cameras),
        config.model.segmentation if config.model.segmentation.enabled else None,
        config.data.bev_frame,
    )
