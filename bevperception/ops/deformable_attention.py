"""Multi-scale deformable attention: the operator's Python face and its reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from bevperception.ops.backend import Backend, choose_backend
from bevperception.ops.checks import (
    misfit,
    require_dimensions,
    require_fitting_types,
    require_levels,
    working_copies,
)

_NAME = "ms_deform_attn"


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sample feature maps at a few points per query and head, and sum them by attention weight.

    Sampling is bilinear with zeros outside the map; a location l on an axis of n cells is the cell
    coordinate ``l * n - 0.5`` (``align_corners=False``). A location that is not finite samples zero.

    Source: Deformable DETR (Zhu et al., ICLR 2021), equation 3.

    Args:
        value: (B, sum of h*w over levels, H, C) feature maps, levels one after the other, row by row.
        spatial_shapes: (h, w) of each level.
        sampling_locations: (B, Q, H, L, P, 2) as (x, y), each level's map spanning 0 to 1.
        attention_weights: (B, Q, H, L, P), usually normalised over L and P.

    Returns:
        (B, Q, H*C), head by head, in the dtype of ``value``. The work is done in float64 for float64
        tensors and in float32 otherwise; under autocast the result is float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        ConfigError: the native backend was asked for and is not available.
    """
    shapes = [(h, w) for h, w in spatial_shapes]
    _check(value, shapes, sampling_locations, attention_weights)
    result_dtype = torch.float32 if torch.is_autocast_enabled(value.device.type) else value.dtype
    is_native = choose_backend(_NAME, value.device) is Backend.NATIVE
    value, sampling_locations, attention_weights = working_copies(
        value, sampling_locations, attention_weights, keep_half=is_native and value.is_cuda
    )
    if is_native:
        flat_shapes = [n for shape in shapes for n in shape]
        output: Tensor = torch.ops.bevperception.ms_deform_attn(
            value, flat_shapes, sampling_locations, attention_weights
        )
    else:
        output = ms_deform_attn_reference(value, shapes, sampling_locations, attention_weights)
    return output if output.dtype == result_dtype else output.to(result_dtype)


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """:func:`ms_deform_attn` in plain PyTorch: one ``grid_sample`` a level, as in the published code.

    Args and result as there; all tensors must share one dtype, float32 or float64.
    """
    batch, _, heads, channels = value.shape
    queries, levels, points = (sampling_locations.shape[i] for i in (1, 3, 4))
    grid = 2 * sampling_locations - 1
    # grid_sample would return NaN; -3 is well outside the map, where it returns zero.
    grid = torch.where(grid.isfinite(), grid, -3.0)
    sampled = []
    maps = torch.split(value, [h * w for h, w in spatial_shapes], dim=1)
    for level, (height, width) in enumerate(spatial_shapes):
        # (B, h*w, H, C) -> (B*H, C, h, w)
        level_map = maps[level].permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        level_grid = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B*H, Q, P, 2)
        sampled.append(
            grid_sample(level_map, level_grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        )  # (B*H, C, Q, P)
    # (B, Q, H, L, P) -> (B*H, 1, Q, L*P)
    weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    output = (torch.stack(sampled, dim=-2).flatten(-2) * weights).sum(-1)  # (B*H, C, Q)
    # (B*H, C, Q) -> (B, Q, H*C)
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def _check(
    value: Tensor, shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    require_dimensions(_NAME, "value", value, "batch cells heads channels")
    require_dimensions(
        _NAME, "sampling_locations", sampling_locations, "batch queries heads levels points xy"
    )
    require_dimensions(_NAME, "attention_weights", attention_weights, "batch queries heads levels points")
    tensors = {
        "value": value,
        "sampling_locations": sampling_locations,
        "attention_weights": attention_weights,
    }
    require_fitting_types(_NAME, tensors)
    require_levels(_NAME, value, shapes)
    batch, _, heads, _ = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    expected = (batch, queries, heads, len(shapes), points, 2)
    if sampling_locations.shape != expected:
        raise misfit(
            f"{_NAME}: sampling_locations must have shape {expected} "
            "(batch, queries, heads, levels, points, 2)",
            f"{tuple(sampling_locations.shape)}",
            "Batch and heads come from value, levels from spatial_shapes.",
        )
    if attention_weights.shape != expected[:-1]:
        raise misfit(
            f"{_NAME}: attention_weights must have the shape of sampling_locations "
            "without its last dimension",
            f"attention_weights {tuple(attention_weights.shape)} "
            f"and sampling_locations {tuple(sampling_locations.shape)}",
            "Are levels and points flattened in one of them?",
        )
