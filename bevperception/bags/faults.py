"""Inject faults of a vehicle's sensors into the messages of a bag as they are played.

A fault is written ``KIND:TARGET:FROM:TO[:VALUE]``, times in seconds since the playback began (as the bag
counts them, loops added up); TO may be empty for the rest. TARGET is a camera (CAM_FRONT), ``cameras``,
``odometry``, ``info`` or ``info/CAM_FRONT``, ``all``, or a topic.

| kind | what | value |
| --- | --- | --- |
| lost | messages are not sent | |
| loss | messages are lost at random | probability |
| delay | messages are sent later | seconds |
| frozen | the first image is sent again and again, with new stamps | |
| black, truncated, wrong_size, wrong_encoding | images are spoiled | |
| ahead, back | stamps are shifted | seconds |
| swap | every second stamp is shifted back, so that stamps come out of order | seconds |
| burst | each message is sent many times at once, a millisecond apart | how many |
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import cv2
import numpy as np

from bevperception.bags.files import typestore
from bevperception.data.images import check_claimed_size, image_size
from bevperception.errors import ConfigError

_VALUES: Final = {
    "lost": None,
    "loss": 0.3,
    "delay": 0.2,
    "frozen": None,
    "black": None,
    "truncated": None,
    "wrong_size": None,
    "wrong_encoding": None,
    "ahead": 60.0,
    "back": 60.0,
    "swap": 0.3,
    "burst": 50.0,
}
"""Kinds, with their value where none is given."""

_COMPRESSED, _RAW = "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image"
STAMPED: Final = (
    _COMPRESSED,
    _RAW,
    "sensor_msgs/msg/CameraInfo",
    "sensor_msgs/msg/PointCloud2",
    "nav_msgs/msg/Odometry",
    "std_msgs/msg/Header",
)
"""Types whose serialised form begins with a header, after four bytes of encapsulation."""


@dataclass(frozen=True)
class Played:
    """A serialised message and when it is sent.

    Attributes:
        time_s: when, in seconds since the playback began as the bag counts them.
        topic, kind: name and type.
        data: serialised (CDR).
    """

    time_s: float
    topic: str
    kind: str
    data: bytes


@dataclass(frozen=True)
class Fault:
    """One kind of fault, on one target, over a span of time; see the module.

    Attributes:
        kind: one of the kinds in the module's table.
        target: the messages that it applies to.
        begin_s, end_s: seconds since the playback began.
        value: how strong it is, see the table.
    """

    kind: str
    target: str
    begin_s: float
    end_s: float
    value: float

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Parse ``KIND:TARGET:FROM:TO[:VALUE]``.

        Raises:
            ConfigError: if it is not written so.
        """
        parts = text.split(":")
        try:
            kind, target, begin, end = parts[:4]
            default = _VALUES[kind]
            value = float(parts[4]) if len(parts) == 5 else float(default or 0.0)
            if len(parts) > 5:
                raise ValueError("too many parts")
            return cls(kind, target, float(begin), float(end) if end else float("inf"), value)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"fault {text!r} is not KIND:TARGET:FROM:TO[:VALUE] ({error}); kinds: {', '.join(_VALUES)}"
            ) from None

    def hits(self, message: Played) -> bool:
        """Whether the fault applies to a message."""
        if not self.begin_s <= message.time_s < self.end_s:
            return False
        image = message.kind in (_COMPRESSED, _RAW)
        parts = message.topic.split("/")
        if self.target == "all":
            return message.kind in STAMPED
        if self.target == "cameras":
            return image
        if self.target == "odometry":
            return message.kind == "nav_msgs/msg/Odometry"
        name, _, camera = self.target.partition("/")
        if name == "info":
            return message.kind.endswith("CameraInfo") and (not camera or camera.lower() in parts)
        if self.target.startswith("/"):
            return message.topic == self.target
        return image and self.target.lower() in parts


