"""Image messages to pixels: every encoding, row strides, reduced scale, damage."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from bevperception.streaming.images import CameraImage, ImageFault, decode, digest, is_black

RNG = np.random.default_rng(0)
BGR = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
PACKED = {
    "bgr8": BGR,
    "rgb8": BGR[..., ::-1],
    "bgra8": np.dstack((BGR, np.full((6, 8), 7, np.uint8))),
    "rgba8": np.dstack((BGR[..., ::-1], np.full((6, 8), 7, np.uint8))),
}


def raw(pixels: np.ndarray, encoding: str, padding: int = 0, spare: int = 0) -> CameraImage:
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(pixels).reshape(height, -1)
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=99)
    data = padded.tobytes() + b"\x01" * spare
    return CameraImage("CAM", 0, 0.0, data, encoding, width, height, padded.shape[1])


@pytest.mark.parametrize("encoding", PACKED)
@pytest.mark.parametrize("padding", [0, 5])
def test_raw_encodings_and_row_strides(encoding: str, padding: int) -> None:
    found = decode(raw(PACKED[encoding], encoding, padding, spare=padding), (8, 6))
    assert np.array_equal(found, BGR)
    assert found.flags["C_CONTIGUOUS"]


def test_mono_becomes_grey() -> None:
    grey = BGR[..., :1]
    assert np.array_equal(decode(raw(grey, "mono8", 3), (8, 6)), np.repeat(grey, 3, axis=2))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (raw(BGR, "yuv422"), "encoding 'yuv422' is not understood; bgr8"),
        (raw(BGR[:3], "bgr8"), "8x3 pixels where the calibration belongs to 8x6"),
        (CameraImage("CAM", 0, 0.0, BGR.tobytes()[:-1], "bgr8", 8, 6, 24), "truncated: 143 bytes for 6 rows"),
        (CameraImage("CAM", 0, 0.0, BGR.tobytes(), "bgr8", 8, 6, 20), "truncated"),
        (CameraImage("CAM", 0, 0.0, b""), "cannot be decoded"),
        (CameraImage("CAM", 0, 0.0, b"hello" * 50), "cannot be decoded"),
    ],
)
def test_unusable_images_say_why(image: CameraImage, message: str) -> None:
    with pytest.raises(ImageFault, match=message):
        decode(image, (8, 6))


@pytest.mark.parametrize("ending", [".jpg", ".png"])
@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_compressed_images_are_decoded_at_reduced_scale(ending: str, reduction: int) -> None:
    smooth = cv2.resize(BGR, (64, 48), interpolation=cv2.INTER_CUBIC)
    data = cv2.imencode(ending, smooth)[1].tobytes()
    found = decode(CameraImage("CAM", 0, 0.0, data), (64, 48), reduction)
    assert found.shape == (48 // reduction, 64 // reduction, 3)
    wanted = cv2.resize(smooth, found.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert float(np.abs(found.astype(int) - wanted).mean()) < 12


def test_damaged_files_say_why() -> None:
    data = cv2.imencode(".jpg", np.repeat(BGR, 8, axis=0))[1].tobytes()
    with pytest.raises(ImageFault, match=r"CAM is truncated"):
        decode(CameraImage("CAM", 0, 0.0, data[: len(data) // 2]), (8, 48))
    with pytest.raises(ImageFault, match=r"has 8x48 pixels where its calibration promises 16x16"):
        decode(CameraImage("CAM", 0, 0.0, data), (16, 16))


def test_digest_tells_images_apart() -> None:
    one, same = raw(BGR, "bgr8"), raw(BGR.copy(), "bgr8")
    other = BGR.copy()
    other[3, 4, 1] ^= 1
    assert digest(one) == digest(same) != digest(raw(other, "bgr8"))
    big = RNG.integers(0, 256, (900, 1600, 3), dtype=np.uint8)
    noisy = cv2.add(big, RNG.integers(0, 2, big.shape, dtype=np.uint8))
    assert digest(raw(big, "bgr8")) != digest(raw(noisy, "bgr8"))


def test_black_is_what_shows_nothing() -> None:
    night = np.full((80, 160, 3), 3, dtype=np.uint8)
    assert is_black(night, 10)
    assert not is_black(night, 0)
    night[30:50, 40:80] = 120  # a street lamp
    assert not is_black(night, 10)
