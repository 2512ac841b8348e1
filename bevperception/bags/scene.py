"""Write a nuScenes-format scene as a rosbag2: cameras, calibration, TF, odometry, sweeps and ground truth.

| topic | type |
| --- | --- |
| /sensors/CAMERA/image/compressed (or image with raw images), /sensors/CAMERA/camera_info | per camera |
| /sensors/sweep | std_msgs/Header at each LIDAR_TOP record: the instant that boxes belong to |
| /odometry | nav_msgs/Odometry at the instant of every record: odom is nuScenes' global frame |
| /tf, /tf_static | odom to base_link; base_link to the cameras |
| /ground_truth/objects | sensor_msgs/PointCloud2, a point for each annotated box |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pyquaternion import Quaternion

from bevperception.bags.files import offered_qos, open_writer
from bevperception.bags.messages import Messages
from bevperception.data.images import MOST_BYTES, decode_image
from bevperception.data.nuscenes import REFERENCE_SENSOR, NuScenesReader, SceneRecord
from bevperception.errors import DataError
from bevperception.geometry import invert_rigid, transform_boxes
from bevperception.names import read_file
from bevperception.streaming.conversions import object_rows
from bevperception.streaming.rig import write_extrinsics
from bevperception.structures import Boxes3D

SWEEP_TOPIC = "/sensors/sweep"
ODOMETRY_TOPIC = "/odometry"
TRUTH_TOPIC = "/ground_truth/objects"
BASE_FRAME, ODOM_FRAME = "base_link", "odom"
CALIBRATION_FILE = "calibration.yaml"
_TWIST_GAP_S = 1.5


@dataclass(frozen=True)
class BagOptions:
    """Which images go into the bag, and how it is stored.

    Args:
        storage: mcap or sqlite3.
        raw: uncompressed images instead of the files' bytes.
        sweeps: all camera records, not only the key frames.
        overwrite: replace a bag that is there.
    """

    storage: str = "mcap"
    raw: bool = False
    sweeps: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class _Event:
    stamp_ns: int
    order: int
    topic: str
    kind: str
    message: Any


def image_topic(channel: str, raw: bool) -> str:
    """Topic of a camera's images in the bag."""
    return f"/sensors/{channel.lower()}/image" + ("" if raw else "/compressed")


def info_topic(channel: str) -> str:
    """Topic of a camera's info in the bag."""
    return f"/sensors/{channel.lower()}/camera_info"


def camera_frame(channel: str) -> str:
    """TF frame of a camera in the bag."""
    return channel.lower()


def stamp_ns_of_record(record: dict[str, Any]) -> int:
    """Nanoseconds of a nuScenes record."""
    return int(record["timestamp"]) * 1000


def write_scene_bag(
    reader: NuScenesReader, scene: SceneRecord, path: Path, options: BagOptions
) -> dict[str, int]:
    """Write a scene as a bag, and its calibration file into the bag's folder.

    Args:
        reader: open tables; its cameras are written.
        scene: to write.
        path: the bag's folder.
        options: see :class:`BagOptions`.

    Returns:
        number of messages by topic.

    Raises:
        ConfigError: if the folder exists already.
        DataError: if an image is missing or a calibration changes within the scene.
    """
    builder = _SceneMessages(reader, scene, options)
    counts: dict[str, int] = {}
    with open_writer(path, options.storage, options.overwrite) as writer:
        connections: dict[str, Any] = {}
        for event in builder.events():
            if event.topic not in connections:
                latched = event.topic == "/tf_static"
                connections[event.topic] = writer.add_connection(
                    event.topic,
                    event.kind,
                    typestore=builder.make.store,
                    offered_qos_profiles=offered_qos(latched, 10),
                )
            data = builder.make.store.serialize_cdr(event.message, event.kind)
            writer.write(connections[event.topic], event.stamp_ns, data)
            counts[event.topic] = counts.get(event.topic, 0) + 1
        write_extrinsics(writer.path / CALIBRATION_FILE, builder.calibration())
    return counts


