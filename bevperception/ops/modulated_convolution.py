"""Modulated deformable convolution (DCNv2): the operator's Python face and its reference.

The native way has two steps: the kernels of :func:`~bevperception.ops.deformable_attention.ms_deform_attn`
sample the map (a kernel point of an output cell is a query with one sampling point), and a matrix product
multiplies the samples by the kernel. Both have a CPU and a CUDA side and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bevperception.ops.backend import Backend, choose_backend
from bevperception.ops.checks import misfit, require_dimensions, require_fitting_types, working_copies
from bevperception.ops.deformable_attention import ms_deform_attn
from bevperception.ops.deformable_convolution import output_size

_NAME = "deform_conv2d"
_BAND_NUMBERS = 1 << 22
"""Samples that are held at a time where nothing is trained: they need not all fit into memory at once."""


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """Convolve a map whose kernel points are moved and weighted for every output cell.

    Output cell (y, x) is the sum over kernel points (i, j) of ``weight[:, :, i, j]`` times the map at
    ``(y * stride - padding + i * dilation, x * stride - padding + j * dilation) + offset``, times ``mask``.
    Sampling is bilinear with zeros outside the map; an offset that is not finite samples zero.

    Source: Deformable ConvNets v2 (Zhu et al., CVPR 2019), equation 1.

    Args:
        input: (N, C, H, W) feature map.
        offset: (N, D*K*K*2, Ho, Wo), ordered deformable group, point (row by row), (dy, dx), in cells. The D
            groups share the input's channels equally.
        mask: (N, D*K*K, Ho, Wo) modulation.
        weight: (C_out, C, K, K).
        stride: output cells lie this many input cells apart.
        padding: cells by which the kernel reaches over the border.
        dilation: cells between neighbouring kernel points.

    Returns:
        (N, C_out, Ho, Wo) in the dtype of ``input``, in channels-last memory. The work is done in float64 for
        float64 tensors and in float32 otherwise; under autocast the result is float32.

    Raises:
        ValueError: shapes, dtypes, devices or settings do not fit together.
        ConfigError: the native backend was asked for and is not available.
    """
    _check(input, offset, mask, weight, stride, padding, dilation)
    result_dtype = torch.float32 if torch.is_autocast_enabled(input.device.type) else input.dtype
    is_native = choose_backend(_NAME, input.device) is Backend.NATIVE
    with torch.autocast(input.device.type, enabled=False):
        compute = _native if is_native else deform_conv2d_reference
        tensors = working_copies(input, offset, mask, weight)
        output = compute(*tensors, stride=stride, padding=padding, dilation=dilation)
    return output if output.dtype == result_dtype else output.to(result_dtype)


def deform_conv2d_reference(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """:func:`deform_conv2d` in plain PyTorch: kernel point by kernel point, corner by corner.

    Args and result as there; all tensors must share one dtype, float32 or float64.
    """
    side, groups = weight.shape[-1], mask.shape[1] // weight.shape[-1] ** 2
    batch, channels, height, width = input.shape
    out_height, out_width = mask.shape[-2:]
    output = input.new_zeros(batch, len(weight), out_height, out_width)
    rows = torch.arange(out_height, device=input.device, dtype=input.dtype)[:, None] * stride - padding
    columns = torch.arange(out_width, device=input.device, dtype=input.dtype) * stride - padding
    # (B, D*K*K*2, Ho, Wo) -> (B, D, K*K, 2, Ho, Wo)
    moved = offset.unflatten(1, (groups, side * side, 2))
    factor = mask.unflatten(1, (groups, side * side))  # (B, D, K*K, Ho, Wo)
    maps = input.reshape(batch, groups, channels // groups, height, width)
    for point in range(side * side):
        y = rows + (point // side) * dilation + moved[:, :, point, 0]
        x = columns + (point % side) * dilation + moved[:, :, point, 1]
        sampled = _bilinear(maps, y, x) * factor[:, :, point, None]  # (B, D, C/D, Ho, Wo)
        kernel = weight[:, :, point // side, point % side]
        output = output + torch.einsum("oc,bchw->bohw", kernel, sampled.flatten(1, 2))
    return output.contiguous(memory_format=torch.channels_last)


def _bilinear(maps: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Maps (B, D, C, H, W) at rows y and columns x (B, D, Ho, Wo), zeros outside: (B, D, C, Ho, Wo)."""
    channels, height, width = maps.shape[2:]
    sampled = maps.new_zeros(*maps.shape[:3], *y.shape[2:])
    finite = y.isfinite() & x.isfinite()
    y, x = torch.where(finite, y, -2.0), torch.where(finite, x, -2.0)
    low_y, low_x = y.floor(), x.floor()
    for corner_y, share_y in ((low_y, low_y + 1 - y), (low_y + 1, y - low_y)):
        for corner_x, share_x in ((low_x, low_x + 1 - x), (low_x + 1, x - low_x)):
            inside = (corner_y >= 0) & (corner_y < height) & (corner_x >= 0) & (corner_x < width)
            row = corner_y.clamp(0, height - 1).long()
            cell = row * width + corner_x.clamp(0, width - 1).long()
            # (B, D, Ho, Wo) -> (B, D, C, Ho*Wo)
            index = cell.flatten(2)[:, :, None].expand(-1, -1, channels, -1)
            found = maps.flatten(3).gather(3, index).unflatten(3, y.shape[2:])
            sampled = sampled + found * torch.where(inside, share_y * share_x, 0.0)[:, :, None]
    return sampled


