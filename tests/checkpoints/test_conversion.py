"""Published checkpoints become weights and come back without the change of a bit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bevperception.checkpoints.backbone import load_backbone
from bevperception.checkpoints.conversion import convert_back, convert_official, match_official
from bevperception.checkpoints.official_file import OfficialFile, read_official
from bevperception.checkpoints.weights import load_model, read_weights
from bevperception.cli.convert import main
from bevperception.config_io import load_config
from bevperception.config_model import BackboneConfig
from bevperception.errors import CheckpointError
from bevperception.models.backbones import build_backbone
from bevperception.models.build import build_model
from bevperception.taxonomy import DETECTION_CLASSES

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"
TITLES = {
    "bevformer_tiny": "BEVFormer tiny",
    "bevformer_tiny_fp16": "BEVFormer tiny",
    "bevformer_small": "BEVFormer small",
    "bevformer_base": "BEVFormer base",
    **{
        f"bevformerv2-r50-{setting}-{epochs}ep": f"BEVFormer v2 {setting}"
        for setting in ("t1-base", "t1", "t2", "t8")
        for epochs in (24, 48)
    },
}
FORMS = ("plain", "wrapped", "fp16", "module", "twins", "model_ema", "mmcv")


def meta_state(name: str) -> dict[str, Tensor]:
    """Names, shapes and kinds of a published model, without memory."""
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text(encoding="utf-8"))["state_dict"]
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, (shape, dtype) in manifest.items()
    }


def state_of(name: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else torch.full(value.shape, 7, dtype=value.dtype)
        for key, value in meta_state(name).items()
    }


def formed(state: dict[str, Tensor], form: str) -> dict[str, Any]:
    """What training programs make of a state dict."""
    other = {key: value + 1 for key, value in state.items()}
    if form == "fp16":
        return {"state_dict": {k: v.half() if v.is_floating_point() else v for k, v in state.items()}}
    if form == "module":
        return {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    if form == "twins":
        twins = {"ema_" + key.replace(".", "_"): value for key, value in other.items()}
        return {"state_dict": state | twins}
    if form == "model_ema":
        return {"model": other, "model_ema": state, "optimizer": {"state": {0: torch.zeros(3)}}}
    if form == "mmcv":
        meta = {"epoch": np.int64(24), "best": np.float32(0.3), "seed": np.uint8(3), "CLASSES": None}
        return {"meta": meta, "state_dict": state, "optimizer": [{"step": np.float64(1.0)}]}
    if form == "huggingface":
        return {f"model.{key}": value for key, value in state.items()}
    return {"state_dict": state} if form == "wrapped" else dict(state)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts are the same to the last bit."""
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in MANIFESTS.glob("*.json")))
def test_every_published_model_is_recognised_whole(name: str) -> None:
    state = meta_state(name)
    match = match_official(OfficialFile(state, Path(name)))
    if name in TITLES:
        assert match.model.title == TITLES[name]
        assert not match.added
        extra = {"code_weights", "mean_depth_per_level", "std_depth_per_level"}
        assert {key.rpartition(".")[2] for key in match.kept} <= extra
    else:
        size = name.split("_")[2 if "_cls_" in name else 1]
        assert match.model.title == f"InternImage-{size.upper()}"
        assert bool(match.kept) == ("_cls_" in name)
    assert len(match.own) + len(match.kept) == len(state)
    assert match.own.keys() | match.added.keys() == match.expected.keys()


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back(tmp_path: Path, form: str) -> None:
    state = state_of("bevformer_tiny")
    content = formed(state, form)
    torch.save(content, tmp_path / "official.pth")
    done = convert_official(tmp_path / "official.pth", tmp_path / "converted")
    assert done.file.averaged == (form == "model_ema")
    weights = read_weights(tmp_path / "converted")
    assert weights.card.source == "official.pth: BEVFormer tiny"
    model = load_model(weights, weights.config()).state_dict()
    taken = content["state_dict"] if form == "fp16" else state
    for key, value in taken.items():
        own = {"img_backbone.conv1.weight": "backbone.conv1.weight"}.get(key)
        if own is not None:
            assert torch.equal(model[own], value.float())
    convert_back(tmp_path / "converted", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    if form == "plain":
        assert equal(back, state)
    elif form == "module":
        assert equal(back["state_dict"], content["state_dict"])
    else:
        assert equal(back["model" if form == "model_ema" else "state_dict"], taken)


@pytest.mark.parametrize("copy", ["averaged", "training"])
@pytest.mark.parametrize("form", ["twins", "model_ema"])
def test_either_copy_can_be_asked_for(tmp_path: Path, copy: Any, form: str) -> None:
    state = {"layer1.0.conv1.weight": torch.randn(2, 2), "bn.weight": torch.randn(3)}
    torch.save(formed(state, form), tmp_path / "o.pth")
    # The averaged copy is `state` under model_ema, and the ema_ names' beside the plain ones.
    expected = (
        state if (form == "model_ema") == (copy == "averaged") else {k: v + 1 for k, v in state.items()}
    )
    file = read_official(tmp_path / "o.pth", copy)
    assert equal(file.state, expected)
    assert file.averaged == (copy == "averaged")
    assert file.left_out


def test_every_weight_goes_to_its_place(tmp_path: Path) -> None:
    """A model of this project under published names comes back as itself, part by part."""
    config = load_config("configs/bevformer_v2_r50_t2.yaml")
    with torch.device("meta"):
        names = list(build_model(config.model).state_dict())
    state = state_of("bevformerv2-r50-t2-24ep", seed=3)
    torch.save({"state_dict": state}, tmp_path / "o.pth")
    done = convert_official(tmp_path / "o.pth", tmp_path / "w")
    assert sorted(done.match.own) == sorted(names)
    own = read_weights(tmp_path / "w").state
    pairs = {
        "pts_bbox_head.transformer.encoder.layers.2.attentions.1.deformable_attention.value_proj.weight": (
            "bev_transformer.encoder.layers.2.spatial_attention.value_proj.weight"
        ),
        "pts_bbox_head.transformer.decoder.layers.5.ffns.0.layers.0.0.bias": (
            "detection.decoder.layers.5.feed_forward.linear1.bias"
        ),
        "pts_bbox_head.transformer.fusion.layers.1.bn2.running_var": "fusion.blocks.1.norm2.running_var",
        "fcos3d_bbox_head.fcos3d_head.scales_conf.4.scale": "perspective.head.confidence_scales.4",
        "fcos3d_bbox_head.fcos2d_head.cls_tower.3.norm.4.weight": (
            "perspective.head.class_tower.3.norms.4.weight"
        ),
    }
    for official, ours in pairs.items():
        assert torch.equal(own[ours], state[official]), ours


@pytest.mark.parametrize("form", ["plain", "huggingface", "safetensors", "model_ema", "module"])
@pytest.mark.parametrize("name", ["internimage_t", "internimage_cls_t_1k_224"])
def test_backbones(tmp_path: Path, form: str, name: str) -> None:
    state = state_of(name)
    source = tmp_path / ("o.safetensors" if form == "safetensors" else "o.pth")
    if form == "safetensors":
        save_file({f"model.{k}": v for k, v in state.items()}, source)
    else:
        torch.save(formed(state, form), source)
    path = convert_official(source, tmp_path / "converted.safetensors").path
    backbone = build_backbone(BackboneConfig("internimage_t"))
    load_backbone(backbone, "internimage_t", path)
    filled = backbone.state_dict()
    assert torch.equal(filled["stem.conv1.weight"], state["patch_embed.conv1.weight"])
    if "_cls_" in name and "levels.0.blocks.0.gamma1" not in state:
        assert torch.equal(filled["stages.0.blocks.0.scale1"], torch.ones(64))
    convert_back(path, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    prefix = {"huggingface": "model.", "safetensors": "model.", "module": "module."}.get(form, "")
    for wrapper in ("model", "state_dict"):
        back = back.get(wrapper, back)
    assert equal(back, {prefix + k: v for k, v in state.items()})


def test_a_detector_around_a_backbone_is_kept_for_the_way_back(tmp_path: Path) -> None:
    state = {f"backbone.{k}": v for k, v in state_of("internimage_t").items()}
    state["neck.lateral_convs.0.conv.weight"] = torch.randn(4, 4, 1, 1)
    state["roi_head.fc.weight"] = torch.randn(3, 3)
    torch.save({"state_dict": state}, tmp_path / "o.pth")
    done = convert_official(tmp_path / "o.pth", tmp_path / "w")
    assert list(done.match.kept) == ["roi_head.fc.weight"]
    assert "neck.laterals.0.weight" in done.match.own
    convert_back(tmp_path / "w", tmp_path / "back.pth")
    assert equal(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], state)


def test_the_order_of_classes_is_the_files(tmp_path: Path) -> None:
    state = state_of("bevformer_tiny")
    order = tuple(reversed(DETECTION_CLASSES))
    torch.save({"state_dict": state, "meta": {"CLASSES": order}}, tmp_path / "o.pth")
    done = convert_official(tmp_path / "o.pth", tmp_path / "w")
    assert read_weights(tmp_path / "w").config().model.detection.classes == order
    assert done.match.notes
    torch.save({"state_dict": state, "meta": {"CLASSES": ["dog", "cat"]}}, tmp_path / "o.pth")
    with pytest.raises(CheckpointError, match="trained for other classes: dog, cat"):
        convert_official(tmp_path / "o.pth", tmp_path / "w2")
    assert not (tmp_path / "w2").exists()


def test_v2_heads_are_alphabetical_and_v1_heads_are_not() -> None:
    v1 = match_official(OfficialFile(meta_state("bevformer_tiny"), Path("v1"))).config.model
    v2 = match_official(OfficialFile(meta_state("bevformerv2-r50-t1-24ep"), Path("v2"))).config.model
    assert v1.detection.classes == DETECTION_CLASSES
    assert list(v2.detection.classes) == sorted(DETECTION_CLASSES) == list(v2.perspective.classes)


class Bomb:
    """Runs code where a file is unpickled without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.target,))


def test_bad_files_are_refused_each_with_its_cause(tmp_path: Path) -> None:
    source, mark = tmp_path / "o.pth", tmp_path / "ran"
    state = state_of("bevformer_tiny")

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            convert_official(source, tmp_path / "w")
        assert not (tmp_path / "w").exists()

    refused("no checkpoint at")
    torch.save({"state_dict": state, "meta": Bomb(mark)}, source)
    refused("holds an object of .*other objects could run code")
    source.write_bytes(pickle.dumps({"state_dict": Bomb(mark)}))
    refused("damaged or not a checkpoint|could run code")
    assert not mark.exists()
    torch.save({"state_dict": state}, source)
    source.write_bytes(source.read_bytes()[:-100_000])
    refused("damaged or not a checkpoint")
    torch.save({"state_dict": {k: v for k, v in state.items() if "layer4" not in k}}, source)
    refused("looks like BEVFormer tiny, but does not fit it: 60 missing: backbone 60")
    name = "pts_bbox_head.bev_embedding.weight"
    torch.save({"state_dict": state | {name: torch.randn(9, 256)}}, source)
    refused("1 of another shape: bev_queries")
    torch.save({"state_dict": state | {name: torch.full((2500, 256), float("nan"))}}, source)
    refused("NaN or infinite weights in bev_queries.weight")
    torch.save({"state_dict": state | {name: torch.ones(2500, 256).int()}}, source)
    refused("in a wrong form: bev_queries.weight is int32")
    torch.save({"decoder.weight": torch.zeros(2)}, source)
    refused("holds no model that is known: its parts are decoder")
    torch.save({"epoch": 3}, source)
    refused("holds no weights by name")


def test_doors_name_the_command_that_converts(tmp_path: Path) -> None:
    torch.save({"state_dict": state_of("bevformer_tiny")}, tmp_path / "tiny epoch.pth")
    with pytest.raises(CheckpointError, match="the published BEVFormer tiny: convert it once") as caught:
        read_weights(tmp_path / "tiny epoch.pth")
    assert f"bevperception convert '{tmp_path / 'tiny epoch.pth'}' 'tiny epoch'" in str(caught.value)
    save_file({f"model.{k}": v for k, v in state_of("internimage_t").items()}, tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match="the published InternImage-T: convert it once"):
        read_weights(tmp_path / "t.safetensors")
    convert_official(tmp_path / "t.safetensors", tmp_path / "t")
    weights = read_weights(tmp_path / "t")
    with pytest.raises(CheckpointError, match=r"a backbone alone: name it in model\.backbone\.weights"):
        load_model(weights, weights.config())


def test_own_weights_can_be_written_under_published_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensors that no published model has: \w+"):
        convert_back("world_v2", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(formed(state_of("internimage_t"), "mmcv"), tmp_path / "o.pth")
    main([str(tmp_path / "o.pth"), str(tmp_path / "w")])
    assert "InternImage-T: 685 tensors converted, 0 missing, 0 left over" in capsys.readouterr().out
    main([str(tmp_path / "w"), str(tmp_path / "back.pth"), "--to", "official"])
    assert "685 tensors under their published names" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="cannot be written over itself"):
        main([str(tmp_path / "o.pth"), str(tmp_path / "o.pth")])
    with safe_open(tmp_path / "w" / "weights.safetensors", framework="pt") as file:
        assert {"card", "format", "origin"} == set(file.metadata())