class _SceneMessages:
    """All messages of one scene."""

    def __init__(self, reader: NuScenesReader, scene: SceneRecord, options: BagOptions) -> None:
        self.make = Messages()
        self._reader, self._scene, self._options = reader, scene, options
        self._channels = reader.config.cameras
        first = reader.nusc.get("sample", scene.sample_tokens[0])
        self._records = {c: self._chain(first, c) for c in (*self._channels, REFERENCE_SENSOR)}
        self._mounts = {c: self._mount(c) for c in self._records}

    def events(self) -> Iterator[_Event]:
        """Yield all messages in the order of their stamps; odometry before the images that need it."""
        events = [*self._odometry(), *self._sweeps(), *self._truth()]
        events.append(self._static(min(event.stamp_ns for event in events)))
        for channel in self._channels:
            events += self._images(channel)
        yield from sorted(events, key=lambda event: (event.stamp_ns, event.order))

    def calibration(self) -> dict[str, Any]:
        """Content of the calibration file."""
        cameras = {}
        for channel in self._channels:
            cameras[channel] = {"frame_id": camera_frame(channel), **self._place(channel)}
        content: dict[str, Any] = {"base_frame": BASE_FRAME, "cameras": cameras}
        if self._reader.config.bev_frame == "lidar":
            content["bev"] = self._place(REFERENCE_SENSOR)
        return content

    def _place(self, channel: str) -> dict[str, list[float]]:
        mount = self._mounts[channel]
        w, x, y, z = mount["rotation"]
        return {"translation_m": [float(v) for v in mount["translation"]], "rotation_xyzw": [x, y, z, w]}

    def _chain(self, sample: dict[str, Any], channel: str) -> list[dict[str, Any]]:
        """Records of a sensor within the scene, in order; key frames only unless sweeps are wanted."""
        last = self._reader.nusc.get("sample", self._scene.sample_tokens[-1])
        end = self._reader.sensor_data(last, channel)["timestamp"]
        record = self._reader.sensor_data(sample, channel)
        records = [record]
        while record["next"]:
            record = self._reader.nusc.get("sample_data", record["next"])
            if record["timestamp"] > end:
                break
            records.append(record)
        return records

    def _chosen(self, channel: str) -> list[dict[str, Any]]:
        return [r for r in self._records[channel] if self._options.sweeps or r["is_key_frame"]]

    def _mount(self, channel: str) -> dict[str, Any]:
        tokens = {record["calibrated_sensor_token"] for record in self._records[channel]}
        mounts = [self._reader.nusc.get("calibrated_sensor", token) for token in sorted(tokens)]
        keys = ("translation", "rotation", "camera_intrinsic")
        if any(mount[key] != mounts[0][key] for mount in mounts for key in keys):
            raise DataError(
                f"scene {self._scene.name}: the calibration of {channel} changes within the scene"
            )
        return dict(mounts[0])

    def _odometry(self) -> Iterator[_Event]:
        """Yield the pose of every stamp once, as odometry and as TF."""
        poses: dict[int, dict[str, Any]] = {}
        for records in self._records.values():
            for record in records:
                poses[stamp_ns_of_record(record)] = self._reader.nusc.get(
                    "ego_pose", record["ego_pose_token"]
                )
        stamps = sorted(poses)
        places = [np.array(poses[stamp]["translation"], dtype=np.float64) for stamp in stamps]
        turns = [Quaternion(poses[stamp]["rotation"]) for stamp in stamps]
        for i, stamp in enumerate(stamps):
            twist = _twist(stamps, places, turns, i)
            frames = (ODOM_FRAME, BASE_FRAME)
            message = self.make.odometry(stamp, frames, places[i], turns[i], twist)
            yield _Event(stamp, 0, ODOMETRY_TOPIC, "nav_msgs/msg/Odometry", message)
            moved = self.make.transform(stamp, ODOM_FRAME, BASE_FRAME, places[i], turns[i])
            tf = self.make.make("tf2_msgs/TFMessage", [moved])
            yield _Event(stamp, 1, "/tf", "tf2_msgs/msg/TFMessage", tf)

    def _static(self, stamp_ns: int) -> _Event:
        transforms = []
        for channel, mount in self._mounts.items():
            place = np.array(mount["translation"], dtype=np.float64)
            turn = Quaternion(mount["rotation"])
            frame = camera_frame(channel)
            transforms.append(self.make.transform(stamp_ns, BASE_FRAME, frame, place, turn))
        message = self.make.make("tf2_msgs/TFMessage", transforms)
        return _Event(stamp_ns, -1, "/tf_static", "tf2_msgs/msg/TFMessage", message)

    def _sweeps(self) -> Iterator[_Event]:
        for record in self._chosen(REFERENCE_SENSOR):
            stamp = stamp_ns_of_record(record)
            header = self.make.header(stamp, camera_frame(REFERENCE_SENSOR))
            yield _Event(stamp, 2, SWEEP_TOPIC, "std_msgs/msg/Header", header)

    def _truth(self) -> Iterator[_Event]:
        for token in self._scene.sample_tokens:
            sample = self._reader.sample(token)
            record = self._reader.sensor_data(self._reader.nusc.get("sample", token), REFERENCE_SENSOR)
            stamp = stamp_ns_of_record(record)
            boxes = self._reader.annotations(sample).boxes
            bev_to_base = invert_rigid(sample.ego_to_global) @ sample.bev_to_global
            values = transform_boxes(boxes.values.double(), bev_to_base)
            scored = Boxes3D(values, boxes.labels, values.new_ones(len(boxes)))
            message = self.make.objects(stamp, BASE_FRAME, object_rows(scored))
            yield _Event(stamp, 3, TRUTH_TOPIC, "sensor_msgs/msg/PointCloud2", message)

    def _images(self, channel: str) -> Iterator[_Event]:
        intrinsics = np.array(self._mounts[channel]["camera_intrinsic"], dtype=np.float64)
        frame, topic = camera_frame(channel), image_topic(channel, self._options.raw)
        for record in self._chosen(channel):
            stamp, size = stamp_ns_of_record(record), (int(record["width"]), int(record["height"]))
            info = self.make.camera_info(stamp, frame, size, intrinsics)
            yield _Event(stamp, 4, info_topic(channel), "sensor_msgs/msg/CameraInfo", info)
            path = self._reader.root / record["filename"]
            data = read_file(path, MOST_BYTES, f"image {path}")
            if not self._options.raw:
                kind = "png" if path.suffix.lower() == ".png" else "jpeg"
                message = self.make.compressed(stamp, frame, data, kind)
                yield _Event(stamp, 5, topic, "sensor_msgs/msg/CompressedImage", message)
                continue
            message = self.make.image(stamp, frame, decode_image(data, size, 1, str(path)))
            yield _Event(stamp, 5, topic, "sensor_msgs/msg/Image", message)


def _twist(stamps: list[int], places: list[Any], turns: list[Quaternion], at: int) -> tuple[Any, Any]:
    """Linear and angular velocity in base_link between a pose's neighbours; zero where they are too far."""
    a, b = max(at - 1, 0), min(at + 1, len(stamps) - 1)
    span_s = (stamps[b] - stamps[a]) * 1e-9
    if not 0 < span_s <= _TWIST_GAP_S:
        return np.zeros(3), np.zeros(3)
    linear = turns[at].inverse.rotate((places[b] - places[a]) / span_s)
    turned = turns[a].inverse * turns[b]
    angular = np.array(turned.axis) * turned.radians / span_s
    return linear, angular
