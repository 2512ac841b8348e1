"""Image and BEV transforms: pixels, calibration and labels move together.

Image coordinates are continuous with pixel i covering [i, i + 1), as the model reads them (u / width in
[0, 1]): resizing by s gives u' = s u, a crop subtracts its offset, mirroring gives u' = width - u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bevperception.config import AugmentationConfig

_LUMA_BGR = (0.114, 0.587, 0.299)
"""ITU-R BT.601 weights of B, G and R."""


@dataclass(frozen=True)
class Colour:
    """One draw of colour jitter; 1 changes nothing.

    Attributes:
        brightness: factor on all values.
        contrast: factor on the distance from mid-grey.
        saturation: factor on the distance from the pixel's own grey.
    """

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Jitter an image.

        Args:
            image: (height, width, 3) BGR.

        Returns:
            the same shape, clipped to 0 to 255.
        """
        if self == Colour():
            return image
        mix = self.saturation * np.eye(3) + (1 - self.saturation) * np.array([_LUMA_BGR] * 3)
        linear = self.contrast * self.brightness * mix
        offset = np.full((3, 1), (1 - self.contrast) * 127.5)
        return np.asarray(cv2.transform(image, np.hstack((linear, offset))), dtype=np.uint8)


@dataclass(frozen=True)
class ImageDraw:
    """One draw of the geometric image augmentation; the default is the plain fit.

    Attributes:
        resize: scale on top of the one that fits the input's width.
        crop_left: share of the surplus width that is cut off at the left.
        crop_top: share of the surplus height that is cut off at the top.
        flip: mirror left and right.
    """

    resize: float = 1.0
    crop_left: float = 0.5
    crop_top: float = 1.0
    flip: bool = False


@dataclass(frozen=True)
class BEVDraw:
    """One draw of the BEV augmentation; the default changes nothing.

    Attributes:
        rotation_rad: turn about z, counter-clockwise.
        scale: uniform scale.
        flip_x, flip_y: mirror that axis.
    """

    rotation_rad: float = 0.0
    scale: float = 1.0
    flip_x: bool = False
    flip_y: bool = False

    def matrix(self) -> Tensor:
        """(4, 4) float64 BEV frame to augmented BEV frame: rotation first, then scale, then mirrors.

        Apply it to labels; ``bev_to_image`` and ``bev_to_global`` take its inverse from the right.
        """
        c, s = math.cos(self.rotation_rad), math.sin(self.rotation_rad)
        rotation = torch.eye(4, dtype=torch.float64)
        rotation[:2, :2] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
        mirror_x, mirror_y = (-1.0 if flip else 1.0 for flip in (self.flip_x, self.flip_y))
        diagonal = [mirror_x * self.scale, mirror_y * self.scale, self.scale, 1.0]
        return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) @ rotation


@dataclass(frozen=True)
class AugmentationDraw:
    """All random choices of one training sample, shared by every frame of its queue.

    Attributes:
        image: geometry of all cameras' images.
        colours: one a camera.
        bev: of the BEV frame.
    """

    image: ImageDraw
    colours: tuple[Colour, ...]
    bev: BEVDraw

    @classmethod
    def plain(cls, cameras: int) -> AugmentationDraw:
        """The draw that changes nothing."""
        return cls(ImageDraw(), (Colour(),) * cameras, BEVDraw())

    @classmethod
    def random(cls, config: AugmentationConfig, cameras: int, rng: np.random.Generator) -> AugmentationDraw:
        """Draw from the configured ranges; always the same number of draws, so settings do not interact.

        Args:
            config: ranges and probabilities.
            cameras: number of cameras.
            rng: source of all randomness.
        """
        resize, left, top, flip, rotation, scale, flip_x, flip_y = rng.random(8)
        colour = 1 + config.colour * rng.uniform(-1, 1, size=(cameras, 3))
        return cls(
            image=ImageDraw(
                resize=_between(config.resize, resize),
                crop_left=0.5 + config.crop * (left - 0.5),
                crop_top=1.0 - config.crop * top,
                flip=bool(flip < config.image_flip),
            ),
            colours=tuple(Colour(*(max(0.0, float(v)) for v in row)) for row in colour),
            bev=BEVDraw(
                rotation_rad=math.radians(config.bev_rotation_deg) * (2 * rotation - 1),
                scale=_between(config.bev_scale, scale),
                flip_x=bool(flip_x < config.bev_flip_x),
                flip_y=bool(flip_y < config.bev_flip_y),
            ),
        )


