"""Image backbones, built by name."""

from __future__ import annotations

from bevperception.config_model import BackboneConfig
from bevperception.errors import ConfigError
from bevperception.models.backbones import internimage, resnet


def build_backbone(config: BackboneConfig) -> internimage.InternImage | resnet.ResNet:
    """Build an image backbone with random weights.

    Args:
        config: which one; ``config.weights`` is not read here.

    Returns:
        A module with ``out_channels`` and ``out_strides`` (tuples, one entry per stage handed out) that
        maps images (N, 3, H, W) to a list of feature maps (N, C, h, w).

    Raises:
        ConfigError: the variant is unknown, or a setting is out of range or does not apply to it.
    """
    if config.variant in internimage.VARIANTS:
        if config.train_norm:
            raise ConfigError(f"backbone.train_norm is not for {config.variant}, which has no batch norm")
        return internimage.InternImage(
            internimage.VARIANTS[config.variant],
            config.out_indices,
            drop_path_rate=config.drop_path_rate,
            checkpointing=config.checkpointing,
            frozen_stages=config.frozen_stages,
        )
    if config.variant in resnet.VARIANTS:
        if config.drop_path_rate:
            raise ConfigError(f"backbone.drop_path_rate is not available for {config.variant}: leave it out")
        return resnet.ResNet(
            resnet.VARIANTS[config.variant],
            config.out_indices,
            checkpointing=config.checkpointing,
            frozen_stages=config.frozen_stages,
            norm_eval=not config.train_norm,
            norm_trainable=config.train_norm,
        )
    names = ", ".join([*internimage.VARIANTS, *resnet.VARIANTS])
    raise ConfigError(f"backbone.variant {config.variant!r} is unknown; available: {names}")
