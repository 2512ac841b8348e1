"""InternImage (Wang et al., InternImage: Exploring Large-Scale Vision Foundation Models with
Deformable Convolutions, CVPR 2023), all published sizes and one of our own for the CPU.

Tensors between blocks are (N, H, W, C); convolutions see them as channels_last views, without copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bevperception.errors import ConfigError
from bevperception.models.backbones.layers import (
    Activation,
    DropPath,
    Norm,
    channels_first,
    channels_last,
    check_stages,
    freeze,
    init_linear,
    make_activation,
    make_norm,
)
from bevperception.ops import dcnv3
from bevperception.ops.linear import Linear, linear
from bevperception.ops.normalization import softmax


@dataclass(frozen=True)
class InternImageSpec:
    """Shape of one InternImage.

    Args:
        channels: channels of the first stage; every further stage doubles them.
        depths: blocks per stage.
        groups: groups of the deformable convolution per stage.
        mlp_ratio: hidden width of a block's feed-forward layers over its channels.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        drop_rate: drop-out after the stem and in the feed-forward layers.
        layer_scale: initial value of the learned scale of every residual branch; None for no scale.
        offset_scale: factor on the sampling grid and the offsets.
        post_norm: normalise a branch's output instead of its input.
        res_post_norm: normalise a branch's output as well as its input.
        depthwise_kernel_size: depth-wise convolution that offsets and masks are made from; None
            takes the deformable convolution's own 3.
        level2_post_norm_blocks: blocks of the third stage that are followed by a norm of their own.
        center_feature_scale: learned mixing of the deformable convolution with its centre.
        remove_center: leave the centre out of the sampled points.
        norm: norm of stem, down-sampling and offset branch; blocks always use layer norm.
        activation: activation everywhere.
    """

    channels: int
    depths: tuple[int, ...]
    groups: tuple[int, ...]
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    drop_rate: float = 0.0
    layer_scale: float | None = None
    offset_scale: float = 1.0
    post_norm: bool = False
    res_post_norm: bool = False
    depthwise_kernel_size: int | None = None
    level2_post_norm_blocks: tuple[int, ...] = ()
    center_feature_scale: bool = False
    remove_center: bool = False
    norm: Norm = "layer"
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.groups):
            raise ConfigError(
                f"{len(self.depths)} depths but {len(self.groups)} groups: one of each per stage"
            )
        if self.post_norm and self.res_post_norm:
            raise ConfigError("post_norm and res_post_norm exclude each other")

    def stage_channels(self, stage: int) -> int:
        """Channels of a stage, counted from 0."""
        return self.channels << stage


VARIANTS = {
    # Narrow where the map is large: on a CPU the first stages' memory traffic is what costs.
    "internimage_micro": InternImageSpec(channels=16, depths=(1, 1, 3, 2), groups=(1, 2, 4, 8)),
    "internimage_t": InternImageSpec(
        channels=64, depths=(4, 4, 18, 4), groups=(4, 8, 16, 32), drop_path_rate=0.2, layer_scale=1.0
    ),
    "internimage_s": InternImageSpec(
        channels=80,
        depths=(4, 4, 21, 4),
        groups=(5, 10, 20, 40),
        drop_path_rate=0.3,
        layer_scale=1.0,
        post_norm=True,
    ),
    "internimage_b": InternImageSpec(
        channels=112,
        depths=(4, 4, 21, 4),
        groups=(7, 14, 28, 56),
        drop_path_rate=0.4,
        layer_scale=1.0,
        post_norm=True,
    ),
    "internimage_l": InternImageSpec(
        channels=160,
        depths=(5, 5, 22, 5),
        groups=(10, 20, 40, 80),
        drop_path_rate=0.4,
        layer_scale=1.0,
        offset_scale=2.0,
        post_norm=True,
    ),
    "internimage_xl": InternImageSpec(
        channels=192,
        depths=(5, 5, 24, 5),
        groups=(12, 24, 48, 96),
        drop_path_rate=0.4,
        layer_scale=1.0,
        offset_scale=2.0,
        post_norm=True,
    ),
    "internimage_h": InternImageSpec(
        channels=320,
        depths=(6, 6, 32, 6),
        groups=(10, 20, 40, 80),
        drop_path_rate=0.5,
        res_post_norm=True,
        depthwise_kernel_size=5,
        level2_post_norm_blocks=(5, 11, 17, 23, 29),
        center_feature_scale=True,
    ),
    "internimage_g": InternImageSpec(
        channels=512,
        depths=(2, 2, 48, 4),
        groups=(16, 32, 64, 128),
        drop_path_rate=0.5,
        post_norm=True,
        depthwise_kernel_size=5,
        level2_post_norm_blocks=(5, 11, 17, 23, 29, 35, 41, 47),
        center_feature_scale=True,
    ),
}
"""The published detection backbones, and `micro`, which is this project's own for two CPU cores."""


