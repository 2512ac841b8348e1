"""Reading image files: at reduced scale where that is enough, and never silently damaged."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from bevperception.errors import DataError

_JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_JPEG_SCAN = 0xDA
_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def is_complete_jpeg(data: bytes) -> bool:
    """Whether JPEG data runs through to its end-of-image marker.

    OpenCV decodes a truncated file without a word and leaves the rest grey. Inside the compressed scan
    a marker cannot occur by chance (0xff is followed by 0 there), so a file is complete when the end
    marker stands behind the start of the scan; one inside an embedded preview does not count.

    Args:
        data: the file's bytes.
    """
    if not data.startswith(_JPEG_START):
        return False
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            return False
        if data[position + 1] == 0xFF:  # fill byte
            position += 1
            continue
        if data[position + 1] == _JPEG_SCAN:
            return data.rfind(_JPEG_END) > position
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def reduction_for(size: tuple[int, int], target: tuple[int, int]) -> int:
    """The largest of 1, 2, 4, 8 that an image can be divided by exactly without going below a target.

    Args:
        size: (width, height) of the image file.
        target: (width, height) that it will be resized to.
    """
    for factor in (8, 4, 2):
        if all(s % factor == 0 and s // factor >= t for s, t in zip(size, target, strict=True)):
            return factor
    return 1


def read_image(path: Path, size: tuple[int, int], reduction: int = 1) -> NDArray[np.uint8]:
    """Decode an image file.

    Args:
        path: JPEG, or any other format that OpenCV reads.
        size: (width, height) that the tables promise; the calibration belongs to it.
        reduction: 1, 2, 4 or 8: decode at this fraction of the size (see :func:`reduction_for`).

    Returns:
        (height / reduction, width / reduction, 3) BGR.

    Raises:
        DataError: if the file is missing, truncated, not an image, or of another size.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read image {path}: {error.strerror}") from error
    return decode_image(data, size, reduction, str(path))


def decode_image(data: bytes, size: tuple[int, int], reduction: int, name: str) -> NDArray[np.uint8]:
    """Decode an image file's bytes.

    Args:
        data: JPEG, or any other format that OpenCV reads.
        size: (width, height) that the tables or the camera promise; the calibration belongs to it.
        reduction: 1, 2, 4 or 8: decode at this fraction of the size (see :func:`reduction_for`).
        name: what messages call the image.

    Returns:
        (height / reduction, width / reduction, 3) BGR.

    Raises:
        DataError: if the data is truncated, not an image, or of another size.
    """
    if data.startswith(_JPEG_START) and not is_complete_jpeg(data):
        raise DataError(f"image {name} is truncated: no end-of-image marker in its {len(data)} bytes")
    image = None
    if data:
        flags = _REDUCED[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    if image is None:
        raise DataError(f"image {name} cannot be decoded; it is damaged or not an image ({len(data)} bytes)")
    expected = (size[1] // reduction, size[0] // reduction)
    if image.shape[:2] != expected:
        raise DataError(
            f"image {name} decodes to {image.shape[1]}x{image.shape[0]} pixels where its calibration "
            f"promises {expected[1]}x{expected[0]} (at 1/{reduction} scale): its projection would be wrong"
        )
    return np.asarray(image, dtype=np.uint8)
