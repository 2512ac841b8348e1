"""Convert camera images to the network's input, alike in training, in evaluation and on the vehicle."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bevperception.config import DataConfig
from bevperception.data.images import reduction_for
from bevperception.data.published_v2 import cut_and_resize, plan_v2
from bevperception.data.transforms import Colour, ImageDraw, ImageFit
from bevperception.errors import ConfigError
from bevperception.structures import CameraFrames

PUBLISHED_DIVISOR = 32
"""The published pipeline pads images to a multiple of this."""


class ImageInput:
    """Resizes, cuts or pads, jitters and normalises images as a configuration says.

    Args:
        config: image_size, image_mean, image_std, channel_order and image_transform are used.
    """

    def __init__(self, config: DataConfig) -> None:
        self._published = config.image_transform == "published"
        self._published_v2 = config.image_transform == "published_v2"
        self._to_rgb = config.channel_order == "rgb"
        order = 1 if self._to_rgb else -1
        self._mean = torch.tensor(config.image_mean[::order], dtype=torch.float32)[:, None, None]
        self._scale = 1.0 / torch.tensor(config.image_std[::order], dtype=torch.float32)[:, None, None]
        self._mean_std = (np.array(config.image_mean[::order]), np.array(config.image_std[::order]))
        height, width = config.image_size
        self.size = (width, height)

    def plan(self, source: tuple[int, int], draw: ImageDraw | None = None) -> ImageFit:
        """Plan the resize, cut and padding of an image of this size.

        Args:
            source: (width, height) of the image file or camera.
            draw: geometric augmentation; None for none.

        Raises:
            ConfigError: if the published transform cannot give the configured size, or is to be augmented.
        """
        if self._published_v2:
            return plan_v2(source, self.size, draw or ImageDraw(crop_left=0.0, crop_top=0.0))
        if not self._published:
            return ImageFit.plan(source, self.size, draw or ImageDraw())
        if draw not in (None, ImageDraw()):
            raise ConfigError(
                "data.image_transform=published knows no resize, crop or flip augmentation\n"
                "use image_transform=fast, or set augmentation.resize=[1,1], crop=0, image_flip=0"
            )
        return _published_fit(source, self.size)

    @property
    def keeps_pixels(self) -> bool:
        """Whether images can be had as pixels, to be normalised later by :meth:`normalise`."""
        return not (self._published or self._published_v2)

    def normalise(self, frames: CameraFrames) -> CameraFrames:
        """Normalise images of frames that are pixels yet, to float32.

        Args:
            frames: (B, N, 3, H, W) images, uint8 pixels or normalised already; on any device.
        """
        if frames.images.is_floating_point():
            return frames
        mean, scale = (x.to(frames.images.device, non_blocking=True) for x in (self._mean, self._scale))
        return replace(frames, images=frames.images.float().sub_(mean).mul_(scale))

    def blot(self, images: Tensor, mask: Tensor) -> Tensor:
        """Fill images or pixels (..., 3, H, W) with the mean colour where ``mask`` (H, W) is 0."""
        if images.is_floating_point():
            return images * mask
        return torch.where(mask > 0, images, self._mean.round().to(images.dtype))

    def reduction(self, fit: ImageFit) -> int:
        """1, 2, 4 or 8: the fraction of its size that the image may be decoded at for this fit."""
        return 1 if self._published or self._published_v2 else reduction_for(fit.source, fit.resized)

    def write(
        self, image: NDArray[np.uint8], fit: ImageFit, out: Tensor, colour: Colour | None = None
    ) -> None:
        """Write one camera's image into the network's input.

        Args:
            image: (height, width, 3) BGR as decoded, full size or reduced by :meth:`reduction`.
            fit: from :meth:`plan`.
            out: (3, height, width) of the input's size, written in place: float32 zeros, whose padding stays
                zero, which is the mean colour; or uint8 where :attr:`keeps_pixels`.
            colour: colour jitter; None for none.
        """
        jitter = colour or Colour()
        if self._published:
            scale = fit.target[0] / fit.source[0]
            mean, std = self._mean_std
            padded, _ = published_image(
                jitter.apply(image), mean, std, self._to_rgb, scale, PUBLISHED_DIVISOR
            )
            out.copy_(torch.from_numpy(padded).permute(2, 0, 1))
            return
        if self._published_v2:
            resized = cut_and_resize(jitter.apply(image), fit.cut_top, fit.resized)
        else:
            resized = jitter.apply(fit.resize(image))
        if self._to_rgb:
            resized = np.asarray(cv2.cvtColor(resized, cv2.COLOR_BGR2RGB), dtype=np.uint8)
        planes = torch.from_numpy(resized).permute(2, 0, 1)
        fit.place(planes, out, self._mean, self._scale)


def _published_fit(source: tuple[int, int], target: tuple[int, int]) -> ImageFit:
    scale = target[0] / source[0]
    resized = (int(source[0] * scale), int(source[1] * scale))
    padded = tuple(-(-side // PUBLISHED_DIVISOR) * PUBLISHED_DIVISOR for side in resized)
    if padded != target:
        raise ConfigError(
            f"data.image_transform=published makes {padded[1]}x{padded[0]} (height x width) of a "
            f"{source[1]}x{source[0]} image, but data.image_size is {target[1]}x{target[0]}\n"
            f"set data.image_size to [{padded[1]}, {padded[0]}]"
        )
    return ImageFit(source, resized, target, 0, 0, False)


def published_image(
    image: NDArray[np.uint8],
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    to_rgb: bool,
    scale: float,
    divisor: int = PUBLISHED_DIVISOR,
) -> tuple[NDArray[np.float32], Tensor]:
    """The published BEVFormer's order: normalise in float, resize bilinearly, pad with zeros.

    Source: BEVFormer, datasets/pipelines/transform_3d.py (NormalizeMultiviewImage,
    RandomScaleImageMultiViewImage, PadMultiViewImage). The size is rounded down and the matrix holds the
    nominal scale, as there.

    Args:
        image: (height, width, 3) BGR.
        mean, std: (3,) in the output's channel order, for values 0 to 255.
        to_rgb: turn BGR into RGB.
        scale: of both sides.
        divisor: pad bottom and right to a multiple of this.

    Returns:
        (padded height, padded width, 3) float32;
        (4, 4) float64 homogeneous pixels of the image to those of the result.
    """
    pixels = image.astype(np.float32)
    if to_rgb:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)  # type: ignore[assignment]
    pixels = cv2.subtract(pixels, np.asarray(mean, dtype=np.float64).reshape(1, -1))  # type: ignore[assignment]
    pixels = cv2.multiply(pixels, 1.0 / np.asarray(std, dtype=np.float64).reshape(1, -1))  # type: ignore[assignment]
    width, height = int(image.shape[1] * scale), int(image.shape[0] * scale)
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)  # type: ignore[assignment]
    bottom, right = -height % divisor, -width % divisor
    padded = np.pad(pixels, ((0, bottom), (0, right), (0, 0)))
    return padded, torch.diag(torch.tensor([scale, scale, 1.0, 1.0], dtype=torch.float64))
