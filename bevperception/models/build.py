"""The model of a configuration."""

from __future__ import annotations

from bevperception.config_model import ModelConfig
from bevperception.models.bevformer import BEVFormer
from bevperception.models.perspective_model import PerspectiveModel

Model = BEVFormer | PerspectiveModel


def build_model(config: ModelConfig) -> Model:
    """Build a model with random weights.

    Args:
        config: ``perspective.only`` chooses the class.

    Raises:
        ConfigError: the configuration names an unknown part.
    """
    return PerspectiveModel(config) if config.perspective.only else BEVFormer(config)