@dataclass(frozen=True)
class DCNv3Settings:
    """What DCNv3 layers of a backbone have in common.

    Attributes:
        kernel_size: odd number of sampled rows and columns.
        depthwise_kernel_size: odd kernel of the depth-wise convolution; None takes kernel_size.
        dilation: spacing of the sampled grid.
        offset_scale: factor on the grid and the offsets.
        center_feature_scale: mix the result with the projected input by a learned share per group.
        remove_center: leave the centre out of the sampled points.
        norm: norm in the offset branch.
        activation: activation in the offset branch.

    Raises:
        ConfigError: a kernel is even.
    """

    kernel_size: int = 3
    depthwise_kernel_size: int | None = None
    dilation: int = 1
    offset_scale: float = 1.0
    center_feature_scale: bool = False
    remove_center: bool = False
    norm: Norm = "layer"
    activation: Activation = "gelu"

    @property
    def depthwise_size(self) -> int:
        """Kernel of the depth-wise convolution."""
        return self.kernel_size if self.depthwise_kernel_size is None else self.depthwise_kernel_size

    def __post_init__(self) -> None:
        if self.kernel_size % 2 == 0 or self.depthwise_size % 2 == 0:
            raise ConfigError(
                f"DCNv3: kernels must be odd, got {self.kernel_size} and depth-wise {self.depthwise_size}"
            )