def _native(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    *,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """Sample by the native kernels, then multiply by the kernel."""
    batch, channels, height, width = input.shape
    side, groups = weight.shape[-1], mask.shape[1] // weight.shape[-1] ** 2
    points, (out_height, out_width) = side * side, mask.shape[-2:]
    # (B, C, H, W) -> (B, H*W, D, C/D)
    value = input.permute(0, 2, 3, 1).reshape(batch, height * width, groups, channels // groups)
    # (B, D*K*K*2, Ho, Wo) -> (B, Ho, Wo, K*K, D, 2)
    moved = offset.unflatten(1, (groups, points, 2)).permute(0, 4, 5, 2, 1, 3)
    y = _grid(out_height, side, stride, padding, dilation, offset)[:, None, :, None]  # (Ho, 1, K, 1)
    x = _grid(out_width, side, stride, padding, dilation, offset)[None, :, None, :]  # (1, Wo, 1, K)
    # (Ho, Wo, K, K) -> (Ho, Wo, K*K, 1), a point as (x, y) in fractions of the map
    at_y = (y.expand(-1, out_width, -1, side).flatten(2)[..., None] + moved[..., 0] + 0.5) / height
    at_x = (x.expand(out_height, -1, side, -1).flatten(2)[..., None] + moved[..., 1] + 0.5) / width
    # (B, Ho, Wo, K*K, D, 2) -> (B, Ho*Wo*K*K, D, 1, 1, 2)
    locations = torch.stack((at_x, at_y), dim=-1).flatten(1, 3)[:, :, :, None, None]
    # (B, D*K*K, Ho, Wo) -> (B, Ho*Wo*K*K, D, 1, 1)
    factors = mask.unflatten(1, (groups, points)).permute(0, 3, 4, 2, 1).flatten(1, 3)[..., None, None]
    # (C_out, C, K, K) -> (K*K*C, C_out)
    kernel = weight.permute(0, 2, 3, 1).reshape(len(weight), points * channels).t()
    shapes = [(height, width)]
    cells, tensors = out_height * out_width, (input, offset, mask, weight)
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if trains or torch.compiler.is_compiling():
        sampled = ms_deform_attn(value, shapes, locations, factors)
        output = sampled.view(batch, cells, points * channels) @ kernel
    else:
        output = value.new_empty(batch, cells, kernel.shape[1])
        band = max(1, _BAND_NUMBERS // (points * channels))
        for image in range(batch):
            for begin in range(0, cells, band):
                end = min(begin + band, cells)
                rows = (slice(image, image + 1), slice(begin * points, end * points))
                sampled = ms_deform_attn(value[image : image + 1], shapes, locations[rows], factors[rows])
                torch.mm(sampled.view(end - begin, -1), kernel, out=output[image, begin:end])
    # (B, Ho*Wo, C_out) -> (B, C_out, Ho, Wo)
    maps: Tensor = output.unflatten(1, (out_height, out_width)).permute(0, 3, 1, 2)
    return maps


def _grid(count: int, side: int, stride: int, padding: int, dilation: int, like: Tensor) -> Tensor:
    """Input coordinates (count, side) of the kernel's points of each output cell on one axis."""
    first = torch.arange(count, device=like.device, dtype=like.dtype) * stride - padding
    return first[:, None] + torch.arange(side, device=like.device, dtype=like.dtype) * dilation


def _check(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
) -> None:
    if min(stride, dilation) < 1 or padding < 0:
        raise misfit(
            f"{_NAME}: stride and dilation must be at least 1 and padding at least 0",
            f"stride {stride}, dilation {dilation}, padding {padding}",
            "Were the arguments given in another order?",
        )
    tensors = {"input": input, "offset": offset, "mask": mask, "weight": weight}
    for name, tensor in tensors.items():
        layout = "channels_out channels rows columns" if name == "weight" else "batch channels height width"
        require_dimensions(_NAME, name, tensor, layout)
    require_fitting_types(_NAME, tensors)
    batch, channels, height, width = input.shape
    side = weight.shape[-1]
    if weight.shape[1] != channels or weight.shape[2] != side or side < 1:
        raise misfit(
            f"{_NAME}: weight must be (channels out, {channels}, side, side) for input {tuple(input.shape)}",
            f"{tuple(weight.shape)}",
            "Is it the kernel of another layer, or one with groups?",
        )
    out_height = output_size(height, side, stride, padding, dilation)
    out_width = output_size(width, side, stride, padding, dilation)
    if min(height, width, out_height, out_width) <= 0:
        raise misfit(
            f"{_NAME}: the padded input must be at least as large as the dilated kernel "
            f"({dilation * (side - 1) + 1} cells)",
            f"input {tuple(input.shape)} with padding {padding}",
            "Is the image too small for this stage?",
        )
    groups = mask.shape[1] // (side * side)
    expected = (batch, groups * side * side, out_height, out_width)
    if groups < 1 or mask.shape != expected or channels % groups:
        raise misfit(
            f"{_NAME}: mask must have shape ({batch}, groups * {side * side}, {out_height}, {out_width}) "
            f"with groups that divide the {channels} channels",
            f"{tuple(mask.shape)}",
            "Do stride, padding and dilation match the layer that made it?",
        )
    if offset.shape != (batch, 2 * expected[1], *expected[2:]):
        raise misfit(
            f"{_NAME}: offset must have shape {(batch, 2 * expected[1], *expected[2:])} for this mask",
            f"{tuple(offset.shape)}",
            "Are offset and mask two thirds and one third of the same layer's output?",
        )
