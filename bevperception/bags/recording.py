"""Read the results that the node published back from a bag."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bevperception.bags.files import open_reader
from bevperception.bags.messages import object_rows_of, stamp_ns_of
from bevperception.errors import DataError
from bevperception.streaming.conversions import boxes_of_rows
from bevperception.structures import Boxes3D

OBJECTS_TOPIC = "/output/objects"
SEGMENTATION_TOPIC = "/output/segmentation/"
DIAGNOSTICS_TOPIC = "/diagnostics"
LATENCY_P95 = "latency p95"


@dataclass(frozen=True)
class Recording:
    """The node's results by stamp in nanoseconds.

    Attributes:
        objects: boxes in base_link, best first, as published.
        segmentation: cells (rows, columns) int8 by class.
        diagnostics: newest values by the part's name; levels and messages as ``level`` and ``message``.
        latency_p95_ms: of every line of diagnostics that told it, in order: each of the results just before.
    """

    objects: dict[int, Boxes3D]
    segmentation: dict[int, dict[str, NDArray[np.int8]]]
    diagnostics: dict[str, dict[str, str]]
    latency_p95_ms: list[float] = field(default_factory=list)

    def probabilities(self, stamp_ns: int, classes: tuple[str, ...]) -> Tensor | None:
        """Segmentation probabilities of one instant.

        Args:
            stamp_ns: of the result.
            classes: in the wanted order.

        Returns:
            (classes, rows, columns) in [0, 1]; None where a class was not recorded.
        """
        grids = self.segmentation.get(stamp_ns, {})
        if any(name not in grids for name in classes):
            return None
        cells = np.stack([grids[name] for name in classes])
        return torch.from_numpy(cells.astype(np.float32)) / 100


def read_recording(path: Path) -> Recording:
    """Read the node's results from a bag.

    Args:
        path: bag that recorded the node's output topics; of results with one stamp the last one counts.

    Raises:
        DataError: if it is no bag, or has no results' topic.
    """
    recording = Recording({}, {}, {})
    with open_reader(path) as reader:
        topics = [connection.topic for connection in reader.connections]
        if not any(topic.endswith(OBJECTS_TOPIC) for topic in topics):
            raise DataError(
                f"{path} has no topic that ends in {OBJECTS_TOPIC}: was the node's output recorded?"
            )
        for connection, _, data in reader.messages():
            topic = connection.topic
            if topic.endswith(OBJECTS_TOPIC):
                message = reader.deserialize(data, connection.msgtype)
                recording.objects[stamp_ns_of(message.header)] = boxes_of_rows(object_rows_of(message))
            elif SEGMENTATION_TOPIC in topic:
                message = reader.deserialize(data, connection.msgtype)
                cells = np.asarray(message.data, dtype=np.int8)
                grid = cells.reshape(message.info.height, message.info.width)
                layers = recording.segmentation.setdefault(stamp_ns_of(message.header), {})
                layers[topic.rsplit("/", 1)[1]] = grid
            elif topic == DIAGNOSTICS_TOPIC:
                message = reader.deserialize(data, connection.msgtype)
                for status in message.status:
                    values = {pair.key: pair.value for pair in status.values}
                    level = str(int(np.asarray(status.level).reshape(-1)[0]))
                    name = status.name.partition(": ")[2]
                    recording.diagnostics[name] = {"level": level, "message": status.message, **values}
                    if name == "timing" and LATENCY_P95 in values:
                        recording.latency_p95_ms.append(float(values[LATENCY_P95].removesuffix(" ms")))
    return recording
