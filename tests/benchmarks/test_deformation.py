"""The benchmark of deformation: what is counted while a convolution runs, setting back, and the program."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bevperception.benchmarks.deformation import SET_BACK, main, set_back, watched
from bevperception.checkpoints.weights import Card, save_weights
from bevperception.config_io import config_to_dict
from bevperception.errors import ConfigError
from bevperception.models.backbones.internimage import DCNv3, InternImage, InternImageSpec
from tests.fixtures.tiny_nuscenes import VAL_SPLIT
from tests.streaming.helpers import micro_config, micro_model


def backbone(offset_scale: float = 1.0) -> InternImage:
    """Two blocks, two groups each."""
    torch.manual_seed(3)
    return InternImage(InternImageSpec(8, (1, 1), (2, 2), offset_scale=offset_scale), (0, 1)).eval()


def convolutions(model: nn.Module) -> list[DCNv3]:
    """In the order of its blocks."""
    return [module for module in model.modules() if isinstance(module, DCNv3)]


def test_lengths_and_points_are_those_of_known_offsets_and_masks() -> None:
    model = backbone(offset_scale=2.0)
    first = convolutions(model)[0]
    with torch.no_grad():
        first.offset.bias.copy_(torch.tensor([3.0, 4.0]).repeat(18))  # 5 long, by the scale 10
        # Group 0: one point takes all; group 1: three share alike. On average two points count.
        masks = torch.full((2, 9), -1e4)
        masks[0, 4] = 0.0
        masks[1, :3] = 0.0
        first.mask.bias.copy_(masks.flatten())
    with watched(model) as sampled:
        assert math.isnan(sampled[0].offset_px)
        assert math.isnan(sampled[0].points)
        model(torch.randn(2, 3, 33, 46))
        model(torch.randn(1, 3, 16, 20))
    assert [one.outputs for one in sampled] == [2 * (2 * 9 * 12 + 4 * 5), 2 * (2 * 5 * 6 + 2 * 3)]
    assert sampled[0].offset_px == pytest.approx(10.0)
    assert sampled[0].points == pytest.approx(2.0)
    assert (sampled[1].offset_px, sampled[1].points) == (0.0, pytest.approx(9.0))
    model(torch.randn(1, 3, 16, 20))
    assert sampled[1].outputs == 2 * (2 * 5 * 6 + 2 * 3)  # nobody watches any more


def test_set_back_convolutions_average_and_the_model_stays() -> None:
    model = backbone()
    trained = convolutions(model)[0]
    nn.init.normal_(trained.offset.weight)
    nn.init.normal_(trained.mask.weight)
    features = torch.randn(2, 7, 5, 8)
    with torch.no_grad():
        before = trained(features)
        average = convolutions(set_back(model, ("offset", "mask")))[0]
        value: Tensor = trained.input_projection(features).permute(0, 3, 1, 2)
        mean = nn.functional.avg_pool2d(value, 3, stride=1, padding=1)  # zeros beyond the border count
        expected = trained.output_projection(mean.permute(0, 2, 3, 1))
        assert torch.allclose(average(features), expected, atol=1e-5)
        assert not torch.allclose(before, expected, atol=1e-2)
        for layers in (("offset",), ("mask",)):
            half = convolutions(set_back(model, layers))[0](features)
            assert not torch.allclose(half, expected, atol=1e-3)
            assert not torch.allclose(half, before, atol=1e-3)
        assert torch.equal(trained(features), before)


def test_the_program_prints_a_row_for_every_way_and_convolution(
    tiny_nuscenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = micro_config(tiny_nuscenes)
    config.data.workers = 0
    model = micro_model(config)
    save_weights(tmp_path / "weights", model.state_dict(), Card(config_to_dict(config)))
    where = ["--weights", str(tmp_path / "weights"), "--split", VAL_SPLIT, "--out", str(tmp_path / "out")]
    assert main(where) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line[:18].strip() for line in lines[1:5]]
    assert rows == list(SET_BACK)
    # Fresh weights are set back already.
    assert len({line[18:] for line in lines[1:5]}) == 1
    assert isinstance(model.backbone, InternImage)
    assert len(lines) == 6 + len(convolutions(model.backbone))
    assert {tuple(line.split()[1:]) for line in lines[6:]} == {("0.00", "9.0")}
    assert (tmp_path / "out" / "offsets_0" / "metrics.json").is_file()
    with pytest.raises(ConfigError, match="must be an InternImage, got resnet_micro"):
        main([*where, "--model.backbone.variant", "resnet_micro"])
