"""Read the CAN-bus vector of a sample from the CAN-bus expansion, or compute it from ego poses.

Layout as in :mod:`bevperception.can_bus`.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from nuscenes.can_bus.can_bus_api import NuScenesCanBus
from torch import Tensor

from bevperception.calibration import TimedPose
from bevperception.can_bus import (
    CAN_BUS_SIZE,
    POSE_GAP_S,
    POSE_SPACING_S,
    Style,
    measured_by_poses,
    with_ego_pose,
)
from bevperception.data.nuscenes import REFERENCE_SENSOR, NuScenesReader
from bevperception.errors import DataError, SampleError
from bevperception.geometry import MAX_COORDINATE_M
from bevperception.names import has_file

MOST_MESSAGE_BYTES = 64 * 1024**2
"""Of a scene's pose messages; those of nuScenes' 20 seconds have about half a megabyte."""

_DAMAGE = (
    *(AssertionError, LookupError, TypeError, ValueError, OverflowError, AttributeError, RecursionError),
    OSError,
)
"""Errors that the devkit and NumPy raise for JSON that is not a list of messages."""

_Array = NDArray[np.float64]


class CanBusReader:
    """Reads CAN-bus vectors of samples.

    Args:
        reader: open tables.
        style: 'exact', or 'published' for what the published v1 weights were trained with (see
            ``DataConfig.can_bus``).
    """

    def __init__(self, reader: NuScenesReader, style: Style = "exact") -> None:
        self._reader = reader
        self._style = style
        has_files = (reader.root / "can_bus").is_dir()
        self._api = NuScenesCanBus(dataroot=str(reader.root)) if has_files else None
        self._messages: dict[str, tuple[NDArray[np.int64], _Array] | None] = {}

    def has_messages(self, scene_name: str) -> bool:
        """Whether a scene has CAN-bus pose messages.

        Raises:
            DataError: if its file is damaged.
        """
        return self._scene_messages(scene_name) is not None

    def vector(self, sample_token: str) -> Tensor:
        """The absolute CAN-bus vector of a sample.

        Args:
            sample_token: of a key frame.

        Returns:
            (18,) float64.

        Raises:
            SampleError: if the sample has no reference sensor, or its scene's message file is damaged.
        """
        nusc = self._reader.nusc
        sample = nusc.get("sample", sample_token)
        data = self._reader.sensor_data(sample, REFERENCE_SENSOR)
        pose = nusc.get("ego_pose", data["ego_pose_token"])
        try:
            messages = self._scene_messages(nusc.get("scene", sample["scene_token"])["name"])
        except DataError as error:
            raise SampleError(f"sample {sample_token}: {error}", sample_token) from error
        if messages is not None:
            times_us, rows = messages
            last = int(np.searchsorted(times_us, sample["timestamp"], side="right")) - 1
            measured = rows[max(last, 0)]
        elif self._style == "published":
            measured = np.zeros(CAN_BUS_SIZE)
        else:
            measured = self._from_poses(data)
        return with_ego_pose(
            torch.from_numpy(measured),
            torch.tensor(pose["translation"], dtype=torch.float64),
            torch.tensor(pose["rotation"], dtype=torch.float64),
            published_orientation=self._style == "published",
        )

    def _scene_messages(self, name: str) -> tuple[NDArray[np.int64], _Array] | None:
        if name not in self._messages:
            self._messages[name] = self._load_messages(name)
        return self._messages[name]

    def _load_messages(self, name: str) -> tuple[NDArray[np.int64], _Array] | None:
        # The devkit answers all of these by raising a bare Exception or an assertion.
        if self._api is None or not re.fullmatch(r"scene-\d{4}", name):
            return None
        if int(name[-4:]) in self._api.can_blacklist:
            return None
        path = self._reader.root / "can_bus" / f"{name}_pose.json"
        if not has_file(path, MOST_MESSAGE_BYTES, f"CAN-bus file {path}"):
            return None
        try:
            messages = self._api.get_messages(name, "pose", print_warnings=False)
            times = np.array([m["utime"] for m in messages], dtype=np.int64)
            rows = np.array([_message_row(m) for m in messages], dtype=np.float64)
            if not (np.abs(rows) <= MAX_COORDINATE_M).all():
                raise ValueError("a number is not finite, or impossibly large")
        except _DAMAGE as error:
            raise DataError(f"CAN-bus file {path} is damaged: {error!r}; replace or remove it") from error
        if not len(times):
            return None
        order = np.argsort(times, kind="stable")
        return times[order], rows[order]

    def _from_poses(self, data: dict[str, Any]) -> _Array:
        here = self._timed_pose(data)
        return measured_by_poses(self._neighbour(data, "prev"), here, self._neighbour(data, "next"))

    def _neighbour(self, data: dict[str, Any], direction: Literal["prev", "next"]) -> TimedPose | None:
        """The nearest pose of the sensor's chain of sweeps that is far enough away to differentiate."""
        token = data[direction]
        while token:
            record = self._reader.nusc.get("sample_data", token)
            gap_s = abs(record["timestamp"] - data["timestamp"]) * 1e-6
            if gap_s >= POSE_SPACING_S:
                return self._timed_pose(record) if gap_s <= POSE_GAP_S else None
            token = record[direction]
        return None

    def _timed_pose(self, data: dict[str, Any]) -> TimedPose:
        pose = self._reader.nusc.get("ego_pose", data["ego_pose_token"])
        return TimedPose(data["timestamp"] * 1000, tuple(pose["translation"]), tuple(pose["rotation"]))


def _message_row(message: dict[str, Any]) -> list[float]:
    row = [
        *message["pos"],
        *message["orientation"],
        *message["accel"],
        *message["rotation_rate"],
        *message["vel"],
        0.0,
        0.0,
    ]
    if len(row) != CAN_BUS_SIZE:
        raise ValueError(f"a pose message has {len(row) - 2} numbers, not {CAN_BUS_SIZE - 2}")
    return row
