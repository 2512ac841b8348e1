"""Read image files, at reduced scale where that is enough; damaged files are errors."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from bevperception.errors import DataError
from bevperception.names import read_file

_JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_JPEG_SCAN = 0xDA
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the segments that give the size: every kind of start of frame."""
_PNG_START = b"\x89PNG\r\n\x1a\n"
_MOST_SEGMENTS = 4096
MOST_PIXELS: Final = 2**26
"""Of an image, 8192 x 8192: several times those of any camera of a car."""
MOST_BYTES: Final = 2**28
"""Of an image file."""
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
    scan = next((place for marker, place in _jpeg_segments(data) if marker == _JPEG_SCAN), None)
    return scan is not None and data.rfind(_JPEG_END) > scan


def image_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) that an image file says it has, without decoding it; None if it says nothing.

    A small file can claim sizes whose pixels fill the memory, so this is asked first.

    Args:
        data: JPEG, PNG, or any other format that Pillow knows.
    """
    if data.startswith(_JPEG_START):
        place = next((place for marker, place in _jpeg_segments(data) if marker in _JPEG_FRAMES), None)
        if place is None or place + 9 > len(data):
            return None
        height, width = struct.unpack_from(">HH", data, place + 5)
        return width, height
    if data.startswith(_PNG_START):
        if len(data) < 24 or data[12:16] != b"IHDR":
            return None
        width, height = struct.unpack_from(">II", data, 16)
        return width, height
    return _other_size(data)


def _other_size(data: bytes) -> tuple[int, int] | None:
    from PIL import Image  # only for rare formats

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                return width, height
    except Exception:  # Pillow's parsers meet damaged data with errors of many types
        return None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, position of its 0xff) of a JPEG's segments, up to the start of the scan."""
    position = len(_JPEG_START)
    for _ in range(_MOST_SEGMENTS):  # millions of empty ones would take minutes
        if not data.startswith(_JPEG_START) or position + 4 > len(data) or data[position] != 0xFF:
            return
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        yield marker, position
        if marker == _JPEG_SCAN:
            return
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


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
        DataError: if it is missing, no regular file, truncated, not an image, of another size or too large.
    """
    data = read_file(path, MOST_BYTES, f"image {path}")
    return decode_image(data, size, reduction, str(path))


def check_claimed_size(claimed: tuple[int, int], wanted: tuple[int, int] | None, name: str) -> None:
    """Refuse to decode an image of another size than it should have, or of too many pixels.

    Args:
        claimed: (width, height), see :func:`image_size`.
        wanted: (width, height); None if any will do.
        name: what messages call the image.

    Raises:
        DataError: as said.
    """
    if wanted is not None and claimed != wanted:
        raise DataError(
            f"image {name} has {claimed[0]}x{claimed[1]} pixels where its calibration promises "
            f"{wanted[0]}x{wanted[1]}: its projection would be wrong"
        )
    if claimed[0] * claimed[1] > MOST_PIXELS:
        raise DataError(
            f"image {name} claims {claimed[0]}x{claimed[1]} pixels, more than the {MOST_PIXELS} allowed: "
            "decoding it would fill the memory"
        )


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
        DataError: if the data is truncated, not an image, of another size or too large.
    """
    if data.startswith(_JPEG_START) and not is_complete_jpeg(data):
        raise DataError(f"image {name} is truncated: no end-of-image marker in its {len(data)} bytes")
    claimed = image_size(data)
    image = None
    if claimed is not None:
        check_claimed_size(claimed, size, name)
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
