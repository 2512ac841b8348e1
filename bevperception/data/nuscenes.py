"""Read nuScenes-format data with the unmodified devkit.

The reference of a sample is its LIDAR_TOP key frame: the ego pose at that instant defines the BEV frame
(`ego`, or `lidar` through the sensor's mounting). Every camera has an ego pose of its own, at its own
time, so motion between the two instants is part of the projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nuscenes.eval.detection.utils import category_to_detection_name
from torch import Tensor

from bevperception.calibration import PinholeCamera
from bevperception.config import DataConfig
from bevperception.data.splits import scenes_of_split
from bevperception.data.table_checks import show
from bevperception.data.tables import open_tables
from bevperception.errors import DataError, SampleError
from bevperception.geometry import invert_rigid, pose_matrix, rotation_from_quaternion, transform_points
from bevperception.structures import Boxes3D
from bevperception.taxonomy import DETECTION_CLASSES, VEHICLE_CATEGORY

REFERENCE_SENSOR = "LIDAR_TOP"
"""Its key frame's ego pose is a sample's reference, here and in the devkit's evaluation."""

_CLASS_INDEX = {name: index for index, name in enumerate(DETECTION_CLASSES)}


@dataclass(frozen=True)
class CameraRecord:
    """Image file, calibration and pose of one camera of a sample.

    Attributes:
        channel: for example CAM_FRONT.
        path: image file.
        timestamp_s: time of exposure.
        pinhole: its size is the image file's.
        ego_to_global: (4, 4) float64 at the time of exposure.
    """

    channel: str
    path: Path
    timestamp_s: float
    pinhole: PinholeCamera
    ego_to_global: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the image file in pixels."""
        return self.pinhole.width, self.pinhole.height

    def projection(self, bev_to_global: Tensor) -> Tensor:
        """``bev_to_image`` (4, 4) float64 of the image file, with the motion until the camera's exposure.

        Args:
            bev_to_global: (4, 4) float64 of the reference instant.
        """
        return self.pinhole.projection(self.ego_to_global, bev_to_global)


@dataclass(frozen=True)
class SampleRecord:
    """Cameras and poses of one key frame.

    Attributes:
        token, scene_token: nuScenes tokens.
        timestamp_s: time of the sample.
        ego_to_global, bev_to_global: (4, 4) float64 at the time of the LIDAR_TOP key frame.
        cameras: in the order of the configuration.
    """

    token: str
    scene_token: str
    timestamp_s: float
    ego_to_global: Tensor
    bev_to_global: Tensor
    cameras: tuple[CameraRecord, ...]


@dataclass(frozen=True)
class Annotations:
    """Ground truth of one sample, one entry a box of a detection class.

    Attributes:
        boxes: in the BEV frame; velocity NaN where the devkit has none.
        vehicles: (k, 9) rows as of ``boxes``, of all ``vehicle.*``: those of them that are a detection class,
            and emergency vehicles. The other attributes say nothing of them.
        tokens: annotation tokens.
        attributes: nuScenes attribute names, '' where there is none.
        points: lidar plus radar points inside.
        visibility: nuScenes visibility level 1 to 4 (40, 60, 80 and 100 % visible at most), 0 if unknown.
    """

    boxes: Boxes3D
    vehicles: Tensor
    tokens: list[str]
    attributes: list[str]
    points: list[int]
    visibility: list[int]


@dataclass(frozen=True)
class SceneRecord:
    """Name, location and samples of one scene.

    Attributes:
        token, name: of the scene.
        location: map name, for example singapore-onenorth.
        sample_tokens: key frames in time order.
    """

    token: str
    name: str
    location: str
    sample_tokens: tuple[str, ...]


class NuScenesReader:
    """Samples, calibration and annotations of a nuScenes-format data set.

    A reader opens the tables once and looks records up by token; it may be shared by several data sets
    and is copied to loader processes that are spawned by opening the tables again.

    Args:
        config: root, version, cameras, bev_frame and min_points are used.

    Attributes:
        config: as given.
        root: data root.
        nusc: the devkit's object, over the records that can be used.
        damages: sentences about damaged records, one a kind, with the number of records of that kind.

    Raises:
        DataError: see :func:`~bevperception.data.tables.open_tables`.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.root = Path(config.root).expanduser()
        opened = open_tables(self.root, config.version)
        self.nusc = opened.nusc
        self.damages = [(damage.first, damage.count) for damage in opened.damages]
        self._lost, self._camera_mounts = opened.lost, opened.cameras
        self._attribute_names = {record["token"]: record["name"] for record in self.nusc.attribute}
        self._cameras: dict[tuple[str, int, int], PinholeCamera] = {}

    def __reduce__(self) -> tuple[Callable[[DataConfig], NuScenesReader], tuple[DataConfig]]:
        return (type(self), (self.config,))

    def scenes(self, split: str) -> list[SceneRecord]:
        """Scenes of a split that are in the tables, in the tables' order.

        Args:
            split: predefined, or named in splits.json.

        Raises:
            ConfigError: if no such split exists.
            DataError: if none of its scenes is there.
        """
        names = set(
            scenes_of_split(
                split, self.root / self.nusc.version, [scene["name"] for scene in self.nusc.scene]
            )
        )
        return [self._scene(record) for record in self.nusc.scene if record["name"] in names]

    def scene(self, name: str) -> SceneRecord:
        """One scene.

        Args:
            name: its name, its token, or the token of one of its samples.

        Raises:
            DataError: if the tables have no such scene.
        """
        owner = next((s["scene_token"] for s in self.nusc.sample if s["token"] == name), name)
        for record in self.nusc.scene:
            if owner in (record["name"], record["token"]):
                return self._scene(record)
        shown = ", ".join(scene["name"] for scene in self.nusc.scene[:8])
        raise DataError(
            f"{self.root / self.nusc.version} has no scene or sample {name!r}\nscenes there: {shown}"
        )

    def fault(self, token: str) -> str | None:
        """Why a sample cannot be used: its tables are damaged, or a sensor is missing; None if it can.

        Only the reference sensor and the configured cameras count.

        Args:
            token: sample token.
        """
        wanted = (REFERENCE_SENSOR, *self.config.cameras)
        for loss in self._lost.get(token, ()):
            if loss.channel is None or loss.channel in wanted:
                where = f", {loss.channel}" if loss.channel else ""
                return f"sample {token}{where}: {loss.reason}"
        channels = self.nusc.get("sample", token)["data"]
        for channel in wanted:
            if channel not in channels:
                existing = ", ".join(channels) or "none at all"
                return f"sample {token} has no key frame of {channel}; it has {existing}"
        for channel in self.config.cameras:
            mount = self.nusc.get("sample_data", channels[channel])["calibrated_sensor_token"]
            if mount not in self._camera_mounts:
                return (
                    f"sample {token}, {channel}: calibrated_sensor.json, record {show(mount)}: "
                    "camera_intrinsic is no camera's matrix: the sensor is not a camera"
                )
        return None

    def faulty(self, tokens: Iterable[str]) -> dict[str, str]:
        """The samples that cannot be used, with the reason; see :meth:`fault`."""
        faults = ((token, self.fault(token)) for token in tokens)
        return {token: reason for token, reason in faults if reason is not None}

    def sample(self, token: str) -> SampleRecord:
        """Read calibration, poses and image files of a sample.

        Args:
            token: sample token.

        Raises:
            SampleError: if its tables are damaged, or a sensor's key frame is missing.
        """
        sample = self._get("sample", token, token)
        reason = self.fault(token)
        if reason is not None:
            raise SampleError(reason, token)
        reference = self.sensor_data(sample, REFERENCE_SENSOR)
        ego_to_global = self._pose("ego_pose", reference["ego_pose_token"], token)
        bev_to_global = ego_to_global
        if self.config.bev_frame == "lidar":
            mount = reference["calibrated_sensor_token"]
            bev_to_global = ego_to_global @ self._pose("calibrated_sensor", mount, token)
        return SampleRecord(
            token=token,
            scene_token=sample["scene_token"],
            timestamp_s=sample["timestamp"] * 1e-6,
            ego_to_global=ego_to_global,
            bev_to_global=bev_to_global,
            cameras=tuple(self._camera(sample, channel) for channel in self.config.cameras),
        )

    def annotations(self, sample: SampleRecord) -> Annotations:
        """Read boxes of the ten detection classes and of all vehicles, with at least ``min_points`` points.

        Args:
            sample: from :meth:`sample`.

        Returns:
            boxes in the sample's BEV frame; possibly none.
        """
        rows: list[list[float]] = []
        records: list[dict[str, Any]] = []
        for annotation_token in self._get("sample", sample.token, sample.token)["anns"]:
            record = self._get("sample_annotation", annotation_token, sample.token)
            points = record["num_lidar_pts"] + record["num_radar_pts"]
            name = record["category_name"]
            wanted = name.startswith(VEHICLE_CATEGORY) or category_to_detection_name(name) is not None
            if not wanted or points < self.config.min_points:
                continue
            velocity = self.nusc.box_velocity(annotation_token)
            rows.append([*record["translation"], *record["size"], *record["rotation"], *velocity])
            records.append(record)
        global_rows = torch.tensor(rows, dtype=torch.float64).reshape(-1, 13)
        values = _boxes_in_bev(global_rows, sample.bev_to_global).float()
        vehicles = [row for row, r in enumerate(records) if r["category_name"].startswith(VEHICLE_CATEGORY)]
        names = [category_to_detection_name(r["category_name"]) for r in records]
        detected = [row for row, name in enumerate(names) if name is not None]
        records = [records[row] for row in detected]
        return Annotations(
            boxes=Boxes3D(
                values[detected],
                torch.tensor([_CLASS_INDEX[names[row]] for row in detected], dtype=torch.int64),
            ),
            vehicles=values[vehicles],
            tokens=[r["token"] for r in records],
            attributes=[self._attribute(r) for r in records],
            points=[r["num_lidar_pts"] + r["num_radar_pts"] for r in records],
            visibility=[int(r["visibility_token"] or 0) for r in records],
        )

    def previous(self, token: str, count: int) -> list[str]:
        """Tokens of up to ``count`` key frames of the same scene before a sample, nearest first."""
        return self._linked(token, count, "prev")

    def following(self, token: str, count: int) -> list[str]:
        """Tokens of up to ``count`` key frames of the same scene after a sample, nearest first."""
        return self._linked(token, count, "next")

    def _linked(self, token: str, count: int, link: str) -> list[str]:
        tokens: list[str] = []
        other = self._get("sample", token, token)[link]
        while other and len(tokens) < count:
            tokens.append(other)
            other = self._get("sample", other, token)[link]
        return tokens

    def location(self, scene_token: str) -> str:
        """Map name of a scene, for example singapore-onenorth."""
        scene = self.nusc.get("scene", scene_token)
        return str(self.nusc.get("log", scene["log_token"])["location"])

    def sensor_data(self, sample: dict[str, Any], channel: str) -> dict[str, Any]:
        """The key-frame record of a sensor.

        Args:
            sample: record of the sample table.
            channel: for example LIDAR_TOP.

        Raises:
            SampleError: if there is none.
        """
        if channel not in sample["data"]:
            raise SampleError(
                f"sample {sample['token']} has no key frame of {channel}; it has {', '.join(sample['data'])}",
                sample["token"],
            )
        return self._get("sample_data", sample["data"][channel], sample["token"])

    def _scene(self, record: dict[str, Any]) -> SceneRecord:
        tokens: list[str] = []
        token = record["first_sample_token"]
        while token:
            tokens.append(token)
            token = self._get("sample", token, token)["next"]
        return SceneRecord(record["token"], record["name"], self.location(record["token"]), tuple(tokens))

    def _get(self, table: str, token: str, sample_token: str) -> dict[str, Any]:
        try:
            record: dict[str, Any] = self.nusc.get(table, token)
        except KeyError as error:
            raise SampleError(
                f"sample {sample_token} needs {table} {token}, which {self.root / self.nusc.version} lacks",
                sample_token,
            ) from error
        return record

    def _pose(self, table: str, token: str, sample_token: str) -> Tensor:
        record = self._get(table, token, sample_token)
        rotation = torch.tensor(record["rotation"], dtype=torch.float64)
        translation = torch.tensor(record["translation"], dtype=torch.float64)
        return pose_matrix(translation, rotation)

    def _camera(self, sample: dict[str, Any], channel: str) -> CameraRecord:
        data = self.sensor_data(sample, channel)
        return CameraRecord(
            channel=channel,
            path=self.root / data["filename"],  # inside the root: a rule of the tables
            timestamp_s=data["timestamp"] * 1e-6,
            pinhole=self._pinhole(data, sample["token"]),
            ego_to_global=self._pose("ego_pose", data["ego_pose_token"], sample["token"]),
        )

    def _pinhole(self, data: dict[str, Any], sample_token: str) -> PinholeCamera:
        """Calibration of a camera's image; a scene's samples share it, so it is kept."""
        key = (data["calibrated_sensor_token"], data["width"], data["height"])
        if key not in self._cameras:
            token, width, height = key
            record = self._get("calibrated_sensor", token, sample_token)
            intrinsics = torch.tensor(record["camera_intrinsic"], dtype=torch.float64)
            camera_to_ego = self._pose("calibrated_sensor", token, sample_token)
            self._cameras[key] = PinholeCamera(width, height, intrinsics, camera_to_ego)
        return self._cameras[key]

    def _attribute(self, annotation: dict[str, Any]) -> str:
        tokens = annotation["attribute_tokens"]
        return str(self._attribute_names[tokens[0]]) if tokens else ""


def _boxes_in_bev(rows: Tensor, bev_to_global: Tensor) -> Tensor:
    """Convert nuScenes rows (centre 3, size w l h, quaternion 4, velocity 3; global) to (n, 9) BEV box rows.

    The full rotation is used: heading and velocity are turned in 3D, then their planar part is kept.
    """
    global_to_bev = invert_rigid(bev_to_global)
    rotation = global_to_bev[:3, :3]
    centre = transform_points(rows[:, :3], global_to_bev)
    heading = (rotation @ rotation_from_quaternion(rows[:, 6:10]))[..., 0]
    yaw = torch.atan2(heading[:, 1], heading[:, 0])
    velocity = rows[:, 10:13] @ rotation.T
    return torch.cat((centre, rows[:, [4, 3, 5]], yaw[:, None], velocity[:, :2]), dim=-1)
