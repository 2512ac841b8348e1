"""Decode camera images as ROS messages carry them, and find frozen and black ones."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from bevperception.data.images import decode_image
from bevperception.errors import DataError

_TO_BGR: Final[dict[str, tuple[int, int | None]]] = {
    "bgr8": (3, None),
    "8UC3": (3, None),
    "rgb8": (3, cv2.COLOR_RGB2BGR),
    "bgra8": (4, cv2.COLOR_BGRA2BGR),
    "rgba8": (4, cv2.COLOR_RGBA2BGR),
    "mono8": (1, cv2.COLOR_GRAY2BGR),
    "8UC1": (1, cv2.COLOR_GRAY2BGR),
}
"""Encodings of sensor_msgs/Image that are understood: bytes a pixel, conversion to BGR."""

_DIGEST_BYTES = 65536


class ImageFault(DataError):
    """A camera image cannot be used; the message says why."""


@dataclass(frozen=True)
class CameraImage:
    """One image message of one camera.

    Attributes:
        channel: for example CAM_FRONT.
        stamp_ns: time of exposure.
        arrived_s: when it arrived, monotonic clock.
        data: bytes of a JPEG or PNG file, or of the pixels.
        encoding: of the pixels (rgb8, bgr8, mono8, bgra8, ...); None for compressed images.
        width, height: in pixels; 0 for compressed images, whose files say it.
        step: bytes from one row to the next; 0 for compressed images.
        frame_id: of the header.
    """

    channel: str
    stamp_ns: int
    arrived_s: float
    data: Any
    encoding: str | None = None
    width: int = 0
    height: int = 0
    step: int = 0
    frame_id: str = ""


def decode(image: CameraImage, size: tuple[int, int], reduction: int = 1) -> NDArray[np.uint8]:
    """Decode the pixels of an image message.

    Args:
        image: compressed or raw.
        size: (width, height) that the camera's calibration belongs to.
        reduction: 1, 2, 4 or 8: compressed images are decoded at this fraction of their size; raw images
            have all their pixels already and keep them.

    Returns:
        (height, width, 3) BGR, compressed images divided by ``reduction``.

    Raises:
        ImageFault: if it is truncated, of another size or in an unknown encoding.
    """
    if image.encoding is not None:
        return _raw_pixels(image, size)
    try:
        return decode_image(bytes(image.data), size, reduction, f"of {image.channel}")
    except DataError as error:
        raise ImageFault(str(error)) from error


def _raw_pixels(image: CameraImage, size: tuple[int, int]) -> NDArray[np.uint8]:
    if image.encoding not in _TO_BGR:
        known = ", ".join(_TO_BGR)
        raise ImageFault(f"encoding {image.encoding!r} is not understood; {known} are")
    if (image.width, image.height) != size:
        raise ImageFault(
            f"the image has {image.width}x{image.height} pixels where the calibration belongs to "
            f"{size[0]}x{size[1]}"
        )
    channels, conversion = _TO_BGR[image.encoding]
    step = image.step or image.width * channels
    flat = np.frombuffer(image.data, dtype=np.uint8)
    if step < image.width * channels or flat.size < step * (image.height - 1) + image.width * channels:
        raise ImageFault(
            f"the image is truncated: {flat.size} bytes for {image.height} rows of {step} bytes "
            f"({image.width} pixels of {image.encoding})"
        )
    rows = np.lib.stride_tricks.as_strided(
        flat, (image.height, image.width, channels), (step, channels, 1), writeable=False
    )
    if conversion is None:
        return np.ascontiguousarray(rows)
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(rows), conversion), dtype=np.uint8)


def digest(image: CameraImage) -> int:
    """Hash an image; equal numbers mean (all but certainly) that the bytes looked at are equal.

    Compressed images count whole; of raw ones every so many-th byte, about 64 kB.
    """
    flat = np.frombuffer(image.data, dtype=np.uint8)
    if image.encoding is not None and flat.size > _DIGEST_BYTES:
        # An odd stride, so that every row and colour channel has its share.
        flat = np.ascontiguousarray(flat[:: flat.size // _DIGEST_BYTES | 1])
    return zlib.crc32(flat.data) ^ (flat.size << 32)


def is_black(image: NDArray[np.uint8], level: int) -> bool:
    """Whether nothing can be seen: at least 99 of 100 pixels are darker than a level (every 8th row, column).

    Args:
        image: (height, width, 3).
        level: in 0 to 255; 0 finds no image black.
    """
    dark = image[::8, ::8] < level
    every_channel = dark[..., 0] & dark[..., 1] & dark[..., 2]
    return bool(np.count_nonzero(every_channel) >= 0.99 * every_channel.size)
