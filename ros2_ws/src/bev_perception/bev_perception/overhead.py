"""Measure the cost of everything but the model for one set of images, stage by stage, on one core.

    python -m bev_perception.overhead BAG

plays a scene bag's messages through the node's own code, with a model that costs nothing: messages are
deserialised, taken in, put together, decoded, prepared, converted and serialised as when the node runs.
Times are the core's own (CPU time), so that other programs do not count.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from nav_msgs.msg import Odometry
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage
from std_msgs.msg import Header
from torch import nn

from bev_perception import messages
from bevperception.bags.files import open_reader
from bevperception.config import DataConfig
from bevperception.config_model import SegmentationConfig
from bevperception.errors import run_program
from bevperception.inference import Perception, StreamingPredictor
from bevperception.streaming import conversions
from bevperception.streaming.pipeline import Pipeline
from bevperception.streaming.settings import NodeSettings
from bevperception.structures import BEVMemory, Boxes3D, CameraFrames, ModelOutputs

_T = TypeVar("_T")

_KINDS = {
    "sensor_msgs/msg/CompressedImage": CompressedImage,
    "sensor_msgs/msg/CameraInfo": CameraInfo,
    "nav_msgs/msg/Odometry": Odometry,
    "std_msgs/msg/Header": Header,
}


class FreeModel(nn.Module):
    """Gives the same boxes and maps for every frame, at no cost.

    Args:
        boxes: number of boxes.
        head: of the maps.
    """

    def __init__(self, boxes: int, head: SegmentationConfig) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        values = torch.rand(boxes, 9, generator=random) * 40 - 20
        values[:, 3:6] = torch.tensor([4.5, 1.9, 1.6])
        labels = torch.randint(0, 10, (boxes,), generator=random)
        self._boxes = Boxes3D(values, labels, torch.linspace(0.9, 0.35, boxes))
        noise = torch.randn(
            1, len(head.classes), head.grid.rows // 8, head.grid.columns // 8, generator=random
        )
        self._maps = nn.functional.interpolate(noise, scale_factor=8.0, mode="bilinear")

    def forward(
        self, frames: CameraFrames, memory: BEVMemory | None = None
    ) -> tuple[ModelOutputs, BEVMemory]:
        """The same outputs, whatever the frames."""
        bev, valid = torch.zeros(1, 1, 1, 1), torch.ones(1, dtype=torch.bool)
        return ModelOutputs(bev, None, self._maps), BEVMemory(
            bev, frames.bev_to_global, frames.timestamps_s, valid
        )

    def decode(self, outputs: ModelOutputs) -> list[Boxes3D]:
        """The same boxes."""
        return [self._boxes]


class Overhead:
    """Times the stages over the messages of a bag.

    Args:
        bag: of tools/nuscenes_to_bag.py, with compressed images.
        size: (height, width) of the network's input.
        boxes: that are published.
    """

    def __init__(self, bag: Path, size: tuple[int, int], boxes: int) -> None:
        self.head = SegmentationConfig()
        data = DataConfig(image_size=size)
        self.settings = NodeSettings(
            sweep_trigger=True,
            calibration_file=str(bag / "calibration.yaml"),
            max_wait_s=5.0,
            frozen_after=0,
        )
        predictor = StreamingPredictor(FreeModel(boxes, self.head), data=data)
        self.pipeline = Pipeline(predictor, tuple(data.cameras), self.settings)
        self.pipeline.warm_up()
        self.spent_ms: dict[str, list[float]] = defaultdict(list)
        with open_reader(bag) as reader:
            self._messages = [
                (c.topic, c.msgtype, bytes(d)) for c, _, d in reader.messages() if c.msgtype in _KINDS
            ]

    def run(self, rounds: int) -> None:
        """Play all messages so many times."""
        received_ms = 0.0
        for _ in range(rounds):
            for topic, kind, data in self._messages:
                begin_s = time.thread_time()
                self._receive(topic, deserialize_message(data, _KINDS[kind]))
                received_ms += 1e3 * (time.thread_time() - begin_s)
                images = self.pipeline.wait(0.0)
                if images is None:
                    continue
                if len(images.images) == len(self.pipeline.channels):
                    self._finish(images, received_ms)
                received_ms = 0.0
            self.pipeline.reset()

    def table(self) -> str:
        """Medians and 95th percentiles as Markdown."""
        lines = ["| stage | median ms | p95 ms |", "| --- | --- | --- |"]
        for name, values in self.spent_ms.items():
            p50, p95 = np.percentile(values, (50, 95))
            lines.append(f"| {name} | {p50:.2f} | {p95:.2f} |")
        total = np.sum(list(self.spent_ms.values()), axis=0)
        p50, p95 = np.percentile(total, (50, 95))
        return "\n".join([*lines, f"| all | {p50:.2f} | {p95:.2f} |"])

    def _receive(self, topic: str, message: Any) -> None:
        channel = topic.split("/")[2].upper() if topic.startswith("/sensors/cam") else ""
        if isinstance(message, CompressedImage):
            self.pipeline.add_image(messages.from_compressed(channel, message))
        elif isinstance(message, CameraInfo):
            self.pipeline.add_camera_info(channel, messages.from_camera_info(message))
        elif isinstance(message, Odometry):
            self.pipeline.add_pose(messages.from_odometry(message))
        else:
            self.pipeline.add_sweep(messages.stamp_ns(message.stamp))

    def _finish(self, images: Any, received_ms: float) -> None:
        begin_s = time.thread_time()
        self.pipeline._pixels(images, self.settings)  # once more, to know its share
        decoded_s = time.thread_time()
        result = self.pipeline.process(images)
        all_ms, decode_ms = 1e3 * (time.thread_time() - decoded_s), 1e3 * (decoded_s - begin_s)
        assert result.perception is not None, result
        stages = {
            "receive (deserialise, take in)": received_ms,
            "decode six images": decode_ms,
            "prepare the input, read the outputs": max(0.0, all_ms - decode_ms),
        }
        header = Header(stamp=messages.to_stamp(result.stamp_ns), frame_id="base_link")
        made: list[Any] = []
        for name, make in self._conversions(header, result.perception).items():
            begin_s = time.thread_time()
            made += make()
            stages[name] = 1e3 * (time.thread_time() - begin_s)
        begin_s = time.thread_time()
        for message in made:
            serialize_message(message)
        stages["publish (serialise)"] = 1e3 * (time.thread_time() - begin_s)
        for name, value in stages.items():
            self.spent_ms[name].append(value)

    def _conversions(self, header: Header, perception: Perception) -> dict[str, Callable[[], list[Any]]]:
        """What makes the messages of each kind alone."""

        def convert(*kinds: str, grids: bool = False) -> conversions.Output:
            chosen = {kind: kind in kinds for kind in ("objects", "detections", "markers", "picture")}
            wanted = conversions.Wanted(**chosen, grids=None if grids else ())
            return conversions.convert(perception, self.head, self.settings, wanted)

        made = {
            "objects": lambda: [messages.object_cloud(header, _converted(convert("objects").objects))],
            "markers": lambda: [messages.markers(header, _converted(convert("markers").markers))],
            "occupancy grids": lambda: [
                messages.occupancy_grid(header, grid) for grid in convert(grids=True).grids.values()
            ],
            "BEV picture": lambda: [messages.rgb_image(header, _converted(convert("picture").picture))],
        }
        if messages.Detection3DArray is not None:
            made["detections"] = lambda: [
                messages.detection_array(header, _converted(convert("detections").detections))
            ]
        return made


def _converted(value: _T | None) -> _T:
    """Return a converted value that was asked for, and so is not None."""
    assert value is not None
    return value


def main() -> int | None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bag", help="scene bag with compressed images")
    parser.add_argument("--size", default="448x800", help="HEIGHTxWIDTH of the network's input (%(default)s)")
    parser.add_argument("--boxes", type=int, default=40, help="boxes a frame (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="times that the bag is played (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    height, width = (int(side) for side in options.size.split("x"))
    overhead = Overhead(Path(options.bag), (height, width), options.boxes)
    overhead.run(1)
    overhead.spent_ms.clear()
    overhead.run(options.rounds)
    print(overhead.table())
    return None


if __name__ == "__main__":
    run_program(main)
