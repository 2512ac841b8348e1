from __future__ import annotations

import pytest
import torch
from torch import nn

from bevperception.config_model import BackboneConfig
from bevperception.errors import ConfigError
from bevperception.models.backbones import build_backbone
from bevperception.models.backbones.resnet import Bottleneck, ResNet, ResNetSpec

SMALL = ResNetSpec((2, 1, 1, 1), base_channels=4, stem_channels=4)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def build(**settings: object) -> ResNet:
    model = ResNet(SMALL, **settings)  # type: ignore[arg-type]
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return model


@pytest.mark.parametrize("size", [(64, 96), (33, 65), (1, 1)])
def test_sizes_round_up(size: tuple[int, int]) -> None:
    model = build().eval()
    for output, stride, channels in zip(
        model(torch.randn(2, 3, *size)), model.out_strides, model.out_channels, strict=True
    ):
        assert output.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))


def test_batch_equals_singles() -> None:
    model = build().double().train()
    images = torch.randn(3, 3, 40, 56, dtype=torch.float64)
    apart = [model(image[None]) for image in images]
    for level, output in enumerate(model(images)):
        torch.testing.assert_close(output, torch.cat([x[level] for x in apart]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("style", ["pytorch", "caffe"])
def test_prediction_equals_training(style: str) -> None:
    # Without gradients a block may write over its input; what a stage hands out must not change for that.
    spec = ResNetSpec((3, 2, 2, 1), style, base_channels=4, stem_channels=8)  # type: ignore[arg-type]
    model = ResNet(spec, norm_trainable=True).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, -1.5, 1.5)
    images = torch.randn(2, 3, 45, 71)
    before = images.clone()
    expected = model(images)
    with torch.inference_mode():
        for output, other in zip(model(images), expected, strict=True):
            torch.testing.assert_close(output, other.detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(images, before)


@pytest.mark.parametrize(("style", "strides"), [("pytorch", (1, 2)), ("caffe", (2, 1))])
def test_style_places_the_stride(style: str, strides: tuple[int, int]) -> None:
    block = Bottleneck(8, 4, 2, style)
    assert (block.conv1.stride[0], block.conv2.stride[0]) == strides
    assert block(torch.randn(1, 8, 7, 5)).shape == (1, 16, 4, 3)


def test_published_variants_have_their_style() -> None:
    for variant, expected in (
        ("resnet50", 1),
        ("resnet101", 1),
        ("resnet50_caffe", 2),
        ("resnet101_caffe", 2),
    ):
        with torch.device("meta"):
            model = build_backbone(BackboneConfig(variant=variant))
        assert model.get_submodule("layer2.0.conv1").stride == (expected, expected)
        assert model.out_channels == (512, 1024, 2048)


@pytest.mark.parametrize("norm_eval", [True, False])
def test_norm_eval_keeps_statistics(norm_eval: bool) -> None:
    model = build(norm_eval=norm_eval).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    model(torch.randn(2, 3, 64, 64))
    same = [torch.equal(buffer, before[name]) for name, buffer in model.named_buffers() if name in before]
    assert all(same) if norm_eval else not any(same)


def test_norms_train_only_if_asked() -> None:
    for wanted in (False, True):
        for module in build(norm_trainable=wanted).modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.weight.requires_grad == module.bias.requires_grad == wanted


@pytest.mark.parametrize("frozen", [-1, 0, 1, 4])
def test_frozen_stages(frozen: int) -> None:
    model = build(frozen_stages=frozen, norm_eval=False, norm_trainable=True).train()
    prefixes = (["conv1.", "bn1."] if frozen >= 0 else []) + [f"layer{i + 1}." for i in range(frozen)]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(tuple(prefixes)), name
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training != f"{name}.".startswith(tuple(prefixes)), name


def test_checkpointing_changes_nothing() -> None:
    model = build(norm_trainable=True).double().train()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        outputs = model(images)
        torch.stack([x.square().sum() for x in outputs]).sum().backward()
        results.append((outputs, [p.grad for p in model.parameters()]))
    for a, b in zip(results[0][0] + results[0][1], results[1][0] + results[1][1], strict=True):
        torch.testing.assert_close(a, b)


def test_one_trained_from_random_weights_goes_by_its_batches() -> None:
    """Otherwise the statistics of a network that is built at random stay 0 and 1, whatever comes in."""
    images = 5 + 3 * torch.randn(4, 3, 65, 97)
    for train_norm in (False, True):
        model = build_backbone(BackboneConfig(variant="resnet_micro", train_norm=train_norm)).train()
        last = model(images)[-1]
        last.square().mean().backward()
        norm = model.get_submodule("layer4.1.bn3")
        assert isinstance(norm, nn.BatchNorm2d)
        assert (norm.weight.grad is not None) == train_norm
        assert bool((norm.running_mean != 0).any()) == train_norm
    assert model.out_channels == (128, 256, 512)
    assert last.shape[-2:] == (3, 4)
    with pytest.raises(ConfigError, match="no batch norm"):
        build_backbone(BackboneConfig(train_norm=True))
