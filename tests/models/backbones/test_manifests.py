"""Parameter names, shapes and counts of full models against the published ones, on the meta device."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bevperception.checkpoints.official_names import FPN as FPN_NAMES
from bevperception.checkpoints.official_names import internimage_table
from bevperception.models.backbones import internimage, resnet
from bevperception.models.backbones.internimage import InternImage, InternImageSpec
from bevperception.models.backbones.resnet import ResNet
from bevperception.models.necks import FPN
from tests.golden.adapters.backbones import internimage_spec

MANIFESTS = Path(__file__).parents[2] / "golden" / "manifests"
CLASSIFICATION = sorted(path.stem for path in MANIFESTS.glob("internimage_cls_*.json"))
CLASSIFICATION_HEAD = ("conv_head.", "head.", "dcnv3_head_x", "clip_projector.", "fc_norm.")
PUBLISHED_MILLIONS = {"t": 30, "s": 50, "b": 97, "l": 223, "xl": 335, "h": 1080, "g": 3000}


def manifest(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((MANIFESTS / f"{name}.json").read_text())
    return content


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def build(spec: InternImageSpec) -> InternImage:
    with torch.device("meta"):
        return InternImage(spec)


def count(module: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


@pytest.mark.parametrize("size", ["t", "s", "b", "l", "xl", "h", "g"])
def test_detection_backbone(size: str) -> None:
    published = manifest(f"internimage_{size}")
    spec = internimage.VARIANTS[f"internimage_{size}"]
    assert spec == internimage_spec(published["kwargs"])
    model = build(spec)
    renamed = {
        internimage_table(spec.post_norm).to_own(key): tuple(shape)
        for key, (shape, _) in published["state_dict"].items()
    }
    assert len(renamed) == published["num_keys"]
    assert shapes(model) == renamed
    assert count(model) == published["num_parameters"]


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification_model(name: str) -> None:
    """Backbone parameters as ours, and with the head's the totals that the paper quotes."""
    published = manifest(name)
    spec = internimage_spec(published["kwargs"])
    size = name.split("_")[2]
    detection = internimage.VARIANTS[f"internimage_{size}"]
    assert spec == dataclasses.replace(
        detection, drop_path_rate=spec.drop_path_rate, layer_scale=spec.layer_scale
    ), "only these differ between the published classification and detection models"
    model = build(spec)
    head = {k: v for k, v in published["state_dict"].items() if k.startswith(CLASSIFICATION_HEAD)}
    assert head
    renamed = {
        internimage_table(spec.post_norm).to_own(key): tuple(shape)
        for key, (shape, _) in published["state_dict"].items()
        if key not in head
    }
    assert shapes(model) == renamed
    buffers = set(published["buffers"])
    head_parameters = sum(torch.Size(shape).numel() for key, (shape, _) in head.items() if key not in buffers)
    total = count(model) + head_parameters
    assert total == published["num_parameters"]
    assert total / 1e6 == pytest.approx(PUBLISHED_MILLIONS[size], rel=0.03)


def test_every_size_has_a_classification_manifest() -> None:
    assert {name.split("_")[2] for name in CLASSIFICATION} == set(PUBLISHED_MILLIONS)


@pytest.mark.parametrize(
    ("name", "variant", "trainable_norms"),
    [("bevformer_tiny", "resnet50", False), ("bevformerv2-r50-t1-24ep", "resnet50_caffe", True)],
)
def test_resnet_of_published_models(name: str, variant: str, trainable_norms: bool) -> None:
    published = manifest(name)
    prefix = "img_backbone."
    expected = {
        key.removeprefix(prefix): tuple(shape)
        for key, (shape, _) in published["state_dict"].items()
        if key.startswith(prefix)
    }
    with torch.device("meta"):
        frozen = -1 if trainable_norms else 1
        model = ResNet(resnet.VARIANTS[variant], frozen_stages=frozen, norm_trainable=trainable_norms)
    assert shapes(model) == expected
    assert count(model) == published["parameters_by_part"]["img_backbone"] == 23_508_032
    fixed = published["num_parameters"] - published["num_trainable_parameters"]
    code_weights = published["parameters_by_part"]["pts_bbox_head.code_weights"]
    assert count(model) - count(model, trainable=True) == fixed - code_weights


def test_resnet101_parameter_count() -> None:
    with torch.device("meta"):
        assert count(ResNet(resnet.VARIANTS["resnet101"])) == 42_500_160


@pytest.mark.parametrize(
    ("name", "in_channels", "levels"),
    [
        ("bevformer_tiny", [2048], 1),
        ("bevformer_base", [512, 1024, 2048], 4),
        ("bevformerv2-r50-t1-24ep", [512, 1024, 2048], 5),
    ],
)
def test_fpn_of_published_models(name: str, in_channels: list[int], levels: int) -> None:
    published = manifest(name)
    prefix = "img_neck."
    expected = {
        FPN_NAMES.to_own(key.removeprefix(prefix)): tuple(shape)
        for key, (shape, _) in published["state_dict"].items()
        if key.startswith(prefix)
    }
    with torch.device("meta"):
        neck = FPN(in_channels, 256, levels)
    assert shapes(neck) == expected
    assert count(neck) == published["parameters_by_part"]["img_neck"]
