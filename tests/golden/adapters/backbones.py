"""Backbones, the neck and the DCNv3 module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from bevperception.checkpoints.official_names import DCNV3, internimage_table
from bevperception.checkpoints.official_names import FPN as FPN_NAMES
from bevperception.models.backbones.internimage import DCNv3, DCNv3Settings, InternImage, InternImageSpec
from bevperception.models.backbones.layers import Activation, Norm
from bevperception.models.backbones.resnet import DeformableConvolution, ResNet, ResNetSpec
from bevperception.models.necks import FPN
from tests.golden.case import Case, adapter

NORMS: dict[str, Norm] = {"LN": "layer", "BN": "batch"}
ACTIVATIONS: dict[str, Activation] = {"GELU": "gelu", "ReLU": "relu", "SiLU": "silu"}
RESNET_DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def internimage_spec(published: Mapping[str, Any]) -> InternImageSpec:
    """The spec for published constructor arguments, which have defaults of their own.

    Published blocks make, but do not use, their res-post-norms where the model is post-norm or has
    layer scale; these are left out here.
    """
    post_norm = published.get("post_norm", False)
    layer_scale = published.get("layer_scale")
    blocks = published.get("level2_post_norm_block_ids") if published.get("level2_post_norm") else None
    return InternImageSpec(
        channels=published.get("channels", 64),
        depths=tuple(published.get("depths", (3, 4, 18, 5))),
        groups=tuple(published.get("groups", (3, 6, 12, 24))),
        mlp_ratio=published.get("mlp_ratio", 4.0),
        drop_path_rate=published.get("drop_path_rate", 0.2),
        drop_rate=published.get("drop_rate", 0.0),
        layer_scale=layer_scale,
        offset_scale=published.get("offset_scale", 1.0),
        post_norm=post_norm,
        res_post_norm=published.get("res_post_norm", False) and not post_norm and layer_scale is None,
        depthwise_kernel_size=published.get("dw_kernel_size"),
        level2_post_norm_blocks=tuple(blocks or ()),
        center_feature_scale=published.get("center_feature_scale", False),
        remove_center=bool(published.get("remove_center", False)),
        norm=NORMS[published.get("norm_layer", "LN")],
        activation=ACTIVATIONS[published.get("act_layer", "GELU")],
    )


def unused_keys(names: list[str], spec: InternImageSpec, stages: int) -> list[str]:
    """Published parameters that take no part in the outputs: later stages, unused res-post-norms."""
    later = [f"levels.{i}." for i in range(stages, len(spec.depths))] + [f"levels.{stages - 1}.downsample."]
    return [
        name
        for name in names
        if name.startswith(tuple(later)) or ("res_post_norm" in name and not spec.res_post_norm)
    ]


@adapter("dcnv3mod", uses_ops=True)
def dcnv3_module(case: Case) -> None:
    kwargs = case.meta["kwargs"]
    kernel_size, dilation = kwargs.get("kernel_size", 3), kwargs.get("dilation", 1)
    same = dilation * (kernel_size - 1) // 2
    # The published module's depth-wise branch keeps the input's size, so no other setting can run.
    assert kwargs.get("stride", 1) == 1, "the module has stride 1"
    assert kwargs.get("pad", 1) == same, "the module keeps the input's size"
    module = DCNv3(
        kwargs.get("channels", 64),
        kwargs.get("group", 4),
        DCNv3Settings(
            kernel_size=kernel_size,
            depthwise_kernel_size=kwargs.get("dw_kernel_size"),
            dilation=dilation,
            offset_scale=kwargs.get("offset_scale", 1.0),
            center_feature_scale=kwargs.get("center_feature_scale", False),
            remove_center=bool(kwargs.get("remove_center", False)),
            norm=NORMS[kwargs.get("norm_layer", "LN")],
            activation=ACTIVATIONS[kwargs.get("act_layer", "GELU")],
        ),
    )
    case.load_into(module, DCNV3.to_own)
    module.train(case.meta.get("train", False))
    features = case.input("input")
    out = module(features)
    case.check("out.out", out)
    case.check_gradients({"out": out}, {"input": features}, module, DCNV3.to_own)


@adapter("internimage", uses_ops=True)
def internimage(case: Case) -> None:
    kwargs = case.meta["kwargs"]
    spec = internimage_spec(kwargs)
    model = InternImage(
        spec,
        tuple(kwargs.get("out_indices", range(len(spec.depths)))),
        checkpointing=kwargs.get("with_cp", False),
    )

    table = internimage_table(spec.post_norm)

    def rename(key: str) -> str:
        return str(table.to_own(key))

    case.load_into(model, rename, skip=unused_keys(list(case.parameters()), spec, len(model.stages)))
    model.train(case.meta.get("train", False))
    images = case.input("x")
    outputs = {f"stage{i}": x for i, x in enumerate(model(images))}
    _check_all(case, outputs)
    if any(key.startswith("cot.") for key in case.arrays):
        case.check_gradients(outputs, {"x": images}, model, rename)


@adapter("dcnv2", uses_ops=True)
def dcnv2(case: Case) -> None:
    kwargs = case.meta["kwargs"]
    assert (kwargs["kernel_size"], kwargs["padding"], kwargs["dilation"], kwargs["bias"]) == (3, 1, 1, False)
    module = DeformableConvolution(
        kwargs["in_channels"], kwargs["out_channels"], kwargs["stride"], kwargs["deform_groups"]
    )
    case.load_into(module, lambda key: key)
    features = case.input("x")
    out = module(features)
    case.check("out.out", out)
    case.check_gradients({"out": out}, {"x": features}, module)


@adapter("resnet", uses_ops=True)
def resnet(case: Case) -> None:
    cfg = case.meta["cfg"]
    model = ResNet(
        ResNetSpec(
            RESNET_DEPTHS[cfg["depth"]][: cfg.get("num_stages", 4)],
            cfg.get("style", "pytorch"),
            cfg.get("base_channels", 64),
            cfg.get("stem_channels", 64),
            tuple(cfg.get("stage_with_dcn", (False,) * 4)),
        ),
        tuple(cfg.get("out_indices", (0, 1, 2, 3))),
        norm_eval=cfg.get("norm_eval", True),
        norm_trainable=cfg.get("norm_cfg", {}).get("requires_grad", True),
    )
    later = [f"layer{i + 1}." for i in range(max(model.out_indices) + 1, 4)]
    case.load_into(model, lambda key: key, skip=later)
    model.train(case.meta.get("train", False))
    images = case.input("x")
    outputs = {f"stage{i}": x for i, x in enumerate(model(images))}
    _check_all(case, outputs)
    if any(key.startswith("cot.") for key in case.arrays):
        case.check_gradients(outputs, {"x": images}, model)


@adapter("fpn")
def fpn(case: Case) -> None:
    cfg = case.meta["cfg"]
    end = cfg.get("end_level", -1)
    used = range(cfg.get("start_level", 0), len(cfg["in_channels"]) if end == -1 else end)
    levels = cfg["num_outs"]
    if levels > len(used) and cfg.get("add_extra_convs") != "on_output":
        pytest.skip("extra levels are made from the last output only")
    model = FPN(
        [cfg["in_channels"][i] for i in used],
        cfg["out_channels"],
        levels,
        relu_before_extra=cfg.get("relu_before_extra_convs", False),
    )
    case.load_into(model, FPN_NAMES.to_own)
    inputs = {f"x_{i}": case.input(f"x_{i}") for i in range(len(cfg["in_channels"]))}
    outputs = {f"level{i}": x for i, x in enumerate(model([inputs[f"x_{i}"] for i in used]))}
    _check_all(case, outputs)
    if any(key.startswith("cot.") for key in case.arrays):
        case.check_gradients(outputs, inputs, model, FPN_NAMES.to_own)


def _check_all(case: Case, outputs: Mapping[str, torch.Tensor]) -> None:
    expected = {key for key in case.arrays if key.startswith("out.")}
    assert expected == {f"out.{name}" for name in outputs}, f"{case.name}: outputs {sorted(expected)}"
    for name, output in outputs.items():
        case.check(f"out.{name}", output)
