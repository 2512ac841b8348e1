"""Names of parameters in published checkpoints and in this project: one table, read in both directions.

A rule is a pair of templates, the published name first; ``{}`` stands for a number. Templates that end with
a dot are beginnings of names, the others whole names. The longest template that fits decides. Only names
differ: no weight is changed in shape or value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

Rule = tuple[str, str]

_NUMBER = r"(\d+)"


class NameTable:
    """Translates names by rules, in both directions.

    Args:
        rules: published and own template of each.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        rules = list(rules)
        self.rules = rules
        self._to_own = _compiled(rules)
        self._to_official = _compiled((own, official) for official, own in rules)

    def to_own(self, name: str) -> str | None:
        """The name in this project's module; None for a name that no rule fits."""
        return _translate(name, self._to_own)

    def to_official(self, name: str) -> str | None:
        """The published name of one of this project's; None for a name that no rule fits."""
        return _translate(name, self._to_official)

    def below(self, official: str, own: str) -> list[Rule]:
        """The rules for a module that is a part of another.

        Args:
            official: the part's published prefix, with its dot.
            own: its prefix here, with its dot.
        """
        return [(official + one, own + other) for one, other in self.rules]


def _compiled(rules: Iterable[Rule]) -> list[tuple[re.Pattern[str], str]]:
    """Patterns with what replaces them, the longest template first."""
    longest_first = sorted(rules, key=lambda rule: len(rule[0]), reverse=True)
    compiled = []
    for source, target in longest_first:
        pattern = re.escape(source).replace(r"\{\}", _NUMBER)
        if source and not source.endswith("."):
            pattern += "$"
        for number in range(1, target.count("{}") + 1):
            target = target.replace("{}", f"\\g<{number}>", 1)
        compiled.append((re.compile(pattern), target))
    return compiled


