"""Pre-trained backbones: this project's files and the published ones' names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bevperception.checkpoints import backbone as backbone_file
from bevperception.checkpoints.backbone import load_backbone
from bevperception.checkpoints.tensors import parts_of
from bevperception.config_model import BackboneConfig
from bevperception.errors import CheckpointError
from bevperception.models.backbones import build_backbone

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"
MICRO = "internimage_micro"


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("prefix", ["backbone.", "img_backbone.", "module.img_backbone."])
def test_a_detectors_checkpoint_fills_its_backbone(tmp_path: Path, wrapped: bool, prefix: str) -> None:
    torch.manual_seed(1)
    trained = build_backbone(BackboneConfig(MICRO))
    state = {f"{prefix}{name}": value for name, value in trained.state_dict().items()}
    state["neck.weight"] = torch.zeros(1)
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "detector.pth")
    fresh = build_backbone(BackboneConfig(MICRO))
    assert load_backbone(fresh, MICRO, tmp_path / "detector.pth") == {"neck": 1}
    for name, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)


def test_safetensors_with_other_parts_beside(tmp_path: Path) -> None:
    state = build_backbone(BackboneConfig(MICRO)).state_dict()
    save_file({**state, "head.weight": torch.zeros(1)}, tmp_path / "b.safetensors")
    assert load_backbone(build_backbone(BackboneConfig(MICRO)), MICRO, tmp_path / "b.safetensors") == {
        "head": 1
    }


@pytest.mark.parametrize(
    ("manifest", "variant"),
    [
        ("internimage_cls_t_1k_224", "internimage_t"),
        ("internimage_cls_s_1k_224", "internimage_s"),
        ("internimage_cls_b_1k_224", "internimage_b"),
        ("internimage_cls_l_22kto1k_384", "internimage_l"),
        ("internimage_cls_xl_22kto1k_384", "internimage_xl"),
        ("internimage_h", "internimage_h"),
        ("internimage_g", "internimage_g"),
    ],
)
def test_published_names_and_shapes_fit(manifest: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = json.loads((MANIFESTS / f"{manifest}.json").read_text())["state_dict"]
    with torch.device("meta"):
        model = build_backbone(BackboneConfig(variant))
        tensors = {name: torch.empty(shape) for name, (shape, _) in parameters.items()}
    monkeypatch.setattr(backbone_file, "_tensors", lambda path: (tensors, {}))
    monkeypatch.setattr(backbone_file, "converted", lambda found, *_: found)  # names and shapes alone
    aside = load_backbone(model, variant, "published.pth")
    outside = {
        part: count for part, count in parts_of(parameters).items() if part not in ("patch_embed", "levels")
    }
    assert aside == outside


def test_another_variant_is_refused(tmp_path: Path) -> None:
    torch.save(build_backbone(BackboneConfig(MICRO)).state_dict(), tmp_path / "micro.pth")
    with torch.device("meta"):
        model = build_backbone(BackboneConfig("internimage_t"))
    with pytest.raises(CheckpointError, match=r"does not fit the backbone internimage_t: .* are missing"):
        load_backbone(model, "internimage_t", tmp_path / "micro.pth")
    with torch.device("meta"):
        model = build_backbone(BackboneConfig("resnet50"))
    with pytest.raises(CheckpointError, match="does not fit the backbone resnet50"):
        load_backbone(model, "resnet50", tmp_path / "micro.pth")


def test_a_deeper_backbone_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    deep = build_backbone(BackboneConfig("resnet101", out_indices=(0, 1, 2))).state_dict()
    torch.save(deep, tmp_path / "r101.pth")
    shallow = build_backbone(BackboneConfig("resnet50", out_indices=(0, 1, 2)))
    with pytest.raises(CheckpointError, match=r"17 blocks more \(layer3\.10, layer3\.11"):
        load_backbone(shallow, "resnet50", tmp_path / "r101.pth")
    # Stages that are not built are no mistake.
    short = build_backbone(BackboneConfig("resnet101", out_indices=(0, 1)))
    later = sum(name.startswith("layer3.") for name in deep)
    assert load_backbone(short, "resnet101", tmp_path / "r101.pth") == {"layer3": later}
    micro = build_backbone(BackboneConfig(MICRO)).state_dict()
    surplus = {
        "stages.2.blocks.3." + n.split(".", 4)[-1]: v.clone() for n, v in micro.items() if "2.blocks.2." in n
    }
    save_file({**micro, **surplus}, tmp_path / "micro.safetensors")
    with pytest.raises(CheckpointError, match=r"1 blocks more \(stages\.2\.blocks\.3\)"):
        load_backbone(build_backbone(BackboneConfig(MICRO)), MICRO, tmp_path / "micro.safetensors")


def test_nan_is_refused(tmp_path: Path) -> None:
    state = build_backbone(BackboneConfig(MICRO)).state_dict()
    name = next(iter(state))
    state[name] = torch.full_like(state[name], float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=f"NaN or infinite weights in {name}"):
        load_backbone(build_backbone(BackboneConfig(MICRO)), MICRO, tmp_path / "nan.pth")


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    model = build_backbone(BackboneConfig(MICRO))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_backbone(model, MICRO, tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
        load_backbone(model, MICRO, tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(CheckpointError, match="cannot read the backbone weights"):
        load_backbone(model, MICRO, tmp_path / "text.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no weights by name"):
        load_backbone(model, MICRO, tmp_path / "list.pth")
