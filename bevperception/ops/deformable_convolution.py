"""Deformable convolution v3: the operator's Python face and its reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from bevperception.ops.backend import Backend, choose_backend
from bevperception.ops.checks import (
    misfit,
    require_dimensions,
    require_fitting_types,
    working_copies,
)

_NAME = "dcnv3"


def dcnv3(
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
    """Sum, for every output cell and group, K points of the map sampled around the cell.

    The K = kernel_size**2 (minus the centre, if removed) points lie on a dilated square grid, moved by
    ``offset`` cells; ``offset_scale`` multiplies the grid and the offset. They are ordered column by
    column: the kernel's x in the outer loop, its y in the inner. Sampling is bilinear with zeros
    outside the map; an offset that is not finite samples zero.

    Source: InternImage (Wang et al., CVPR 2023), section 3.1, equation 2.

    Args:
        input: (N, H, W, groups*Cg) feature map, channels last.
        offset: (N, Ho, Wo, groups*K*2), ordered group, point, (x, y), in cells.
        mask: (N, Ho, Wo, groups*K) modulation, already normalised over K.
        kernel_size: side of the square kernel.
        stride: output cells lie this many input cells apart.
        padding: cells by which the outermost kernels reach over the border, undilated.
        dilation: cells between neighbouring kernel points.
        groups: channel groups with their own offsets and mask.
        offset_scale: multiplies the kernel's grid and the offset.
        remove_center: leave the kernel's centre point out; the kernel must be odd.

    Returns:
        (N, Ho, Wo, groups*Cg) in the dtype of ``input``. The work is done in float64 for float64
        tensors and in float32 otherwise; under autocast the result is float32.

    Raises:
        ValueError: shapes, dtypes, devices or settings do not fit together.
        ConfigError: the native backend was asked for and is not available.
    """
    _check(input, offset, mask, kernel_size, stride, padding, dilation, groups, remove_center)
    result_dtype = torch.float32 if torch.is_autocast_enabled(input.device.type) else input.dtype
    is_native = choose_backend(_NAME, input.device) is Backend.NATIVE
    input, offset, mask = working_copies(input, offset, mask, keep_half=is_native and input.is_cuda)
    if is_native:
        kernel = (kernel_size, stride, padding, dilation, groups)
        output: Tensor = torch.ops.bevperception.dcnv3(
            input, offset, mask, *kernel, float(offset_scale), remove_center
        )
    else:
        output = dcnv3_reference(
            input,
            offset,
            mask,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            offset_scale=offset_scale,
            remove_center=remove_center,
        )
    return output if output.dtype == result_dtype else output.to(result_dtype)


def dcnv3_reference(
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
    """:func:`dcnv3` in plain PyTorch: one ``grid_sample`` over all groups and points.

    Args and result as there; all tensors must share one dtype, float32 or float64.
    """
    batch, height, width, channels = input.shape
    out_height, out_width = offset.shape[1:3]
    points, cells = kernel_size**2 - remove_center, out_height * out_width

    def centres(count: int) -> Tensor:
        """Input coordinate of the kernel centre of each output cell on one axis."""
        reach = dilation * (kernel_size - 1) // 2
        return torch.arange(count, device=input.device, dtype=input.dtype) * stride - padding + reach

    taps = torch.arange(kernel_size, device=input.device, dtype=input.dtype) * dilation
    taps = taps - dilation * (kernel_size - 1) // 2
    grid_x, grid_y = torch.meshgrid(taps, taps, indexing="ij")  # x outer, y inner
    grid = torch.stack([grid_x, grid_y], dim=-1).flatten(0, 1)  # (k*k, 2)
    if remove_center:
        grid = torch.cat([grid[: points // 2], grid[points // 2 + 1 :]])
    centre_y, centre_x = torch.meshgrid(centres(out_height), centres(out_width), indexing="ij")
    # (Ho, Wo, 2) -> (1, Ho*Wo, 1, 1, 2)
    centre = torch.stack([centre_x, centre_y], dim=-1).reshape(1, cells, 1, 1, 2)
    # (B, Ho, Wo, G*P*2) -> (B, Ho*Wo, G, P, 2)
    moved = (offset.reshape(batch, cells, groups, points, 2) + grid) * offset_scale
    size = torch.tensor([width, height], device=input.device, dtype=input.dtype)
    locations = (2 * (centre + moved) + 1) / size - 1  # grid_sample's -1 to 1
    # grid_sample would return NaN; -3 is well outside the map, where it returns zero.
    locations = torch.where(locations.isfinite(), locations, -3.0)

    # (B, H, W, C) -> (B, G, C/G, H, W)
    maps = input.reshape(batch, height, width, groups, channels // groups).permute(0, 3, 4, 1, 2)
    sampled = grid_sample(
        # (B, G, C/G, H, W) -> (B*G, C/G, H, W)
        maps.reshape(batch * groups, channels // groups, height, width),
        # (B, Ho*Wo, G, P, 2) -> (B*G, Ho*Wo, P, 2)
        locations.transpose(1, 2).reshape(batch * groups, cells, points, 2),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )  # (N*G, Cg, cells, K)
    # (B, Ho, Wo, G*P) -> (B, G, Ho*Wo, P)
    weights = mask.reshape(batch, cells, groups, points).transpose(1, 2)
    output = (sampled * weights.reshape(batch * groups, 1, cells, points)).sum(-1)  # (N*G, Cg, cells)
    # (B*G, C/G, Ho*Wo) -> (B, Ho, Wo, C)
    return output.view(batch, channels, cells).transpose(1, 2).reshape(batch, out_height, out_width, channels)


def output_size(size: int, kernel_size: int, stride: int, padding: int, dilation: int) -> int:
    """Cells of the output along an axis that has ``size`` cells in the input."""
    return (size + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1


def _check(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    remove_center: bool,
) -> None:
    _check_settings(kernel_size, stride, padding, dilation, groups, remove_center)
    for name, tensor in (("input", input), ("offset", offset), ("mask", mask)):
        require_dimensions(_NAME, name, tensor, "batch height width channels")
    require_fitting_types(_NAME, {"input": input, "offset": offset, "mask": mask})
    batch, height, width, channels = input.shape
    if channels % groups != 0:
        raise misfit(
            f"{_NAME}: the input's channels must be a multiple of groups",
            f"{channels} channels and {groups} groups",
            "Is the input channels last (N, H, W, C)?",
        )
    out_height = output_size(height, kernel_size, stride, padding, dilation)
    out_width = output_size(width, kernel_size, stride, padding, dilation)
    if min(height, width, out_height, out_width) <= 0:
        raise misfit(
            f"{_NAME}: the padded input must be at least as large as the dilated kernel "
            f"({dilation * (kernel_size - 1) + 1} cells)",
            f"input {tuple(input.shape)} with padding {padding}",
            "Is the image too small for this stage, or the input not channels last?",
        )
    points = kernel_size**2 - remove_center
    for name, tensor, numbers in (("offset", offset, 2), ("mask", mask, 1)):
        expected = (batch, out_height, out_width, groups * points * numbers)
        if tensor.shape != expected:
            raise misfit(
                f"{_NAME}: {name} must have shape {expected} (batch, output height, output width, "
                f"groups * {points} points{' * 2' if numbers == 2 else ''})",
                f"{tuple(tensor.shape)} for input {tuple(input.shape)}",
                "Do stride, padding, dilation, groups and remove_center match the layer that made it?",
            )


def _check_settings(
    kernel_size: int, stride: int, padding: int, dilation: int, groups: int, remove_center: bool
) -> None:
    if min(kernel_size, stride, dilation, groups) < 1 or padding < 0:
        raise misfit(
            f"{_NAME}: kernel_size, stride, dilation and groups must be at least 1 and padding at least 0",
            f"kernel_size {kernel_size}, stride {stride}, dilation {dilation}, groups {groups}, "
            f"padding {padding}",
            "Were the arguments given in another order?",
        )
    if remove_center and (kernel_size % 2 == 0 or kernel_size == 1):
        raise misfit(
            f"{_NAME}: remove_center needs an odd kernel_size of at least 3",
            f"kernel_size {kernel_size}",
            "An even kernel has no centre point.",
        )
