"""Pad camera images so that every feature map has a whole number of cells.

A level of stride s has ceil(size / s) cells. Unless the size is a multiple of s, the last cell hangs over the
image's edge, and a fraction of the image's size is not the same fraction of the map. Padded to a multiple of
the coarsest stride, both are the same at every level.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def padded_size(size: tuple[int, int], divisor: int) -> tuple[int, int]:
    """Round a size up to multiples of the divisor.

    Args:
        size: (height, width) in pixels.
        divisor: at least 1.
    """
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width


def pad_images(images: Tensor, divisor: int) -> Tensor:
    """Pad images at the bottom and the right, as the published pipelines do.

    Args:
        images: (M, 3, H, W) normalised, so that the padding's zero is the mean colour.
        divisor: of the result's sides.

    Returns:
        (M, 3, padded H, padded W); the images themselves where nothing is missing.
    """
    height, width = images.shape[-2:]
    bottom, right = -height % divisor, -width % divisor
    if not (bottom or right):
        return images
    return functional.pad(images, (0, right, 0, bottom))
