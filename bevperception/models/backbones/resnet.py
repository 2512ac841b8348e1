"""ResNets (He et al., Deep Residual Learning, CVPR 2016): 50 and 101 as published, and a small one.

Stages may have modulated deformable convolutions (Zhu et al., Deformable ConvNets v2, CVPR 2019).

Names of modules and parameters are torchvision's and mmdet's, so that their weights load as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bevperception.models.backbones.layers import check_stages, freeze
from bevperception.ops.convolution import convolve
from bevperception.ops.modulated_convolution import deform_conv2d

EXPANSION = 4


@dataclass(frozen=True)
class ResNetSpec:
    """Shape of one ResNet of bottleneck blocks.

    Args:
        depths: blocks per stage.
        style: 'pytorch' strides in the 3x3 convolution of a block, 'caffe' in its first 1x1.
        base_channels: inner channels of the first stage; its output has four times as many.
        stem_channels: channels of the stem.
        deformable: whether the 3x3 convolutions of each stage are deformable.
    """

    depths: tuple[int, ...]
    style: Literal["pytorch", "caffe"] = "pytorch"
    base_channels: int = 64
    stem_channels: int = 64
    deformable: tuple[bool, ...] = (False, False, False, False)

    def stage_channels(self, stage: int) -> int:
        """Output channels of a stage, counted from 0."""
        return EXPANSION * self.base_channels << stage


VARIANTS = {
    "resnet50": ResNetSpec((3, 4, 6, 3)),
    "resnet101": ResNetSpec((3, 4, 23, 3)),
    "resnet50_caffe": ResNetSpec((3, 4, 6, 3), "caffe"),
    "resnet101_caffe": ResNetSpec((3, 4, 23, 3), "caffe"),
    "resnet101_caffe_dcn": ResNetSpec((3, 4, 23, 3), "caffe", deformable=(False, False, True, True)),
    # As slow as internimage_micro on a CPU, to compare with it.
    "resnet_micro": ResNetSpec((2, 2, 3, 2), base_channels=16, stem_channels=16),
}


class DeformableConvolution(nn.Conv2d):
    """A 3x3 convolution whose points a second convolution moves and weights (DCNv2).

    Names of parameters are mmcv's ``ModulatedDeformConv2dPack``'s. It begins as a convolution of half weight.

    Args:
        channels_in: channels in.
        channels_out: channels out.
        stride: stride.
        groups: of channels that move together.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.conv_offset = nn.Conv2d(channels_in, 27 * groups, 3, stride=stride, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, ceil(H/stride), ceil(W/stride))."""
        offset_y, offset_x, mask = self.conv_offset(features).chunk(3, dim=1)
        # Two thirds are offsets, (dy, dx) alternating; which third a number is in does not say which it is.
        offset = torch.cat((offset_y, offset_x), dim=1)
        return deform_conv2d(features, offset, mask.sigmoid(), self.weight, stride=self.stride[0], padding=1)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with a residual connection.

    Args:
        channels_in: channels in.
        channels: inner channels; four times as many go out.
        stride: stride of the block.
        style: where the stride lies, see :class:`ResNetSpec`.
        deformable: whether the 3x3 convolution is.
    """

    def __init__(
        self, channels_in: int, channels: int, stride: int, style: str, *, deformable: bool = False
    ) -> None:
        super().__init__()
        channels_out = EXPANSION * channels
        stride1, stride2 = (stride, 1) if style == "caffe" else (1, stride)
        self.conv1 = nn.Conv2d(channels_in, channels, 1, stride=stride1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = (
            DeformableConvolution(channels, channels, stride2)
            if deformable
            else nn.Conv2d(channels, channels, 3, stride=stride2, padding=1, bias=False)
        )
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, 4C, ceil(H/stride), ceil(W/stride)).

        A block without ``downsample`` may overwrite its input where it only predicts.
        """
        identity = features if self.downsample is None else _project(features, self.downsample)
        branch = convolve(features, self.conv1, self.bn1)
        branch = convolve(branch, self.conv2, self.bn2)
        return convolve(branch, self.conv3, self.bn3, shortcut=identity)


def _project(features: Tensor, downsample: nn.Sequential) -> Tensor:
    convolution, norm = downsample
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    return convolve(features, convolution, norm, relu=False)


class ResNet(nn.Module):
    """ResNet backbone.

    Stages after the last one asked for are not built.

    Args:
        spec: shape of the network, for example ``VARIANTS["resnet50"]``.
        out_indices: stages to hand out, ascending; stage i has stride 4 * 2**i.
        checkpointing: recompute each block in backward to save memory.
        frozen_stages: -1 trains all, 0 freezes the stem, k the stem and the first k stages.
        norm_eval: batch norm keeps its running statistics while training, as published: a batch of
            six images of one scene is too small for statistics of its own.
        norm_trainable: whether scale and shift of batch norm train; published v1 models: no.

    Raises:
        ConfigError: out_indices or frozen_stages is out of range.
    """

    def __init__(
        self,
        spec: ResNetSpec,
        out_indices: tuple[int, ...] = (0, 1, 2, 3),
        *,
        checkpointing: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = True,
        norm_trainable: bool = False,
    ) -> None:
        super().__init__()
        self.out_indices = check_stages(out_indices, frozen_stages, len(spec.depths))
        self.out_channels = tuple(spec.stage_channels(i) for i in self.out_indices)
        self.out_strides = tuple(4 << i for i in self.out_indices)
        self.checkpointing = checkpointing
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.conv1 = nn.Conv2d(3, spec.stem_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(spec.stem_channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self._stages = [f"layer{i + 1}" for i in range(self.out_indices[-1] + 1)]
        for index, name in enumerate(self._stages):
            self.add_module(name, _make_stage(spec, index))
        self._reset_parameters()
        for norm in self._norms():
            norm.requires_grad_(norm_trainable)
        for module in self._frozen():
            freeze(module)

    def _reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, DeformableConvolution):  # no movement at first
                nn.init.zeros_(module.conv_offset.weight)
                nn.init.zeros_(module.conv_offset.bias)  # type: ignore[arg-type]

    def _norms(self) -> list[nn.BatchNorm2d]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        stages = [self.get_submodule(name) for name in self._stages[: self.frozen_stages]]
        return [self.conv1, self.bn1, *stages]

    def train(self, mode: bool = True) -> ResNet:
        """Switch between training and evaluation; frozen parts (and norms if so set) stay in evaluation."""
        super().train(mode)
        for module in [*self._frozen(), *(self._norms() if self.norm_eval else [])]:
            module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute feature maps.

        Args:
            images: (N, 3, H, W), normalised, any size.

        Returns:
            One (N, C_i, ceil(H / stride_i), ceil(W / stride_i)) per entry of ``out_indices``, in
            channels-last memory.
        """
        features = self.maxpool(
            convolve(images.contiguous(memory_format=torch.channels_last), self.conv1, self.bn1)
        )
        outputs = []
        for index, name in enumerate(self._stages):
            for block in self.get_submodule(name).children():
                if self.checkpointing and torch.is_grad_enabled():
                    features = checkpoint(block, features, use_reentrant=False)
                else:
                    features = block(features)
            if index in self.out_indices:
                outputs.append(features)
        return outputs


def _make_stage(spec: ResNetSpec, index: int) -> nn.Sequential:
    channels = spec.base_channels << index
    channels_in = spec.stem_channels if index == 0 else spec.stage_channels(index - 1)
    stride = 1 if index == 0 else 2
    inputs = [channels_in, *[EXPANSION * channels] * (spec.depths[index] - 1)]
    blocks = [
        Bottleneck(inner, channels, stride if k == 0 else 1, spec.style, deformable=spec.deformable[index])
        for k, inner in enumerate(inputs)
    ]
    return nn.Sequential(*blocks)