def _between(limits: tuple[float, float], share: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * float(share)


@dataclass(frozen=True)
class ImageFit:
    """How an image file becomes the network's input: resize, cut or pad, mirror.

    Attributes:
        source: (width, height) of the image file.
        resized: (width, height) after the resize.
        target: (width, height) of the input.
        left, top: pixels cut off the resized image; negative where padding is put instead.
        flip: mirror left and right at the end.
        cut_top: rows cut off the image file before the resize.
    """

    source: tuple[int, int]
    resized: tuple[int, int]
    target: tuple[int, int]
    left: int
    top: int
    flip: bool
    cut_top: int = 0

    @classmethod
    def plan(cls, source: tuple[int, int], target: tuple[int, int], draw: ImageDraw) -> ImageFit:
        """Fit the input's width; surplus height is cut at the top, missing height is padded at the bottom.

        Args:
            source: (width, height) of the image file.
            target: (width, height) of the input.
            draw: augmentation on top of that.
        """
        scale = target[0] / source[0] * draw.resize
        width, height = (max(1, round(side * scale)) for side in source)
        surplus_x, surplus_y = width - target[0], height - target[1]
        top = round(draw.crop_top * surplus_y) if surplus_y > 0 else 0
        return cls(source, (width, height), target, round(draw.crop_left * surplus_x), top, draw.flip)

    def matrix(self) -> Tensor:
        """(4, 4) float64 homogeneous pixels of the image file to those of the input."""
        matrix = torch.eye(4, dtype=torch.float64)
        matrix[0, 0] = self.resized[0] / self.source[0]
        matrix[1, 1] = self.resized[1] / (self.source[1] - self.cut_top)
        matrix[0, 2], matrix[1, 2] = -self.left, -self.top - self.cut_top * matrix[1, 1]
        if self.flip:
            mirror = torch.eye(4, dtype=torch.float64)
            mirror[0, 0], mirror[0, 2] = -1.0, self.target[0]
            matrix = mirror @ matrix
        return matrix

    def resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize an image file's pixels, decoded at full or reduced scale, to ``resized``.

        Args:
            image: (height, width, 3), ``source`` or an exact fraction of it.
        """
        if (image.shape[1], image.shape[0]) == self.resized:
            return image
        # Down to half the size bilinear sampling misses no pixel; below, area averaging (7 times slower).
        method = cv2.INTER_AREA if image.shape[1] > 2 * self.resized[0] else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(image, self.resized, interpolation=method), dtype=np.uint8)

    def place(self, resized: Tensor, out: Tensor, mean: Tensor, scale: Tensor) -> None:
        """Cut or pad a resized image into the input, mirror it, and normalise it unless pixels are wanted.

        Args:
            resized: (3, height, width) uint8 of ``resized``.
            out: (3, height, width) of ``target``, written in place: float32 zeros for normalised values, or
                uint8 for pixels, padded with the mean.
            mean, scale: (3, 1, 1); values become (value - mean) * scale.
        """
        (width, height), (out_width, out_height) = self.resized, self.target
        x0, x1 = max(self.left, 0), min(self.left + out_width, width)
        y0, y1 = max(self.top, 0), min(self.top + out_height, height)
        normalised = out.is_floating_point()
        if not normalised and (x1 - x0, y1 - y0) != self.target:
            out.copy_(mean.round())
        if x1 <= x0 or y1 <= y0:
            return
        part, column, row = resized[:, y0:y1, x0:x1], x0 - self.left, y0 - self.top
        if self.flip:
            part, column = part.flip(-1), out_width - column - (x1 - x0)
        window = out[:, row : row + y1 - y0, column : column + x1 - x0]
        window.copy_(part)
        if normalised:
            window.sub_(mean).mul_(scale)
