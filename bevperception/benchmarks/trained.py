"""Trained weights and the model they fill, for benchmarks that evaluate it."""

from __future__ import annotations

import torch

from bevperception.checkpoints.weights import load_model, read_weights
from bevperception.config import ExperimentConfig
from bevperception.errors import ConfigError
from bevperception.evaluation.devices import launch
from bevperception.models.bevformer import BEVFormer


def load_trained(config: ExperimentConfig, weights: str) -> tuple[BEVFormer, torch.device]:
    """Fill the model of a configuration, and choose where this one process runs it.

    Args:
        config: of the run.
        weights: a path, or the name of shipped weights.

    Raises:
        ConfigError: the configuration asks for several processes.
        CheckpointError: there are no such weights, or they are of another architecture.
    """
    if config.training.devices * config.training.nodes > 1:
        raise ConfigError("this benchmark runs in one process: training.devices and nodes must be 1")
    device = launch(config.training)
    return load_model(read_weights(weights), config), device
