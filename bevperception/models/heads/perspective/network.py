"""The perspective head's towers and predictors on every level of the feature pyramid.

DD3D (Park et al., ICCV 2021) over FCOS (Tian et al., ICCV 2019), as in the published BEVFormer v2:
NuscenesDD3D with its fcos2d_head and fcos3d_head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bevperception.models.map_layers import build_norm
from bevperception.structures import PerspectiveLevel
from bevperception.taxonomy import MAX_ATTRIBUTES

PRIOR_PROBABILITY = 0.01
"""Initial score of every class everywhere."""
DEPTH_SCALE = 0.3
"""Initial scale of the depth as a share of its deviation (DD3D)."""

TowerNorm = Literal["batch", "group", "none"]


class TowerLayer(nn.Module):
    """3x3 convolution, a norm of every level's own, ReLU.

    Args:
        in_channels, channels: width before and after.
        levels: how many levels share the convolution.
        norm: 'batch', 'group' (32 groups, or the largest power of two that divides the width) or 'none'.
    """

    def __init__(self, in_channels: int, channels: int, levels: int, norm: TowerNorm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=norm == "none")
        self.norms = nn.ModuleList()
        if norm != "none":
            self.norms.extend(build_norm(norm, channels, groups=32) for _ in range(levels))
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, level: int) -> Tensor:
        """(M, in_channels, h, w) to (M, channels, h, w)."""
        x = self.conv(x)
        # Statistics of no image at all do not exist.
        return torch.relu(self.norms[level](x) if self.norms and x.shape[0] else x)


def _predictor(channels: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    layer = nn.Conv2d(channels, outputs, 3, padding=1, bias=bias)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


@dataclass(frozen=True)
class NetworkSettings:
    """Sizes of the network; the defaults are those of the published BEVFormer v2.

    Attributes:
        in_channels: width of the features.
        classes: number of detection classes.
        strides: of the levels in pixels.
        mean_depth_m, std_depth_m: of the objects of each level, before scaling by the focal length: initial
            values of the depth's offset and scale.
        channels: width of the towers; None takes the features'.
        class_convolutions, box2d_convolutions, box3d_convolutions: depth of the three towers.
        attributes: attributes a class may have; see ``taxonomy.ATTRIBUTES``.
        norm: see :class:`TowerLayer`.
        scales: learn a scale a level for boxes, centres, sizes, confidences and depths.
        class_agnostic: one 3D box a pixel in place of one a class.
        per_level_predictors: separate 3D predictors for every level.
    """

    in_channels: int
    classes: int
    strides: Sequence[int]
    mean_depth_m: Sequence[float]
    std_depth_m: Sequence[float]
    channels: int | None = None
    class_convolutions: int = 4
    box2d_convolutions: int = 4
    box3d_convolutions: int = 4
    attributes: int = MAX_ATTRIBUTES
    norm: TowerNorm = "batch"
    scales: bool = True
    class_agnostic: bool = False
    per_level_predictors: bool = False


class PerspectiveNetwork(nn.Module):
    """Dense 2D and 3D predictions for every pixel of every level.

    Args:
        settings: sizes.
    """

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        channels = settings.channels or settings.in_channels
        classes, strides = settings.classes, settings.strides
        levels = len(strides)
        boxes = 1 if settings.class_agnostic else classes

        def tower(depth: int) -> nn.ModuleList:
            widths = [settings.in_channels, *[channels] * (depth - 1)]
            return nn.ModuleList(TowerLayer(width, channels, levels, settings.norm) for width in widths)

        def predictors(outputs: int, bias: bool = True) -> nn.ModuleList:
            count = levels if settings.per_level_predictors else 1
            return nn.ModuleList(_predictor(channels, outputs, bias) for _ in range(count))

        self.class_tower, self.box2d_tower = (
            tower(settings.class_convolutions),
            tower(settings.box2d_convolutions),
        )
        self.box3d_tower = tower(settings.box3d_convolutions)
        self.class_logits = _predictor(channels, classes)
        assert self.class_logits.bias is not None
        nn.init.constant_(self.class_logits.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        self.box2d, self.centreness = _predictor(channels, 4), _predictor(channels, 1)
        self.quaternion, self.centre = predictors(4 * boxes), predictors(2 * boxes)
        self.depth = predictors(boxes, bias=not settings.scales)
        self.size, self.confidence = predictors(3 * boxes), predictors(boxes)
        self.attributes, self.speed = _predictor(channels, settings.attributes), _predictor(channels, 1)

        def per_level(values: Sequence[float]) -> nn.ParameterList | None:
            if not settings.scales:
                return None
            return nn.ParameterList(torch.full((1,), float(value)) for value in values)

        self.box2d_scales, self.centre_scales = per_level(strides), per_level(strides)
        self.size_scales, self.confidence_scales = per_level([1.0] * levels), per_level([1.0] * levels)
        self.depth_scales = per_level([std * DEPTH_SCALE for std in settings.std_depth_m])
        self.depth_offsets = per_level(settings.mean_depth_m)

    def forward(self, features: Sequence[Tensor]) -> list[PerspectiveLevel]:
        """Predict.

        Args:
            features: per level (M, in_channels, h, w) of M images.
        """
        return [self._level(x, level) for level, x in enumerate(features)]

    def _level(self, x: Tensor, level: int) -> PerspectiveLevel:
        class_features, box2d_features, box3d_features = (
            _run(tower, x, level) for tower in (self.class_tower, self.box2d_tower, self.box3d_tower)
        )

        def predict(predictors: nn.ModuleList) -> Tensor:
            result: Tensor = predictors[level % len(predictors)](box3d_features)
            return result

        depth = _scaled(predict(self.depth), self.depth_scales, level)
        return PerspectiveLevel(
            class_logits=self.class_logits(class_features),
            box2d=torch.relu(_scaled(self.box2d(box2d_features), self.box2d_scales, level)),
            centreness=self.centreness(box2d_features),
            quaternion=predict(self.quaternion),
            centre=_scaled(predict(self.centre), self.centre_scales, level),
            depth=depth if self.depth_offsets is None else depth + self.depth_offsets[level],
            size=_scaled(predict(self.size), self.size_scales, level),
            confidence=_scaled(predict(self.confidence), self.confidence_scales, level),
            attributes=self.attributes(class_features),
            speed=torch.relu(self.speed(class_features)),
        )


def _run(tower: nn.ModuleList, x: Tensor, level: int) -> Tensor:
    for layer in tower:
        x = layer(x, level)
    return x


def _scaled(x: Tensor, scales: nn.ParameterList | None, level: int) -> Tensor:
    return x if scales is None else x * scales[level]


def locations(levels: Sequence[PerspectiveLevel], strides: Sequence[int]) -> list[Tensor]:
    """Pixels that the cells of every level stand for.

    Args:
        levels: for their sizes.
        strides: in pixels. A cell stands for the pixel that its convolutions are centred on, without
            FCOS's shift by half a stride.

    Returns:
        per level (h * w, 2) x and y.
    """
    places = []
    for level, stride in zip(levels, strides, strict=True):
        rows, columns = level.class_logits.shape[-2:]
        like = level.class_logits
        y = torch.arange(rows, dtype=like.dtype, device=like.device) * stride
        x = torch.arange(columns, dtype=like.dtype, device=like.device) * stride
        grid = torch.stack((x.expand(rows, -1), y[:, None].expand(-1, columns)), dim=-1)  # (h, w, 2)
        places.append(grid.flatten(0, 1))  # (h, w, 2) -> (h*w, 2)
    return places
