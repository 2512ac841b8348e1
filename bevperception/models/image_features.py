"""Image features: backbone and neck over the cameras that are present."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bevperception.models.image_padding import pad_images
from bevperception.models.selection import all_true, select_rows
from bevperception.structures import CameraFrames

ImageNetwork = Callable[[Tensor], list[Tensor]]
"""(M, 3, H, W) images to feature maps (M, C, h, w), one a level."""


def encode_images(network: ImageNetwork, frames: CameraFrames, size_divisor: int) -> list[Tensor]:
    """Compute the feature maps of all cameras.

    The pixels of a missing camera are never used; its features are zeros.

    Args:
        network: backbone and neck.
        frames: images (B, N, 3, H, W) of any size.
        size_divisor: images are padded at the bottom and the right to a multiple of this many pixels.

    Returns:
        per level (B, N, C, h, w), where h and w are those of the padded images.
    """
    batch, cameras = frames.images.shape[:2]
    # (B, N, 3, H, W) -> (B*N, 3, padded H, padded W)
    images = pad_images(frames.images.flatten(0, 1), size_divisor)
    mask = frames.camera_mask
    if mask is None or all_true(mask):
        maps = network(images)
    else:
        maps = _encode_present(network, images, mask.flatten())  # (B, N) -> (B*N,)
    # (B*N, C, h, w) -> (B, N, C, h, w)
    return [level.unflatten(0, (batch, cameras)) for level in maps]


def _encode_present(network: ImageNetwork, images: Tensor, present: Tensor) -> list[Tensor]:
    """Maps (M, C, h, w) of M images, zeros where ``present`` (M,) is False."""
    selected = select_rows(present)
    if not selected.index.numel():
        # Shapes and device still come from a forward; nothing of its values is used.
        blank = network(torch.zeros_like(images[:1]))
        return [torch.zeros_like(level).expand(len(images), -1, -1, -1) for level in blank]
    maps = network(selected.zero_rest(images[selected.index]))
    return [
        level.new_zeros(len(images), *level.shape[1:]).index_copy(
            0, selected.index, selected.zero_rest(level)
        )
        for level in maps
    ]
