from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bevperception.checkpoints.backbone_weights import load_backbone_weights
from bevperception.checkpoints.published import internimage_key
from bevperception.errors import CheckpointError
from bevperception.models.backbones.internimage import InternImage, InternImageSpec
from bevperception.models.backbones.resnet import ResNet, ResNetSpec
from tests.golden.case import Case

CASES = Path(__file__).parents[1] / "golden" / "cases"
SPEC = InternImageSpec(channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8), layer_scale=1.0)
RESNET = ResNetSpec((3, 4, 6, 3), base_channels=4, stem_channels=4)


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """Weights of a small InternImage under their published names."""
    return Case.load(CASES / "internimage_t.npz", torch.float32).parameters()


def matches(model: nn.Module, published: dict[str, Tensor]) -> bool:
    renamed = {internimage_key(key): value for key, value in published.items()}
    return all(torch.equal(value, renamed[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("container", "prefix"),
    [(None, ""), ("model", ""), ("state_dict", "backbone."), ("state_dict", "module.img_backbone.")],
)
def test_published_layouts(
    tmp_path: Path, published: dict[str, Tensor], container: str | None, prefix: str
) -> None:
    content: dict[str, object] = {prefix + key: value for key, value in published.items()}
    other = "head.weight" if not prefix else prefix.split("backbone")[0] + "neck.convs.0.weight"
    content[other] = torch.ones(3)
    path = tmp_path / "weights.pth"
    torch.save({container: content, "epoch": 3} if container else content, path)
    model = InternImage(SPEC)
    load_backbone_weights(model, path)
    assert matches(model, published)


def test_safetensors_and_fewer_stages(tmp_path: Path, published: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(published, path)
    model = InternImage(SPEC, (0, 1))
    load_backbone_weights(model, path)
    assert matches(model, published)


def test_own_weights(tmp_path: Path) -> None:
    source, target = InternImage(SPEC), InternImage(SPEC, (1, 2))
    save_file(
        {f"backbone.{key}": value for key, value in source.state_dict().items()}, tmp_path / "a.safetensors"
    )
    load_backbone_weights(target, tmp_path / "a.safetensors")
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())


def test_resnet_drops_the_classifier_and_later_stages(tmp_path: Path) -> None:
    source, target = ResNet(RESNET), ResNet(RESNET, (1, 2))
    torch.save(
        {**source.state_dict(), "fc.weight": torch.ones(2), "fc.bias": torch.ones(2)}, tmp_path / "r.pth"
    )
    load_backbone_weights(target, tmp_path / "r.pth")
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())


def test_other_architectures_are_refused(tmp_path: Path, published: dict[str, Tensor]) -> None:
    def attempt(change: dict[str, Tensor | None], message: str) -> None:
        state = {key: value for key, value in {**published, **change}.items() if value is not None}
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=message):
            load_backbone_weights(InternImage(SPEC), tmp_path / "w.pth")

    attempt({"levels.0.blocks.0.gamma1": None}, r"1 missing \(stages.0.blocks.0.scale1\)")
    attempt({"levels.0.blocks.1.gamma1": torch.ones(16)}, "1 unexpected")
    attempt({"levels.0.blocks.0.gamma1": torch.ones(8)}, r"of another shape .*\[8\] instead of \[16\]")
    attempt({"levels.0.blocks.0.gamma1": torch.full((16,), torch.nan)}, "NaN or infinite")


def test_deformable_resnet_weights_do_not_load_into_a_plain_one(tmp_path: Path) -> None:
    state = {**ResNet(RESNET).state_dict(), "layer3.0.conv2.conv_offset.bias": torch.ones(27)}
    torch.save(state, tmp_path / "dcn.pth")
    with pytest.raises(CheckpointError, match="conv_offset"):
        load_backbone_weights(ResNet(RESNET), tmp_path / "dcn.pth")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    model = InternImage(SPEC)
    with pytest.raises(CheckpointError, match="no backbone weights at"):
        load_backbone_weights(model, tmp_path / "none.pth")
    for name in ("garbage.pth", "garbage.safetensors"):
        (tmp_path / name).write_bytes(b"garbage")
        with pytest.raises(CheckpointError, match="damaged"):
            load_backbone_weights(model, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="no tensors"):
        load_backbone_weights(model, tmp_path / "list.pth")


def test_loading_runs_no_code(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hook": _Trap(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="damaged or holds more than tensors"):
        load_backbone_weights(InternImage(SPEC), tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


class _Trap:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))
