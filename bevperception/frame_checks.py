"""What one vehicle's frames must be before a model perceives them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from numbers import Real

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bevperception.calibration import EgoMotion, RigCalibration
from bevperception.can_bus import CAN_BUS_SIZE
from bevperception.structures import CameraFrames


def check_types(images: object, calibration: object, ego_pose: object) -> None:
    """Refuse arguments of :meth:`~bevperception.inference.StreamingPredictor.step` of other types.

    Raises:
        ValueError: which one, and what came instead.
    """
    if not isinstance(images, Mapping):
        raise ValueError(f"images must be a mapping of channels to images, got a {type(images).__name__}")
    if not isinstance(calibration, RigCalibration):
        raise ValueError(f"calibration must be a RigCalibration, got a {type(calibration).__name__}")
    if ego_pose is not None and not isinstance(ego_pose, EgoMotion):
        raise ValueError(
            f"ego_pose must be an EgoMotion or None, got a {type(ego_pose).__name__}; "
            "EgoMotion(ego_to_global) makes one of a matrix"
        )


def seconds(stamp: object) -> float:
    """A stamp as a number, also of a tensor or an array that holds one.

    Raises:
        ValueError: it is something else.
    """
    try:
        if isinstance(stamp, (Tensor, np.ndarray)):
            stamp = stamp.item()
        if isinstance(stamp, Real):
            return float(stamp)
    except (RuntimeError, ValueError, OverflowError):  # several numbers, or a whole number beyond floats
        pass
    raise ValueError(f"the stamp must be a number of seconds, got {reprlib.repr(stamp)}")


def check_shapes(frames: CameraFrames) -> None:
    """Refuse frames that are not one vehicle's, whose fields do not fit together, or that are not normalised.

    Raises:
        ValueError: what is wrong, and what came instead.
    """
    shape = tuple(frames.images.shape)
    if len(shape) != 5 or shape[2] != 3 or 0 in shape[3:]:
        raise ValueError(f"the images must be (1, cameras, 3, height, width), got {shape}")
    if frames.batch_size != 1:
        raise ValueError(f"a StreamingPredictor follows one vehicle, got frames of {frames.batch_size}")
    cameras = frames.images.shape[1]
    wanted = {"bev_to_image": (1, cameras, 4, 4), "bev_to_global": (1, 4, 4), "timestamps_s": (1,)}
    for name, shape in wanted.items():
        given = tuple(getattr(frames, name).shape)
        if given != shape:
            raise ValueError(f"{name} must be {shape} for images {tuple(frames.images.shape)}, got {given}")
    mask = frames.camera_mask
    if mask is not None and (mask.dtype is not torch.bool or tuple(mask.shape) != (1, cameras)):
        raise ValueError(f"camera_mask must be (1, {cameras}) bool, got {tuple(mask.shape)} {mask.dtype}")
    if frames.can_bus is not None and tuple(frames.can_bus.shape) != (1, CAN_BUS_SIZE):
        raise ValueError(f"can_bus must be (1, {CAN_BUS_SIZE}), got {tuple(frames.can_bus.shape)}")
    if frames.images.dtype is not torch.float32:
        raise ValueError(
            f"the images must be normalised numbers in float32, got {frames.images.dtype}: "
            "pixels go through ImageInput.normalise first"
        )


def all_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite; in one pass, a tenth of the time of ``isfinite``.

    Args:
        values: at least one element.
    """
    lowest, highest = values.aminmax()  # both are NaN if any element is
    return math.isfinite(float(lowest)) and math.isfinite(float(highest))


def check_values(frames: CameraFrames) -> None:
    """Refuse a time or a projection that is not finite.

    Raises:
        ValueError: which one.
    """
    if not bool(frames.timestamps_s.isfinite().all()):
        raise ValueError(f"the stamp must be a finite number of seconds, got {frames.timestamps_s.tolist()}")
    finite = frames.bev_to_image.isfinite().flatten(2).all(-1)
    present = torch.ones_like(finite) if frames.camera_mask is None else frames.camera_mask.to(finite.device)
    bad = (present & ~finite)[0].nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the projection bev_to_image of cameras {bad} is not finite: a calibration or a pose is not; "
            "leave such cameras out by camera_mask"
        )


def checked_image(image: object, channel: str) -> NDArray[np.uint8]:
    """The image, contiguous and writable; only copied where it is not.

    Raises:
        ValueError: if it is not (height, width, 3) uint8.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        # PyTorch takes neither views with negative strides nor read-only arrays.
        return np.require(image, requirements=["C", "W"])
    shape = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    cause = ""
    if isinstance(image, np.ndarray) and image.dtype != np.uint8:
        cause = "; values are 0 to 255, not 0 to 1 and not 0 to 65535"
    elif isinstance(image, np.ndarray):
        cause = "; cv2.cvtColor makes BGR of grey and BGRA images, and channels come last"
    raise ValueError(
        f"{channel} must have a (height, width, 3) uint8 BGR array as its image, got {shape}{cause}"
    )
