"""A second reference, as loops over single numbers: what the operators are defined to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _sample(feature_map: Tensor, x: float, y: float) -> Tensor:
    """Bilinear sample of (h, w, C) at cell coordinates, zeros outside."""
    height, width, channels = feature_map.shape
    result = torch.zeros(channels, dtype=feature_map.dtype)
    if not (math.isfinite(x) and math.isfinite(y)):
        return result
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                result += (1 - abs(x - column)) * (1 - abs(y - row)) * feature_map[row, column]
    return result


def slow_ms_deform_attn(
    value: Tensor, shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
) -> Tensor:
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    output = torch.zeros(batch, queries, heads, channels, dtype=value.dtype)
    for b in range(batch):
        start = 0
        for level, (height, width) in enumerate(shapes):
            level_map = value[b, start : start + height * width].reshape(height, width, heads, channels)
            start += height * width
            for q in range(queries):
                for head in range(heads):
                    for point in range(points):
                        x, y = locations[b, q, head, level, point].tolist()
                        sample = _sample(level_map[:, :, head], x * width - 0.5, y * height - 0.5)
                        output[b, q, head] += weights[b, q, head, level, point] * sample
    return output.flatten(2)


def slow_dcnv3(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    groups: int,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    batch, height, width, channels = input.shape
    out_height, out_width = offset.shape[1:3]
    middle = (kernel_size - 1) * dilation // 2
    taps = [
        (column * dilation - middle, row * dilation - middle)
        for column in range(kernel_size)
        for row in range(kernel_size)
        if not (remove_center and column == row == kernel_size // 2)
    ]
    maps = input.reshape(batch, height, width, groups, channels // groups)
    offsets = offset.reshape(batch, out_height, out_width, groups, len(taps), 2)
    weights = mask.reshape(batch, out_height, out_width, groups, len(taps))
    output = torch.zeros(batch, out_height, out_width, groups, channels // groups, dtype=input.dtype)
    for b in range(batch):
        for i in range(out_height):
            for j in range(out_width):
                for g in range(groups):
                    for k, (tap_x, tap_y) in enumerate(taps):
                        move_x, move_y = offsets[b, i, j, g, k].tolist()
                        x = j * stride - padding + middle + (tap_x + move_x) * offset_scale
                        y = i * stride - padding + middle + (tap_y + move_y) * offset_scale
                        output[b, i, j, g] += weights[b, i, j, g, k] * _sample(maps[b, :, :, g], x, y)
    return output.flatten(3)
