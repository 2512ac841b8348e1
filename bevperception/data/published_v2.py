"""Make the network's input of an image as the published BEVFormer v2 does.

Source: CropResizeFlipImage of BEVFormer, datasets/pipelines/augmentation.py: the top of the image is cut
off, the rest resized bicubically by Pillow. Where the published code mirrors pixels, leaves the matrices
alone and mirrors the features back, here the matrices move with the pixels: the BEV sees the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bevperception.data.transforms import ImageDraw, ImageFit


def plan_v2(source: tuple[int, int], target: tuple[int, int], draw: ImageDraw) -> ImageFit:
    """Fit the input's width; the surplus height is cut off the top before the resize.

    Args:
        source: (width, height) of the image file.
        target: (width, height) of the input.
        draw: augmentation on top of that: where the image becomes larger than the input a part is taken,
            where it becomes smaller it is padded at the right and the bottom.
    """
    height = min(source[1], round(source[0] * target[1] / target[0]))
    width_after = int(target[0] * draw.resize)
    height_after = int(target[0] * draw.resize / source[0] * height + 1e-6)
    left = round(draw.crop_left * max(0, width_after - target[0]))
    top = round(draw.crop_top * max(0, height_after - target[1]))
    return ImageFit(
        source, (width_after, height_after), target, left, top, draw.flip, cut_top=source[1] - height
    )


def cut_and_resize(image: NDArray[np.uint8], cut_top: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Rows from ``cut_top`` on, resized bicubically with Pillow's antialiasing.

    Args:
        image: (height, width, 3).
        cut_top: rows cut off.
        size: (width, height) of the result.
    """
    return np.asarray(Image.fromarray(image[cut_top:]).resize(size, Image.Resampling.BICUBIC))
