"""Names of BEVFormer's published transformer and head parameters in this project's modules."""

from __future__ import annotations

import re

_ENCODER_LAYER = (
    ("attentions.0.", "temporal_attention."),
    ("attentions.1.deformable_attention.", "spatial_attention."),
    ("attentions.1.", "spatial_attention."),
)
_DECODER_LAYER = (
    ("attentions.0.attn.", "self_attention."),
    ("attentions.1.", "cross_attention."),
)
_ANY_LAYER = (
    ("ffns.0.layers.0.0.", "feed_forward.linear1."),
    ("ffns.0.layers.1.", "feed_forward.linear2."),
    ("norms.0.", "norm1."),
    ("norms.1.", "norm2."),
    ("norms.2.", "norm3."),
)


def _replace_first(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        if old in name:
            return name.replace(old, new, 1)
    return name


def encoder_key(name: str) -> str:
    """``layers.K...`` of BEVFormerEncoder to :class:`~bevperception.models.bev.encoder.BEVEncoder`."""
    return _replace_first(_replace_first(name, _ENCODER_LAYER), _ANY_LAYER)


def decoder_key(name: str) -> str:
    """``layers.K...`` of DetectionTransformerDecoder to ``heads.decoder.DetectionDecoder``."""
    return _replace_first(_replace_first(name, _DECODER_LAYER), _ANY_LAYER)


def fusion_key(name: str) -> str:
    """A name within ResNetFusion of v2 to :class:`~bevperception.models.bev.fusion.TemporalFusion`."""
    name = re.sub(r"^layers\.", "blocks.", name)
    name = re.sub(r"\.bn([12])\.", r".norm\1.", name).replace(".downsample.", ".shortcut.")
    return name.replace("layer_norm.0.", "projection.").replace("layer_norm.1.", "norm.")


def transformer_key(name: str) -> str:
    """A name within PerceptionTransformer to one of :class:`~bevperception.models.bevformer.BEVFormer`.

    Args:
        name: without the ``pts_bbox_head.transformer.`` prefix.
    """
    if name.startswith("encoder."):
        return "bev_transformer.encoder." + encoder_key(name.removeprefix("encoder."))
    if name.startswith("decoder."):
        return "detection.decoder." + decoder_key(name.removeprefix("decoder."))
    if name.startswith("reference_points."):
        return "detection." + name
    if name.startswith("fusion."):
        return "fusion." + fusion_key(name.removeprefix("fusion."))
    name = name.replace("cams_embeds", "camera_embeds")
    name = re.sub(r"^can_bus_mlp\.0\.", "can_bus_embedding.linear1.", name)
    name = re.sub(r"^can_bus_mlp\.2\.", "can_bus_embedding.linear2.", name)
    name = re.sub(r"^can_bus_mlp\.norm\.", "can_bus_embedding.norm.", name)
    return "bev_transformer." + name


def head_key(name: str) -> str | None:
    """A name within the published BEVFormerHead to one of ``BEVFormer``; None for what is no weight here.

    Args:
        name: without the ``pts_bbox_head.`` prefix.
    """
    if name == "code_weights":
        return None
    if name.startswith("transformer."):
        return transformer_key(name.removeprefix("transformer."))
    rules = (
        ("cls_branches.", "detection.classification."),
        ("reg_branches.", "detection.regression."),
        ("query_embedding.", "detection.query_embedding."),
        ("bev_embedding.", "bev_queries."),
        ("positional_encoding.", "bev_position."),
    )
    for old, new in rules:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise KeyError(f"{name!r} is no parameter of the published BEVFormer head")