def _translate(name: str, compiled: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in compiled:
        match = pattern.match(name)
        if match:
            return match.expand(target) + name[match.end() :]
    return None


_FEED_FORWARD_AND_NORMS = [
    ("ffns.0.layers.0.0.", "feed_forward.linear1."),
    ("ffns.0.layers.1.", "feed_forward.linear2."),
    ("norms.0.", "norm1."),
    ("norms.1.", "norm2."),
    ("norms.2.", "norm3."),
]

ENCODER_LAYER = NameTable(
    [
        ("attentions.0.", "temporal_attention."),
        ("attentions.1.deformable_attention.", "spatial_attention."),
        ("attentions.1.output_proj.", "spatial_attention.output_proj."),
        *_FEED_FORWARD_AND_NORMS,
    ]
)
"""BEVFormerLayer to :class:`~bevperception.models.bev.encoder.BEVEncoderLayer`."""

DECODER_LAYER = NameTable(
    [
        ("attentions.0.attn.", "self_attention."),
        ("attentions.1.", "cross_attention."),
        *_FEED_FORWARD_AND_NORMS,
    ]
)
"""A layer of DetectionTransformerDecoder to one of ``heads.decoder.DetectionDecoder``."""

ENCODER = NameTable(ENCODER_LAYER.below("layers.{}.", "layers.{}."))
DECODER = NameTable(DECODER_LAYER.below("layers.{}.", "layers.{}."))

FUSION = NameTable(
    [
        ("layers.{}.", "blocks.{}."),
        ("layers.{}.bn1.", "blocks.{}.norm1."),
        ("layers.{}.bn2.", "blocks.{}.norm2."),
        ("layers.{}.downsample.", "blocks.{}.shortcut."),
        ("layer_norm.0.", "projection."),
        ("layer_norm.1.", "norm."),
    ]
)
"""ResNetFusion of v2 to :class:`~bevperception.models.bev.fusion.TemporalFusion`."""

FPN = NameTable([("lateral_convs.{}.conv.", "laterals.{}."), ("fpn_convs.{}.conv.", "outputs.{}.")])
"""mmdet's FPN to :class:`~bevperception.models.necks.FPN`."""

TRANSFORMER = NameTable(
    [
        *ENCODER.below("encoder.", "bev_transformer.encoder."),
        *DECODER.below("decoder.", "detection.decoder."),
        *FUSION.below("fusion.", "fusion."),
        ("reference_points.", "detection.reference_points."),
        ("level_embeds", "bev_transformer.level_embeds"),
        ("cams_embeds", "bev_transformer.camera_embeds"),
        ("can_bus_mlp.0.", "bev_transformer.can_bus_embedding.linear1."),
        ("can_bus_mlp.2.", "bev_transformer.can_bus_embedding.linear2."),
        ("can_bus_mlp.norm.", "bev_transformer.can_bus_embedding.norm."),
    ]
)
"""PerceptionTransformer of v1 and v2 to parts of :class:`~bevperception.models.bevformer.BEVFormer`."""

HEAD = NameTable(
    [
        *TRANSFORMER.below("transformer.", ""),
        ("cls_branches.", "detection.classification."),
        ("reg_branches.", "detection.regression."),
        ("query_embedding.", "detection.query_embedding."),
        ("bev_embedding.", "bev_queries."),
        ("positional_encoding.", "bev_position."),
    ]
)
"""BEVFormerHead and v2's group-DETR head to parts of ``BEVFormer``."""


def _tower(head: str, name: str, own: str) -> list[Rule]:
    official = f"{head}.{name}.{{}}."
    return [
        (official + "norm.", f"{own}.{{}}.norms."),
        (official + "weight", f"{own}.{{}}.conv.weight"),
        (official + "bias", f"{own}.{{}}.conv.bias"),
    ]


PERSPECTIVE = NameTable(
    [
        *_tower("fcos2d_head", "cls_tower", "class_tower"),
        *_tower("fcos2d_head", "box2d_tower", "box2d_tower"),
        *_tower("fcos3d_head", "box3d_tower", "box3d_tower"),
        ("fcos2d_head.cls_logits.", "class_logits."),
        ("fcos2d_head.box2d_reg.", "box2d."),
        ("fcos2d_head.centerness.", "centreness."),
        ("fcos2d_head.scales_box2d_reg.{}.scale", "box2d_scales.{}"),
        ("fcos3d_head.box3d_quat.", "quaternion."),
        ("fcos3d_head.box3d_ctr.", "centre."),
        ("fcos3d_head.box3d_depth.", "depth."),
        ("fcos3d_head.box3d_size.", "size."),
        ("fcos3d_head.box3d_conf.", "confidence."),
        ("fcos3d_head.scales_proj_ctr.{}.scale", "centre_scales.{}"),
        ("fcos3d_head.scales_size.{}.scale", "size_scales.{}"),
        ("fcos3d_head.scales_conf.{}.scale", "confidence_scales.{}"),
        ("fcos3d_head.scales_depth.{}.scale", "depth_scales.{}"),
        ("fcos3d_head.offsets_depth.{}.bias", "depth_offsets.{}"),
        ("attr_logits.", "attributes."),
        ("speed.", "speed."),
    ]
)
"""NuscenesDD3D to ``heads.perspective.network.PerspectiveHead``."""

DCNV3 = NameTable(
    [
        ("dw_conv.0.", "depthwise."),
        # A norm stands in a sequence with the permutations around it, hence its number.
        ("dw_conv.1.1.", "depthwise_norm."),
        ("offset.", "offset."),
        ("mask.", "mask."),
        ("input_proj.", "input_projection."),
        ("output_proj.", "output_projection."),
        ("center_feature_scale_proj_weight", "center_scale.weight"),
        ("center_feature_scale_proj_bias", "center_scale.bias"),
    ]
)
"""DCNv3 to the operator's module of ``backbones.internimage``."""


def internimage_table(post_norm: bool) -> NameTable:
    """InternImage (OpenGVLab, detection or classification) to ``backbones.internimage.InternImage``.

    Args:
        post_norm: whether the model is post-norm: published blocks call their norms norm1 and norm2
            whether these stand before or after the operator.
    """
    block, own = "levels.{}.blocks.{}.", "stages.{}.blocks.{}."
    place = "post" if post_norm else "pre"
    rules = [
        ("patch_embed.", "stem."),
        ("patch_embed.norm1.1.", "stem.norm1."),
        ("patch_embed.norm2.1.", "stem.norm2."),
        *DCNV3.below(block + "dcn.", own + "dcn."),
        (block + "gamma1", own + "scale1"),
        (block + "gamma2", own + "scale2"),
        (block + "mlp.", own + "mlp."),
        ("levels.{}.norm.0.", "stages.{}.norm."),
        ("levels.{}.post_norms.{}.0.", "stages.{}.post_norms.{}."),
        ("levels.{}.downsample.conv.", "downsamples.{}.conv."),
        ("levels.{}.downsample.norm.1.", "downsamples.{}.norm."),
    ]
    for number in (1, 2):
        rules.append((f"{block}norm{number}.0.", f"{own}{place}_norm{number}."))
        if not post_norm:
            rules.append((f"{block}res_post_norm{number}.0.", f"{own}post_norm{number}."))
    return NameTable(rules)


RESNET = NameTable([(name, name) for name in ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")])
"""mmdet's ResNet, whose names this project keeps."""


def bevformer_table(backbone: NameTable) -> NameTable:
    """A published BEVFormer v1 or v2 to :class:`~bevperception.models.bevformer.BEVFormer`.

    Args:
        backbone: of the model's backbone.
    """
    return NameTable(
        [
            *backbone.below("img_backbone.", "backbone."),
            *FPN.below("img_neck.", "neck."),
            *HEAD.below("pts_bbox_head.", ""),
            *PERSPECTIVE.below("fcos3d_bbox_head.", "perspective.head."),
        ]
    )


def renamed(state: Mapping[str, Tensor], table: NameTable) -> dict[str, Tensor]:
    """Published tensors under this project's names.

    Args:
        state: by published name.
        table: of their module; names that it does not know are left out.
    """
    pairs = ((table.to_own(name), value) for name, value in state.items())
    return {name: value for name, value in pairs if name is not None}
