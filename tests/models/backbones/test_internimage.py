from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevperception.config_model import BackboneConfig
from bevperception.errors import ConfigError
from bevperception.models.backbones import build_backbone, internimage
from bevperception.models.backbones.internimage import (
    Block,
    DCNv3,
    DCNv3Settings,
    InternImage,
    InternImageSpec,
)
from bevperception.models.backbones.layers import DropPath

SMALL = InternImageSpec(channels=8, depths=(1, 1, 2, 1), groups=(1, 2, 2, 4), mlp_ratio=2.0)
STYLES = {
    "pre-norm": SMALL,
    "t": dataclasses.replace(SMALL, layer_scale=0.5),
    "l": dataclasses.replace(SMALL, layer_scale=0.5, post_norm=True, offset_scale=2.0),
    "h": dataclasses.replace(
        SMALL,
        res_post_norm=True,
        depthwise_kernel_size=5,
        level2_post_norm_blocks=(1,),
        center_feature_scale=True,
    ),
    "g": dataclasses.replace(
        SMALL,
        post_norm=True,
        depthwise_kernel_size=5,
        level2_post_norm_blocks=(0, 1),
        center_feature_scale=True,
    ),
    "other": dataclasses.replace(SMALL, remove_center=True, norm="batch", activation="silu", drop_rate=0.1),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def shaken(model: nn.Module) -> nn.Module:
    """Moves all parameters, so that zero-initialised offsets do sample between cells."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def build(style: str, **settings: object) -> InternImage:
    return shaken(InternImage(STYLES[style], **settings))  # type: ignore[arg-type, return-value]


def gradients(model: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    torch.stack(
        [(x * torch.linspace(-1, 1, x.shape[1]).to(x)[:, None, None]).sum() for x in outputs]
    ).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [(64, 96), (33, 65), (31, 47), (1, 2)])
def test_sizes_round_up(style: str, size: tuple[int, int]) -> None:
    model = build(style).eval()
    outputs = model(torch.randn(2, 3, *size))
    assert model.out_strides == (4, 8, 16, 32)
    assert model.out_channels == (8, 16, 32, 64)
    for output, stride, channels in zip(outputs, model.out_strides, model.out_channels, strict=True):
        assert output.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert output.isfinite().all()


@pytest.mark.parametrize("style", STYLES)
def test_batch_equals_singles(style: str) -> None:
    model = build(style).double().eval()
    images = torch.randn(3, 3, 40, 56, dtype=torch.float64)
    together = model(images)
    apart = [model(image[None]) for image in images]
    for level, output in enumerate(together):
        torch.testing.assert_close(output, torch.cat([x[level] for x in apart]), rtol=0, atol=1e-12)


def test_empty_batch() -> None:
    outputs = build("h").eval()(torch.zeros(0, 3, 64, 64))
    assert [tuple(x.shape) for x in outputs] == [(0, 8, 16, 16), (0, 16, 8, 8), (0, 32, 4, 4), (0, 64, 2, 2)]


def test_non_contiguous_images() -> None:
    model = build("t").eval()
    images = torch.randn(2, 64, 48, 3)
    view = images.permute(0, 3, 2, 1)
    for a, b in zip(model(view), model(view.contiguous()), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("style", STYLES)
def test_every_parameter_gets_a_gradient(style: str) -> None:
    model = build(style).train()
    found = gradients(model, model(torch.randn(2, 3, 64, 96)))
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert all(g.isfinite().all() for g in found.values())


def test_out_indices_choose_stages() -> None:
    full, part = build("t").eval(), InternImage(STYLES["t"], (0, 2)).eval()
    assert part.out_channels == (8, 32)
    assert part.out_strides == (4, 16)
    missing = part.load_state_dict(full.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(key.startswith(("stages.3.", "downsamples.2.")) for key in missing.unexpected_keys)
    images = torch.randn(1, 3, 64, 64)
    expected = full(images)
    for a, b in zip(part(images), (expected[0], expected[2]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("style", ["t", "h"])
def test_checkpointing_changes_nothing(style: str) -> None:
    """Outputs, gradients and the random numbers of drop path and drop-out are the same."""
    spec = dataclasses.replace(STYLES[style], drop_path_rate=0.5, drop_rate=0.1)
    model = shaken(InternImage(spec)).double().train()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    results = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(1)
        outputs = model(images)
        results.append((outputs, gradients(model, outputs)))
    (plain, plain_gradients), (recomputed, recomputed_gradients) = results
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert plain_gradients.keys() == recomputed_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradient, recomputed_gradients[name], rtol=1e-10, atol=1e-10)


def test_checkpointing_keeps_fewer_activations() -> None:
    model = build("t").train()
    images = torch.randn(1, 3, 64, 64)

    def saved_bytes(checkpointing: bool) -> int:
        model.checkpointing = checkpointing
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images)
        return sum(sizes.values())

    assert saved_bytes(True) < 0.6 * saved_bytes(False)


@pytest.mark.parametrize("frozen", [-1, 0, 1, 2, 4])
def test_frozen_stages(frozen: int) -> None:
    spec = dataclasses.replace(STYLES["other"], drop_path_rate=0.3)
    model = InternImage(spec, frozen_stages=frozen).train()
    prefixes = ["stem."] if frozen >= 0 else []
    prefixes += [f"{part}.{i}." for i in range(frozen) for part in ("stages", "downsamples")]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(tuple(prefixes))
    parts = {"stem": model.stem, **{f"stages.{i}": stage for i, stage in enumerate(model.stages)}}
    for name, part in parts.items():
        assert part.training != f"{name}.".startswith(tuple(prefixes)), name
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = model(torch.randn(2, 3, 64, 64))
    if frozen < 4:
        gradients(model, outputs)
    for name, buffer in model.named_buffers():
        if name.startswith(tuple(prefixes)):
            assert torch.equal(buffer, before[name]), f"{name}: statistics of a frozen part moved"
    assert not model.eval().training


def test_drop_path_statistics() -> None:
    layer = DropPath(0.3).train()
    out = layer(torch.ones(20_000, 2, 3))
    assert torch.equal(out, out[:, :1, :1].expand_as(out)), "a sample is dropped as a whole"
    kept = out[:, 0, 0] > 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.015)  # 4.6 deviations of the mean
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 0.7))
    assert torch.equal(layer.eval()(out), out)
    assert torch.equal(DropPath(0.0).train()(out), out)


def test_drop_path_rises_linearly() -> None:
    model = InternImage(SMALL, drop_path_rate=0.4)
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert [m.rate for m in InternImage(SMALL).modules() if isinstance(m, DropPath)] == [0.0] * 5


def test_dropped_block_is_the_identity() -> None:
    block = Block(SMALL, 8, 2, drop_path_rate=0.999999).train()
    features = torch.randn(3, 5, 7, 8)
    assert torch.equal(block(features), features)


def test_new_dcnv3_averages_its_neighbourhood() -> None:
    """Zero offsets and even masks make a box filter of the projected input."""
    module = DCNv3(12, 3).double()
    features = torch.randn(2, 6, 5, 12, dtype=torch.float64)
    value = module.input_projection(features).permute(0, 3, 1, 2)
    expected = module.output_projection(F.avg_pool2d(value, 3, 1, 1).permute(0, 2, 3, 1))
    torch.testing.assert_close(module(features), expected)


def test_new_center_scale_takes_half_of_the_centre() -> None:
    module = DCNv3(12, 3, DCNv3Settings(center_feature_scale=True)).double()
    features = torch.randn(1, 6, 5, 12, dtype=torch.float64)
    value = module.input_projection(features)
    average = F.avg_pool2d(value.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(features), module.output_projection(0.5 * (average + value)))


@pytest.mark.parametrize("style", ["t", "h"])
def test_autocast(style: str) -> None:
    model = build(style).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images)
    for a, b in zip(half, model(images), strict=True):
        assert (a.float() - b).norm() < 0.1 * b.norm()


def test_state_survives_a_round_trip_through_safetensors(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file, save_file

    model = build("h").eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other = InternImage(STYLES["h"]).eval()
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    images = torch.randn(1, 3, 32, 32)
    for a, b in zip(model(images), other(images), strict=True):
        assert torch.equal(a, b)


def test_build_backbone_passes_settings_on() -> None:
    model = build_backbone(
        BackboneConfig(out_indices=(1, 3), drop_path_rate=0.2, checkpointing=True, frozen_stages=1)
    )
    assert isinstance(model, InternImage)
    assert model.spec is internimage.VARIANTS["internimage_micro"]
    assert (model.out_channels, model.out_strides) == ((32, 128), (8, 32))
    assert model.checkpointing
    assert model.frozen_stages == 1
    assert max(m.rate for m in model.modules() if isinstance(m, DropPath)) == pytest.approx(0.2)


def test_micro_is_small() -> None:
    assert sum(p.numel() for p in build_backbone(BackboneConfig()).parameters()) < 0.7e6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "internimage_q"}, "internimage_micro, internimage_t.*resnet50"),
        ({"out_indices": ()}, "out_indices must be not empty"),
        ({"out_indices": (2, 1)}, "out_indices must be in ascending order"),
        ({"out_indices": (1, 4)}, "out_indices must be .*0 to 3"),
        ({"frozen_stages": 5}, "frozen_stages"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be .*below 1"),
        ({"variant": "resnet50", "drop_path_rate": 0.1}, "drop_path_rate is not available"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(BackboneConfig(**settings))


@pytest.mark.parametrize(
    "change",
    [{"groups": (1, 2, 4)}, {"post_norm": True, "res_post_norm": True}],
)
def test_contradicting_specs_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]


def test_dcnv3_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="multiple of groups"):
        DCNv3(10, 3)
    with pytest.raises(ConfigError, match="odd"):
        DCNv3Settings(kernel_size=2)


def test_features_stay_channels_last_in_memory() -> None:
    model = build("t").eval()
    seen = {}

    def hook(name: str):  # type: ignore[no-untyped-def]
        return lambda _, inputs: seen.update({name: inputs[0].is_contiguous()})

    for name, module in model.named_modules():
        # What the output projection gets is laid out by the operator, not here.
        if isinstance(module, Block | nn.LayerNorm | nn.Linear) and not name.endswith("output_projection"):
            module.register_forward_pre_hook(hook(name))
    outputs = model(torch.randn(2, 3, 64, 96))
    assert len(seen) > 30
    assert [name for name, contiguous in seen.items() if not contiguous] == []
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in outputs)
