"""A pipeline over a scene of the tiny data set, fed without ROS."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bevperception.calibration import TimedPose
from bevperception.config import ExperimentConfig
from bevperception.config_io import load_config
from bevperception.data.nuscenes import NuScenesReader
from bevperception.inference import StreamingPredictor
from bevperception.models.bevformer import BEVFormer
from bevperception.streaming.camera_model import CameraInfo
from bevperception.streaming.images import CameraImage
from bevperception.streaming.pipeline import ImageSetResult, Pipeline
from bevperception.streaming.rig import pose_from_xyzw, write_extrinsics
from bevperception.streaming.settings import NodeSettings
from tests.fixtures.tiny_nuscenes import VAL_SPLIT, VERSION

ROOT = Path(__file__).resolve().parents[2]


def micro_config(root: Path) -> ExperimentConfig:
    """The micro model's configuration, smaller still, on the tiny data set."""
    config = load_config(ROOT / "configs" / "keyframe_micro.yaml")
    config.data.root, config.data.version = str(root), VERSION
    config.data.train_split = config.data.val_split = VAL_SPLIT
    config.data.image_size = (96, 160)
    config.model.bev.rows = config.model.bev.columns = 16
    config.model.detection.queries = config.model.detection.max_boxes = 40
    config.model.segmentation.classes = ("drivable_area", "vehicle")
    return config


def micro_model(config: ExperimentConfig) -> BEVFormer:
    """Random weights, always the same."""
    torch.manual_seed(0)
    return BEVFormer(config.model).eval()


@dataclass(frozen=True)
class Frame:
    """One key frame's messages.

    Attributes:
        token: of the sample.
        stamp_ns: of its reference.
        images: in order of their stamps.
        poses: of all of its records.
    """

    token: str
    stamp_ns: int
    images: list[CameraImage]
    poses: list[TimedPose]


def frames_of(reader: NuScenesReader, scene: str) -> list[Frame]:
    """Messages of a scene, read straight from the tables."""
    found = []
    for token in reader.scene(scene).sample_tokens:
        sample = reader.nusc.get("sample", token)
        images, poses = [], []
        for channel in (*reader.config.cameras, "LIDAR_TOP"):
            record = reader.sensor_data(sample, channel)
            stamp_ns = record["timestamp"] * 1000
            ego = reader.nusc.get("ego_pose", record["ego_pose_token"])
            poses.append(TimedPose(stamp_ns, tuple(ego["translation"]), tuple(ego["rotation"])))
            if channel != "LIDAR_TOP":
                data = (reader.root / record["filename"]).read_bytes()
                images.append(CameraImage(channel, stamp_ns, 0.0, data))
        images.sort(key=lambda image: image.stamp_ns)
        found.append(Frame(token, poses[-1].stamp_ns, images, poses))
    return found


class Vehicle:
    """A pipeline with calibration, fed frame by frame.

    Args:
        root: of the tiny data set.
        scene: that is driven.
        bev_frame: in which the model reasons.
        settings: parameters that differ from the defaults.
    """

    def __init__(
        self,
        root: Path,
        scene: str = "scene-9003",
        bev_frame: Literal["ego", "lidar"] = "ego",
        **settings: Any,
    ) -> None:
        self.config = micro_config(root)
        self.config.data.bev_frame = bev_frame
        self.reader = NuScenesReader(self.config.data)
        self.frames = frames_of(self.reader, scene)
        self.predictor = StreamingPredictor(micro_model(self.config), data=self.config.data)
        # However slow the machine is, neither the sweep nor a camera seems silent.
        patient = {"sweep_trigger": True, "trigger_timeout_s": 60.0, "camera_timeout_s": 60.0}
        values = {**patient, "max_wait_s": 0.01, "score_threshold": 0.0, **settings}
        self.pipeline = Pipeline(
            self.predictor, tuple(self.config.data.cameras), replace(NodeSettings(), **values)
        )

    def calibrate(self, *channels: str, off_m: float = 0.0) -> None:
        """Camera info and transforms (wrong by ``off_m`` in x) of some cameras; of all if none are given."""
        sample = self.reader.nusc.get("sample", self.frames[0].token)
        for channel in channels or self.config.data.cameras:
            record = self.reader.sensor_data(sample, channel)
            mount = self.reader.nusc.get("calibrated_sensor", record["calibrated_sensor_token"])
            k = tuple(float(v) for row in mount["camera_intrinsic"] for v in row)
            info = CameraInfo(record["width"], record["height"], "", (), k, frame_id=channel.lower())
            self.pipeline.add_camera_info(channel, info)
            w, x, y, z = mount["rotation"]
            matrix = pose_from_xyzw(mount["translation"], [x, y, z, w])
            matrix[0, 3] += off_m
            self.pipeline.add_transform("base_link", channel.lower(), matrix)

    def write_calibration(self, path: Path) -> None:
        """A calibration file of the cameras, and of the LiDAR where the model reasons in its frame."""
        sample = self.reader.nusc.get("sample", self.frames[0].token)

        def place(channel: str) -> dict[str, list[float]]:
            record = self.reader.sensor_data(sample, channel)
            mount = self.reader.nusc.get("calibrated_sensor", record["calibrated_sensor_token"])
            w, x, y, z = mount["rotation"]
            return {"translation_m": list(mount["translation"]), "rotation_xyzw": [x, y, z, w]}

        content: dict[str, Any] = {"cameras": {c: place(c) for c in self.config.data.cameras}}
        if self.config.data.bev_frame == "lidar":
            content["bev"] = place("LIDAR_TOP")
        write_extrinsics(path, content)

    def send(
        self,
        frame: Frame,
        without: tuple[str, ...] = (),
        shift_ns: int = 0,
        motion: bool = True,
        **change: Any,
    ) -> ImageSetResult | None:
        """All messages of a frame in the order of their stamps, then what becomes of them."""
        if motion:
            for pose in frame.poses:
                self.pipeline.add_pose(replace(pose, stamp_ns=pose.stamp_ns + shift_ns))
        for image in frame.images:
            if image.channel not in without:
                stamp_ns = image.stamp_ns + shift_ns
                arrived = replace(image, stamp_ns=stamp_ns, arrived_s=time.monotonic(), **change)
                self.pipeline.add_image(arrived)
        self.pipeline.add_sweep(frame.stamp_ns + shift_ns)
        images = self.pipeline.wait(0.5)
        return None if images is None else self.pipeline.process(images)