class FaultInjector:
    """Applies faults to messages, in the order of the faults.

    Args:
        faults: to apply.
        seed: of the random losses.

    Attributes:
        done: how often each kind was applied.
    """

    def __init__(self, faults: Sequence[Fault], seed: int = 0) -> None:
        self._faults = tuple(faults)
        self._random = random.Random(seed)
        self._first: dict[tuple[int, str], bytes] = {}
        self._seen: Counter[tuple[int, str]] = Counter()
        self._store: Any = typestore() if self._faults else None
        self.done: Counter[str] = Counter()

    def apply(self, message: Played) -> list[Played]:
        """Return the messages that are sent in place of one, possibly none."""
        sent = [message]
        for index, fault in enumerate(self._faults):
            if fault.hits(message):
                self.done[fault.kind] += 1
                sent = [changed for one in sent for changed in self._do(index, fault, one)]
        return sent

    def _do(self, index: int, fault: Fault, message: Played) -> list[Played]:
        if fault.kind == "lost" or (fault.kind == "loss" and self._random.random() < fault.value):
            return []
        if fault.kind == "loss":
            return [message]
        if fault.kind == "delay":
            return [replace(message, time_s=message.time_s + fault.value)]
        if fault.kind in ("ahead", "back"):
            shift_s = fault.value if fault.kind == "ahead" else -fault.value
            return [shifted(message, shift_s)]
        key = (index, message.topic)
        if fault.kind == "swap":
            self._seen[key] += 1
            return [shifted(message, -fault.value) if self._seen[key] % 2 == 0 else message]
        if fault.kind == "burst":
            return [shifted(message, 1e-3 * number) for number in range(int(fault.value))]
        if fault.kind == "frozen":
            first = self._first.setdefault(key, message.data)
            return [replace(message, data=message.data[:12] + first[12:])]
        return [replace(message, data=self._spoil(fault.kind, message))]

    def _spoil(self, kind: str, message: Played) -> bytes:
        if message.kind not in (_COMPRESSED, _RAW):
            return message.data
        image = self._store.deserialize_cdr(message.data, message.kind)
        spoiled = _spoil_file(kind, image) if message.kind == _COMPRESSED else _spoil_raw(kind, image)
        return bytes(self._store.serialize_cdr(spoiled, message.kind))


def shifted(message: Played, shift_s: float) -> Played:
    """Shift the stamp of a message; messages that do not begin with a header stay as they are.

    Args:
        message: of any type.
        shift_s: seconds, added to the stamp.
    """
    if message.kind not in STAMPED or shift_s == 0.0:
        return message
    order = "<" if message.data[1] & 1 else ">"
    seconds, nanoseconds = np.frombuffer(message.data, dtype=f"{order}i4", count=2, offset=4).tolist()
    total = max(0, seconds * 10**9 + nanoseconds + round(shift_s * 1e9))
    stamp = np.array([total // 10**9, total % 10**9], dtype=f"{order}i4").tobytes()
    return replace(message, data=message.data[:4] + stamp + message.data[12:])


def _spoil_file(kind: str, image: Any) -> Any:
    data = np.asarray(image.data)
    if kind == "truncated":
        return replace(image, data=data[: len(data) // 2].copy())
    if kind == "wrong_encoding":
        return replace(image, data=np.frombuffer(b"not an image " * 50, dtype=np.uint8))
    claimed = image_size(data.tobytes())
    if claimed is not None:
        check_claimed_size(claimed, None, "of the bag")
    pixels = None if claimed is None else cv2.imdecode(data, cv2.IMREAD_COLOR)
    if pixels is None:
        return image
    pixels = np.zeros_like(pixels) if kind == "black" else pixels[::2, ::2]
    ending = ".png" if "png" in image.format else ".jpg"
    return replace(image, data=cv2.imencode(ending, np.ascontiguousarray(pixels))[1].reshape(-1))


def _spoil_raw(kind: str, image: Any) -> Any:
    data = np.asarray(image.data)
    if kind == "truncated":
        return replace(image, data=data[: len(data) // 2].copy())
    if kind == "wrong_encoding":
        return replace(image, encoding="yuv422")
    if kind == "black":
        return replace(image, data=np.zeros_like(data))
    rows = data.reshape(image.height, image.step)[: image.height // 2]
    return replace(image, height=image.height // 2, data=np.ascontiguousarray(rows).reshape(-1))