class DCNv3(nn.Module):
    """Deformable convolution v3 with the layers that make its offsets and masks (paper, section 3.1).

    Stride 1; the output has the input's size.

    Args:
        channels: channels in and out.
        groups: groups with offsets and masks of their own; a divisor of channels.
        settings: see :class:`DCNv3Settings`.

    Raises:
        ConfigError: channels is no multiple of groups.
    """

    def __init__(self, channels: int, groups: int, settings: DCNv3Settings | None = None) -> None:
        super().__init__()
        settings = settings or DCNv3Settings()
        if channels % groups:
            raise ConfigError(f"DCNv3: channels ({channels}) must be a multiple of groups ({groups})")
        self.groups = groups
        self.kernel_size, self.dilation = settings.kernel_size, settings.dilation
        self.offset_scale, self.remove_center = settings.offset_scale, settings.remove_center
        points = groups * (settings.kernel_size**2 - int(settings.remove_center))
        size = settings.depthwise_size
        self.depthwise = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels)
        self.depthwise_norm = make_norm(channels, settings.norm)
        self.activation = make_activation(settings.activation)
        self.offset = Linear(channels, points * 2)
        self.mask = Linear(channels, points)
        self.input_projection = Linear(channels, channels)
        self.output_projection = Linear(channels, channels)
        self.center_scale = Linear(channels, groups) if settings.center_feature_scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a plain 3x3 average: offsets 0, masks even, centre share one half; projections Xavier."""
        zero = [self.offset, self.mask] + ([self.center_scale] if self.center_scale is not None else [])
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.input_projection, self.output_projection):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve (N, H, W, C) to the same shape."""
        value = self.input_projection(features)  # N H W C
        context = channels_last(self.depthwise(channels_first(features)))
        context = self.activation(self.depthwise_norm(context))  # N H W C
        mask = softmax(self.mask(context).unflatten(-1, (self.groups, -1))).flatten(-2)  # N H W G*K
        result = dcnv3(
            value,
            self.offset(context),
            mask,
            kernel_size=self.kernel_size,
            stride=1,
            padding=self.dilation * (self.kernel_size // 2),
            dilation=self.dilation,
            groups=self.groups,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
        )
        if self.center_scale is not None:
            share = self.center_scale(context).sigmoid()  # N H W G
            share = share.repeat_interleave(value.shape[-1] // self.groups, dim=-1)  # N H W C
            result = result + share * (value - result)
        out: Tensor = self.output_projection(result)
        return out


class FeedForward(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        channels: channels in and out.
        hidden: channels between the layers.
        activation: the activation.
        drop_rate: drop-out after the activation and at the end.
    """

    def __init__(self, channels: int, hidden: int, activation: Activation, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = Linear(channels, hidden)
        self.activation: Activation = activation
        self.fc2 = Linear(hidden, channels)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        hidden = linear(features, self.fc1.weight, self.fc1.bias, self.activation)
        out: Tensor = self.drop(self.fc2(self.drop(hidden)))
        return out


class Block(nn.Module):
    """Deformable convolution and feed-forward layers, each a residual branch (paper, section 3.2).

    A branch is input norm, operator, output norm, learned scale; the variants differ in which of them
    they have: pre-norm the first, post-norm the third, res-post-norm both.

    Args:
        spec: shape of the network.
        channels: channels of the stage.
        groups: groups of the stage.
        drop_path_rate: stochastic depth of this block.
    """

    def __init__(self, spec: InternImageSpec, channels: int, groups: int, drop_path_rate: float) -> None:
        super().__init__()

        def norm_if(wanted: bool) -> nn.Module:
            return make_norm(channels) if wanted else nn.Identity()

        self.pre_norm1 = norm_if(not spec.post_norm)
        settings = DCNv3Settings(
            depthwise_kernel_size=spec.depthwise_kernel_size,
            offset_scale=spec.offset_scale,
            center_feature_scale=spec.center_feature_scale,
            remove_center=spec.remove_center,
            norm=spec.norm,
            activation=spec.activation,
        )
        self.dcn = DCNv3(channels, groups, settings)
        self.post_norm1 = norm_if(spec.post_norm or spec.res_post_norm)
        self.pre_norm2 = norm_if(not spec.post_norm)
        hidden = int(channels * spec.mlp_ratio)
        self.mlp = FeedForward(channels, hidden, spec.activation, spec.drop_rate)
        self.post_norm2 = norm_if(spec.post_norm or spec.res_post_norm)
        self.scale1: nn.Parameter | None = None
        self.scale2: nn.Parameter | None = None
        if spec.layer_scale is not None:
            self.scale1 = nn.Parameter(torch.full((channels,), spec.layer_scale))
            self.scale2 = nn.Parameter(torch.full((channels,), spec.layer_scale))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, H, W, C) to the same shape."""
        features = self._add(features, self.post_norm1(self.dcn(self.pre_norm1(features))), self.scale1)
        return self._add(features, self.post_norm2(self.mlp(self.pre_norm2(features))), self.scale2)

    def _add(self, features: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        branch = self.drop_path(branch)
        return features + branch if scale is None else torch.addcmul(features, branch, scale)


class Stage(nn.Module):
    """Blocks of one resolution and the norm at their end.

    Args:
        spec: shape of the network.
        index: which stage, from 0.
        drop_path_rates: stochastic depth of each block.
    """

    def __init__(self, spec: InternImageSpec, index: int, drop_path_rates: list[float]) -> None:
        super().__init__()
        channels = spec.stage_channels(index)
        self.blocks = nn.ModuleList(
            Block(spec, channels, spec.groups[index], rate) for rate in drop_path_rates
        )
        self.post_norm_blocks = spec.level2_post_norm_blocks if index == 2 else ()
        self.post_norms = nn.ModuleList(make_norm(channels) for _ in self.post_norm_blocks)
        has_norm = not spec.post_norm or spec.center_feature_scale
        self.norm = make_norm(channels) if has_norm else nn.Identity()

    def forward(self, features: Tensor, checkpointing: bool) -> Tensor:
        """Map (N, H, W, C) to the same shape; with checkpointing, backward recomputes each block."""
        for index, block in enumerate(self.blocks):
            if checkpointing and torch.is_grad_enabled():
                features = checkpoint(block, features, use_reentrant=False)
            else:
                features = block(features)
            if index in self.post_norm_blocks:
                features = self.post_norms[self.post_norm_blocks.index(index)](features)
        out: Tensor = self.norm(features)
        return out


class Stem(nn.Module):
    """Two strided convolutions from the image to a quarter of its size.

    Args:
        channels: channels out.
        norm: norm after each convolution.
        activation: activation between them.
    """

    def __init__(self, channels: int, norm: Norm, activation: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, 3, stride=2, padding=1)
        self.norm1 = make_norm(channels // 2, norm)
        self.activation = make_activation(activation)
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = make_norm(channels, norm)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, ceil(H/4), ceil(W/4), C)."""
        features = self.activation(self.norm1(channels_last(self.conv1(images))))
        out: Tensor = self.norm2(channels_last(self.conv2(channels_first(features))))
        return out


class Downsample(nn.Module):
    """A strided convolution to half the size and twice the channels.

    Args:
        channels: channels in.
        norm: norm after the convolution.
    """

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = make_norm(2 * channels, norm)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, H, W, C) to (N, ceil(H/2), ceil(W/2), 2C)."""
        out: Tensor = self.norm(channels_last(self.conv(channels_first(features))))
        return out


class InternImage(nn.Module):
    """InternImage backbone.

    Stages after the last one asked for are not built.

    Args:
        spec: shape of the network, for example ``VARIANTS["internimage_t"]``.
        out_indices: stages to hand out, ascending; stage i has stride 4 * 2**i.
        drop_path_rate: stochastic depth; None takes the variant's own.
        checkpointing: recompute each block in backward to save memory.
        frozen_stages: -1 trains all, 0 freezes the stem, k the stem and the first k stages, each
            with the down-sampling after it.

    Raises:
        ConfigError: out_indices, frozen_stages or the rate is out of range.
    """

    def __init__(
        self,
        spec: InternImageSpec,
        out_indices: tuple[int, ...] = (0, 1, 2, 3),
        *,
        drop_path_rate: float | None = None,
        checkpointing: bool = False,
        frozen_stages: int = -1,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.out_indices = check_stages(out_indices, frozen_stages, len(spec.depths))
        self.out_channels = tuple(spec.stage_channels(i) for i in self.out_indices)
        self.out_strides = tuple(4 << i for i in self.out_indices)
        self.checkpointing = checkpointing
        self.frozen_stages = frozen_stages
        stages = self.out_indices[-1] + 1
        rate = spec.drop_path_rate if drop_path_rate is None else drop_path_rate
        self.stem = Stem(spec.channels, spec.norm, spec.activation)
        self.drop = nn.Dropout(spec.drop_rate)
        rates = _drop_path_rates(rate, spec.depths)
        self.stages = nn.ModuleList(Stage(spec, i, rates[i]) for i in range(stages))
        self.downsamples = nn.ModuleList(
            Downsample(spec.stage_channels(i), spec.norm) for i in range(stages - 1)
        )
        self._reset_parameters()
        for module in self._frozen():
            freeze(module)

    def _reset_parameters(self) -> None:
        self.apply(init_linear)
        for module in self.modules():
            if isinstance(module, DCNv3):
                module.reset_parameters()

    def _frozen(self) -> list[nn.Module]:
        count = self.frozen_stages
        if count < 0:
            return []
        return [self.stem, *self.stages[:count], *self.downsamples[:count]]

    def train(self, mode: bool = True) -> InternImage:
        """Switch between training and evaluation; frozen parts stay in evaluation."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute feature maps.

        Args:
            images: (N, 3, H, W), normalised, any size.

        Returns:
            One (N, C_i, ceil(H / stride_i), ceil(W / stride_i)) per entry of ``out_indices``, views of
            channels-last memory, before down-sampling.
        """
        features = self.drop(self.stem(images.contiguous(memory_format=torch.channels_last)))
        outputs = []
        for index, stage in enumerate(self.stages):
            if index > 0:
                features = self.downsamples[index - 1](features)
            features = stage(features, self.checkpointing)
            if index in self.out_indices:
                outputs.append(channels_first(features))
        return outputs


def _drop_path_rates(last: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates per stage and block, rising linearly from 0 at the first block to ``last``."""
    step = last / max(sum(depths) - 1, 1)
    return [[step * (sum(depths[:stage]) + i) for i in range(depth)] for stage, depth in enumerate(depths)]
