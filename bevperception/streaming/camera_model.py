"""Make a pinhole camera of the numbers of a sensor_msgs/CameraInfo, and undistort its images.

Source of the models' meaning: ROS REP 104 and image_geometry; the arithmetic is OpenCV's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bevperception.calibration import is_pinhole
from bevperception.errors import DataError
from bevperception.geometry import is_valid_intrinsics

_FISHEYE = ("equidistant", "fisheye")
_PINHOLE = ("plumb_bob", "rational_polynomial", "")

Floats = NDArray[np.float64]


class CalibrationFault(DataError):
    """A camera's calibration cannot be used; the message says why."""


@dataclass(frozen=True)
class CameraInfo:
    """The fields of sensor_msgs/CameraInfo that matter here.

    Attributes:
        width, height: of the full image in pixels.
        distortion_model: plumb_bob, rational_polynomial or equidistant; '' for none.
        d: distortion coefficients, possibly none.
        k: (9,) intrinsics of the distorted image, row by row.
        p: (12,) projection of the rectified image, row by row.
        frame_id: of the header: the camera's optical frame.
        binning: (x, y), 0 or 1 for none.
        roi: (x_offset, y_offset, width, height), width and height 0 for the full image.
    """

    width: int
    height: int
    distortion_model: str
    d: tuple[float, ...]
    k: tuple[float, ...]
    p: tuple[float, ...] = ()
    frame_id: str = ""
    binning: tuple[int, int] = (0, 0)
    roi: tuple[int, int, int, int] = (0, 0, 0, 0)


class CameraModel:
    """Checks one camera's calibration and makes pinhole images of its images.

    Args:
        info: as published.
        rectified: whether the images are already rectified; then ``p`` holds and ``d`` does not.
        undistort: whether distorted images are to be undistorted, or refused.

    Attributes:
        info: as given.
        size: (width, height) of the images that arrive.
        intrinsics: (3, 3) float64 of those images once undistorted; they keep their focal length.

    Raises:
        CalibrationFault: if the numbers are no calibration, or the images distorted and not to be
            undistorted.
    """

    def __init__(self, info: CameraInfo, rectified: bool = False, undistort: bool = True) -> None:
        if info.width < 1 or info.height < 1:
            raise CalibrationFault(f"camera info has no image size ({info.width}x{info.height})")
        self.info = info
        self._maps: dict[int, tuple[NDArray[np.int16], NDArray[np.uint16]]] = {}
        full = _full_intrinsics(info, rectified)
        self.size, self.intrinsics = _windowed(full, info)
        if not is_valid_intrinsics(self.intrinsics):
            raise CalibrationFault("camera info holds no calibration: its K (or P) is not invertible")
        # What a CameraCalibration refuses must be known here, or every frame would fail with this camera.
        if not is_pinhole(self.intrinsics):
            raise CalibrationFault(
                "camera info holds no calibration: its K (or P) is no pinhole camera's, with positive focal "
                "lengths and the last row 0, 0, 1"
            )
        if min(self.size) < 1:
            raise CalibrationFault("camera info bins its images or their region of interest to nothing")
        self.distorted = not rectified and any(value != 0.0 for value in info.d)
        if not self.distorted:
            return
        if not undistort:
            raise CalibrationFault(
                f"the images are distorted ({info.distortion_model}) and undistortion is switched off"
            )
        if not all(np.isfinite(info.d)):
            raise CalibrationFault(f"camera info has distortion coefficients that are not finite: {info.d}")
        count = len(info.d)
        fits = count == 4 if info.distortion_model in _FISHEYE else count in (4, 5, 8, 12, 14)
        if info.distortion_model not in (*_FISHEYE, *_PINHOLE) or not fits:
            raise CalibrationFault(
                f"distortion model {info.distortion_model!r} with {count} coefficients is not understood"
            )

    def undistort(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Undistort an image; one without distortion is returned as it is.

        Args:
            image: (height, width, 3) of :attr:`size`, or an exact fraction of it.
        """
        if not self.distorted:
            return image
        reduction = self.size[0] // image.shape[1]
        if reduction not in self._maps:
            self._maps[reduction] = self._undistortion_maps(reduction)
        first, second = self._maps[reduction]
        return np.asarray(cv2.remap(image, first, second, cv2.INTER_LINEAR), dtype=np.uint8)

    def _undistortion_maps(self, reduction: int) -> tuple[NDArray[np.int16], NDArray[np.uint16]]:
        k: Floats = self.intrinsics.numpy().copy()
        k[:2] /= reduction
        # OpenCV's pixel centres lie at whole numbers, so the corner of the image at -0.5 stays.
        k[:2, 2] += 0.5 / reduction - 0.5
        size = (self.size[0] // reduction, self.size[1] // reduction)
        d: Floats = np.array(self.info.d, dtype=np.float64)
        if self.info.distortion_model in _FISHEYE:
            maps = cv2.fisheye.initUndistortRectifyMap(k, d, np.eye(3), k, size, cv2.CV_16SC2)
        else:
            maps = cv2.initUndistortRectifyMap(k, d, np.eye(3), k, size, cv2.CV_16SC2)
        return np.asarray(maps[0], dtype=np.int16), np.asarray(maps[1], dtype=np.uint16)


def _full_intrinsics(info: CameraInfo, rectified: bool) -> Tensor:
    numbers: Sequence[float] = info.k
    name, count = "K", 9
    if rectified:
        numbers, name, count = info.p, "P", 12
    if len(numbers) != count:
        raise CalibrationFault(f"camera info has {len(numbers)} numbers in {name}, not {count}")
    matrix = torch.tensor(list(numbers), dtype=torch.float64).reshape(3, count // 3)
    return matrix[:, :3].contiguous()


def _windowed(full: Tensor, info: CameraInfo) -> tuple[tuple[int, int], Tensor]:
    """Size and intrinsics of the images that arrive: region of interest first, then binning."""
    x0, y0, width, height = info.roi
    if width == 0 or height == 0:
        x0, y0, width, height = 0, 0, info.width, info.height
    bin_x, bin_y = (max(1, factor) for factor in info.binning)
    intrinsics = full.clone()
    intrinsics[0, 2] -= x0
    intrinsics[1, 2] -= y0
    intrinsics[0] /= bin_x
    intrinsics[1] /= bin_y
    return (width // bin_x, height // bin_y), intrinsics
