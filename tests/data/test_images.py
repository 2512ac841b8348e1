"""Image files: reduced decoding, and damage that OpenCV does not report."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from bevperception.data.images import is_complete_jpeg, read_image, reduction_for
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
