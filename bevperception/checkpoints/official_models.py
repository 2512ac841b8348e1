"""Which published model a file holds, by the names of its parameters.

Shapes choose only between models of one family whose names are the same: the width of a backbone, the number
of query groups or of fused frames.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bevperception.checkpoints.official_names import (
    FPN,
    RESNET,
    NameTable,
    bevformer_table,
    internimage_table,
)
from bevperception.checkpoints.tensors import parts_of
from bevperception.errors import CheckpointError
from bevperception.models.backbones import internimage

BACKBONE_PREFIXES = ("img_backbone.", "backbone.")
"""Names of a detector's backbone; a classifier's names begin without."""
_NECK_PREFIXES = ("img_neck.", "neck.")
_PUBLISHED_QUERIES = 900
_BEV_CHANNELS = 256
_CAFFE = {50: "resnet50_caffe", 101: "resnet101_caffe"}
_LAYER3_BLOCKS = {6: 50, 23: 101}


@dataclass(frozen=True)
class OfficialModel:
    """A published model.

    Attributes:
        title: for people.
        configs: names of the shipped configuration files that it is of, composed in this order.
        prefixes: published beginnings of the names of a backbone and, if there is one, its neck; None for a
            whole BEVFormer.
        settings: what the configuration files do not say, by dotted name.
    """

    title: str
    configs: tuple[str, ...]
    prefixes: tuple[str, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def official_table(variant: str, prefixes: Sequence[str] | None) -> NameTable:
    """The names of a published model.

    Args:
        variant: of its backbone, as in the configuration.
        prefixes: see :class:`OfficialModel`.
    """
    spec = internimage.VARIANTS.get(variant)
    backbone = RESNET if spec is None else internimage_table(spec.post_norm)
    if prefixes is None:
        return bevformer_table(backbone)
    rules = backbone.below(prefixes[0], "backbone.")
    for neck in prefixes[1:]:
        rules += FPN.below(neck, "neck.")
    return NameTable(rules)


def recognise(state: Mapping[str, Tensor], where: str) -> OfficialModel:
    """The published model that tensors are of.

    Args:
        state: by published name.
        where: the file, for messages.

    Raises:
        CheckpointError: it is none that is known.
    """
    if any(name.startswith("pts_bbox_head.") for name in state):
        return _bevformer(state, where)
    prefix = next((p for p in BACKBONE_PREFIXES if any(name.startswith(p) for name in state)), "")
    backbone = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if _is_internimage(backbone):
        variant = _internimage_variant(backbone, where)
        title = f"InternImage-{variant.rpartition('_')[2].upper()}"
        return _backbone_alone(title, variant, prefix, state)
    if "layer1.0.conv1.weight" in backbone and any(name.startswith("bbox_head.") for name in state):
        variant = _resnet_variant(backbone, where)
        return _backbone_alone(f"FCOS3D's {variant}", variant, prefix, state)
    raise CheckpointError(f"{where} holds no model that is known: {_unknown(state)}")


def _unknown(state: Mapping[str, Tensor]) -> str:
    """What a file holds instead, and what to do with it."""
    if any(name.startswith("bev_transformer.") for name in state):
        return "its names are this project's own\ngive it to --weights or training.initial_weights as it is"
    if "layer1.0.conv1.weight" in state:
        return "a bare ResNet\nname it in model.backbone.weights as it is; no conversion is needed"
    parts = ", ".join(list(parts_of(state))[:8])
    return (
        f"its parts are {parts}\n"
        "known are BEVFormer tiny, small, base; BEVFormer v2 t1-base, t1, t2, t8; InternImage T to G; FCOS3D"
    )


def _count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers stand where a pattern has its group."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _bevformer(state: Mapping[str, Tensor], where: str) -> OfficialModel:
    backbone = {n.removeprefix("img_backbone."): v for n, v in state.items() if n.startswith("img_backbone.")}
    other: tuple[str, ...] = ()
    if _is_internimage(backbone):
        other = (f"backbones/{_internimage_variant(backbone, where)}",)
    transformer = "pts_bbox_head.transformer."
    if any(name.startswith(("fcos3d_bbox_head.", transformer + "fusion.")) for name in state):
        setting = _v2_setting(state)
        configs, title = f"bevformer_v2_r50_{setting}", f"BEVFormer v2 {setting.replace('_', '-')}"
    elif any(name.startswith(transformer + "can_bus_mlp.") for name in state):
        size = _v1_size(state)
        configs, title = f"bevformer_{size}", f"BEVFormer {size}"
    else:
        raise CheckpointError(
            f"{where} has a BEVFormer head, but neither v1's can_bus_mlp nor v2's fcos3d_bbox_head or "
            "fusion, so which model it is of is unknown"
        )
    return OfficialModel(title, (configs, *other))


def _v1_size(state: Mapping[str, Tensor]) -> str:
    if not any(".conv_offset." in name for name in state):
        return "tiny"
    return "base" if _count(state, r"img_neck\.fpn_convs\.(\d+)\.") > 1 else "small"


def _v2_setting(state: Mapping[str, Tensor]) -> str:
    first = state.get("pts_bbox_head.transformer.fusion.layers.0.conv1.weight")
    if first is not None and first.dim() == 4:
        return f"t{first.shape[1] // _BEV_CHANNELS}"
    queries = state.get("pts_bbox_head.query_embedding.weight")
    one_group = queries is not None and queries.dim() == 2 and queries.shape[0] == _PUBLISHED_QUERIES
    return "t1_base" if one_group else "t1"


def _is_internimage(names: Iterable[str]) -> bool:
    return any(re.match(r"levels\.\d+\.blocks\.\d+\.dcn\.", name) for name in names)


def _internimage_variant(backbone: Mapping[str, Tensor], where: str) -> str:
    depths = tuple(_count(backbone, rf"levels\.{level}\.blocks\.(\d+)\.") for level in range(4))
    stem = backbone.get("patch_embed.conv2.weight")
    channels = 0 if stem is None or stem.dim() != 4 else stem.shape[0]
    fitting = [name for name, spec in internimage.VARIANTS.items() if tuple(spec.depths) == depths]
    same = [name for name in fitting if internimage.VARIANTS[name].channels == channels]
    if not same:
        raise CheckpointError(
            f"{where} holds an InternImage of {'-'.join(map(str, depths))} blocks and {channels} channels, "
            "which is none of T, S, B, L, XL, H, G\n"
            "a whole published checkpoint of one of these is needed"
        )
    return same[0]


def _resnet_variant(backbone: Mapping[str, Tensor], where: str) -> str:
    depth = _LAYER3_BLOCKS.get(_count(backbone, r"layer3\.(\d+)\."))
    if depth is None:
        raise CheckpointError(f"{where} holds a ResNet that is neither ResNet-50 nor ResNet-101")
    return _CAFFE[depth] + ("_dcn" if any(".conv_offset." in name for name in backbone) else "")


def _backbone_alone(title: str, variant: str, prefix: str, state: Mapping[str, Tensor]) -> OfficialModel:
    neck = next((p for p in _NECK_PREFIXES if any(name.startswith(p) for name in state)), None)
    prefixes = (prefix,) if neck is None else (prefix, neck)
    return OfficialModel(title, ("internimage_t_base",), prefixes, {"model.backbone.variant": variant})
