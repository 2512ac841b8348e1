"""Image files: reduced decoding, and damage that OpenCV does not report."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from bevperception.data import images
from bevperception.data.images import decode_image, image_size, is_complete_jpeg, read_image, reduction_for
from bevperception.errors import DataError


def gradient(width: int = 64, height: int = 48) -> np.ndarray:
    columns = np.linspace(0, 255, width)[None, :, None]
    rows = np.linspace(0, 255, height)[:, None, None]
    return np.concatenate((columns + 0 * rows, rows + 0 * columns, 128 + 0 * (rows + columns)), -1).astype(
        np.uint8
    )


@pytest.fixture
def jpeg(tmp_path: Path) -> Path:
    path = tmp_path / "image.jpg"
    cv2.imwrite(str(path), gradient(), [cv2.IMWRITE_JPEG_QUALITY, 98])
    return path


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_decodes_at_reduced_scale(jpeg: Path, reduction: int) -> None:
    image = read_image(jpeg, (64, 48), reduction)
    assert image.shape == (48 // reduction, 64 // reduction, 3)
    expected = cv2.resize(gradient(), (64 // reduction, 48 // reduction), interpolation=cv2.INTER_AREA)
    assert np.abs(image.astype(float) - expected).mean() < 3


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((1600, 900), (800, 450), 2),
        ((1600, 900), (801, 451), 1),
        ((1600, 900), (400, 225), 4),
        ((1600, 900), (200, 112), 4),  # 900 is no multiple of 8
        ((1600, 896), (200, 112), 8),
        ((1599, 900), (200, 112), 1),
        ((1600, 900), (1600, 900), 1),
        ((1600, 900), (2400, 1350), 1),
    ],
)
def test_reduction_never_goes_below_the_target(
    size: tuple[int, int], target: tuple[int, int], expected: int
) -> None:
    assert reduction_for(size, target) == expected


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95, 0.999])
def test_truncation_is_seen(jpeg: Path, share: float) -> None:
    data = jpeg.read_bytes()
    jpeg.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"truncated: no end-of-image marker|cannot be decoded"):
        read_image(jpeg, (64, 48))


def test_a_zeroed_tail_is_seen(jpeg: Path) -> None:
    data = jpeg.read_bytes()
    half = len(data) // 2
    jpeg.write_bytes(data[:half] + bytes(len(data) - half))
    with pytest.raises(DataError, match="truncated"):
        read_image(jpeg, (64, 48))


def test_an_embedded_previews_end_does_not_count(jpeg: Path) -> None:
    data = jpeg.read_bytes()
    preview = b"Exif\0\0" + data
    segment = b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview
    whole = data[:2] + segment + data[2:]
    assert is_complete_jpeg(whole)
    assert not is_complete_jpeg(whole[:-40])


def test_bytes_after_the_end_are_allowed(jpeg: Path) -> None:
    jpeg.write_bytes(jpeg.read_bytes() + b"\0" * 100)
    assert read_image(jpeg, (64, 48)).shape == (48, 64, 3)


def test_progressive_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "progressive.jpg"
    cv2.imwrite(str(path), gradient(), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    assert read_image(path, (64, 48), 2).shape == (24, 32, 3)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match="truncated"):
        read_image(path, (64, 48))


def test_missing_empty_foreign_and_wrong_size(tmp_path: Path, jpeg: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jpg: No such file"):
        read_image(tmp_path / "absent.jpg", (64, 48))
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path / "empty.jpg", (64, 48))
    (tmp_path / "text.jpg").write_text("no image at all")
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path / "text.jpg", (64, 48))
    with pytest.raises(DataError, match=r"64x48 pixels where .* promises 1600x900"):
        read_image(jpeg, (1600, 900))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def claiming_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says that it is of any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def claiming_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header says that it is of any size."""
    data = bytearray(cv2.imencode(".jpg", gradient())[1].tobytes())
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("claiming", [claiming_png, claiming_jpeg])
@pytest.mark.parametrize("promised", [(30000, 30000), (64, 48)])
def test_what_claims_to_be_huge_is_refused_before_it_is_decoded(
    claiming: Any, promised: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*arguments: object) -> None:
        raise AssertionError("an image of 2.7 GB was about to be decoded")

    monkeypatch.setattr(images.cv2, "imdecode", decode)
    message = "has 30000x30000 pixels where" if promised == (64, 48) else "claims 30000x30000 pixels, more"
    with pytest.raises(DataError, match=message):
        decode_image(claiming(30000, 30000), promised, 1, "x")


@pytest.mark.parametrize("ending", [".jpg", ".png", ".bmp", ".webp", ".tiff"])
@pytest.mark.parametrize("size", [(64, 48), (1, 7), (33, 5)])
def test_the_size_is_read_from_every_kind_of_file(ending: str, size: tuple[int, int]) -> None:
    data = cv2.imencode(ending, gradient(*size))[1].tobytes()
    assert image_size(data) == size
    assert decode_image(data, size, 1, "x").shape == (size[1], size[0], 3)


def test_the_size_of_progressive_and_embedded_jpegs_is_their_own() -> None:
    preview, outer = io.BytesIO(), io.BytesIO()
    picture = Image.fromarray(gradient(33, 21))
    picture.resize((8, 8)).save(preview, "JPEG")
    picture.save(outer, "JPEG", progressive=True)
    data = outer.getvalue()
    comment = b"\xff\xe1" + struct.pack(">H", len(preview.getvalue()) + 2) + preview.getvalue()
    assert image_size(data) == image_size(data[:2] + comment + data[2:]) == (33, 21)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xc0\x00\x11\x08",
        b"\x89PNG\r\n\x1a\n",
        b"\x89PNG\r\n\x1a\nabcdefghijklmnop",
        b"text",
    ],
)
def test_what_says_no_size_is_no_image(data: bytes) -> None:
    assert image_size(data) is None
    with pytest.raises(DataError):
        decode_image(data, (64, 48), 1, "x")


@pytest.mark.parametrize("filling", [b"\xff", b"\xff\xe0\x00\x02"])
def test_a_jpeg_of_nothing_but_empty_segments_is_given_up(filling: bytes) -> None:
    end = b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", 48, 64)
    assert image_size(b"\xff\xd8" + filling * 4000 + end) == (64, 48)
    assert image_size(b"\xff\xd8" + filling * 5000 + end) is None  # millions would take minutes


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large"])
def test_only_regular_files_of_bounded_size_are_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"1" * 1001)
        monkeypatch.setattr(images, "MOST_BYTES", 1000)
    wanted = {"folder": "a folder", "large": "1001 bytes, more than the 1000"}.get(kind, "a pipe or a device")
    with pytest.raises(DataError, match=wanted):
        read_image(path, (64, 48))
