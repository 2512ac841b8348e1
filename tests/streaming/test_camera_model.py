"""Camera info to pinhole cameras: against OpenCV's own projection with distortion."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from bevperception.streaming.camera_model import CalibrationFault, CameraInfo, CameraModel

K = (300.0, 0.0, 161.0, 0.0, 310.0, 118.0, 0.0, 0.0, 1.0)
P = (250.0, 0.0, 158.0, 0.0, 0.0, 255.0, 119.0, 0.0, 0.0, 0.0, 1.0, 0.0)
PLAIN = CameraInfo(320, 240, "plumb_bob", (0.0,) * 5, K, P, "cam")
PLUMB = replace(PLAIN, d=(-0.25, 0.08, 0.001, -0.002, 0.0))
RATIONAL = replace(
    PLAIN, distortion_model="rational_polynomial", d=(0.3, -0.1, 0.001, 0.001, 0.02, 0.5, -0.05, 0.01)
)
FISHEYE = replace(PLAIN, distortion_model="equidistant", d=(-0.02, 0.01, -0.003, 0.001))
RAYS = np.array([[0.0, 0.0, 1.0], [0.25, 0.12, 1.0], [-0.3, 0.2, 1.0], [0.2, -0.22, 1.0], [-0.28, -0.2, 1.0]])


def distorted_pixels(info: CameraInfo, rays: np.ndarray) -> np.ndarray:
    """Where rays (n, 3) fall in the image as the camera takes it."""
    k, d = np.array(info.k).reshape(3, 3), np.array(info.d)
    zero = np.zeros(3)
    if info.distortion_model == "equidistant":
        return cv2.fisheye.projectPoints(rays[None], zero, zero, k, d)[0][0]
    return cv2.projectPoints(rays, zero, zero, k, d)[0][:, 0]


@pytest.mark.parametrize("info", [PLUMB, RATIONAL, FISHEYE], ids=lambda info: info.distortion_model)
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_pixels_are_taken_from_where_the_lens_puts_their_rays(info: CameraInfo, reduction: int) -> None:
    """Every pixel of the pinhole image, also of reduced ones, to a thirty-second, as maps are kept."""
    model = CameraModel(info)
    width, height = 320 // reduction, 240 // reduction
    first, second = model._undistortion_maps(reduction)
    x, y = cv2.convertMaps(first, second, cv2.CV_32FC1)
    v, u = np.mgrid[0:height, 0:width].astype(np.float64)
    # OpenCV's pixel centres lie at whole numbers, at any resolution.
    full = np.stack(((u + 0.5) * reduction - 0.5, (v + 0.5) * reduction - 0.5, np.ones_like(u)), axis=-1)
    rays = full.reshape(-1, 3) @ np.linalg.inv(np.array(info.k).reshape(3, 3)).T
    wanted = (distorted_pixels(info, rays) + 0.5) / reduction - 0.5
    found = np.stack((x, y), axis=-1).reshape(-1, 2)
    np.testing.assert_allclose(found, wanted, atol=1 / 32)


@pytest.mark.parametrize("info", [PLUMB, RATIONAL, FISHEYE], ids=lambda info: info.distortion_model)
@pytest.mark.parametrize("reduction", [1, 2])
def test_undistorted_points_lie_where_the_pinhole_projects_them(info: CameraInfo, reduction: int) -> None:
    model = CameraModel(info)
    full = np.zeros((240, 320, 3), dtype=np.uint8)
    for u, v in distorted_pixels(info, RAYS):
        cv2.circle(full, (round(u * 16), round(v * 16)), 6 * 16, (255, 255, 255), -1, cv2.LINE_AA, 4)
    image = cv2.resize(full, (320 // reduction, 240 // reduction), interpolation=cv2.INTER_AREA)
    found = model.undistort(image)[..., 0]
    pixels = RAYS @ model.intrinsics.numpy().T
    pixels = ((pixels[:, :2] / pixels[:, 2:]) + 0.5) / reduction - 0.5
    for u, v in pixels:
        c, r = round(u), round(v)
        y, x = np.mgrid[r - 9 : r + 10, c - 9 : c + 10]
        weights = found[r - 9 : r + 10, c - 9 : c + 10].astype(float)
        centre = np.array([(weights * x).sum(), (weights * y).sum()]) / weights.sum()
        np.testing.assert_allclose(centre, (u, v), atol=0.15)


def test_without_distortion_the_image_stays_as_it_is() -> None:
    model = CameraModel(PLAIN, undistort=False)
    image = np.zeros((240, 320, 3), dtype=np.uint8)
    assert model.undistort(image) is image
    np.testing.assert_array_equal(model.intrinsics.numpy().reshape(-1), K)
    assert model.size == (320, 240)


def test_rectified_images_take_the_projection_matrix() -> None:
    model = CameraModel(PLUMB, rectified=True, undistort=False)
    assert not model.distorted
    np.testing.assert_array_equal(model.intrinsics.numpy(), np.array(P).reshape(3, 4)[:, :3])


def test_region_and_binning_move_the_intrinsics() -> None:
    model = CameraModel(replace(PLAIN, binning=(2, 4), roi=(20, 40, 200, 120)))
    assert model.size == (100, 30)
    wanted = [[150.0, 0, 70.5], [0, 77.5, 19.5], [0, 0, 1]]
    np.testing.assert_allclose(model.intrinsics.numpy(), wanted)


@pytest.mark.parametrize(
    ("info", "options", "message"),
    [
        (replace(PLAIN, width=0), {}, r"no image size \(0x240\)"),
        (replace(PLAIN, k=(0.0,) * 9), {}, "holds no calibration"),
        (replace(PLAIN, k=(-K[0], *K[1:])), {}, "no pinhole camera's"),
        (replace(PLAIN, k=(*K[:4], -K[4], *K[5:])), {}, "no pinhole camera's"),
        (replace(PLAIN, k=(*K[:8], 1.0 + 1e-8)), {}, "no pinhole camera's"),
        (replace(PLAIN, roi=(0, 0, 1, 1), binning=(2, 2)), {}, "region of interest to nothing"),
        (replace(PLAIN, k=(1.0, 2.0)), {}, "2 numbers in K, not 9"),
        (replace(PLAIN, p=()), {"rectified": True}, "0 numbers in P, not 12"),
        (PLUMB, {"undistort": False}, r"distorted \(plumb_bob\) and undistortion is switched off"),
        (replace(PLUMB, distortion_model="mystery"), {}, "'mystery' with 5 coefficients is not understood"),
        (replace(FISHEYE, d=(0.1,) * 5), {}, "'equidistant' with 5 coefficients"),
        (replace(PLUMB, d=(float("nan"),) * 5), {}, "not finite"),
    ],
)
def test_bad_camera_info_says_why(info: CameraInfo, options: dict[str, bool], message: str) -> None:
    with pytest.raises(CalibrationFault, match=message):
        CameraModel(info, **options)
