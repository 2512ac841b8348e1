"""Build the rows of nuScenes' tables, of all scenes together and of one scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bevperception.world import seeds
from bevperception.world.can_messages import quaternion
from bevperception.world.cast import Cast
from bevperception.world.catalogue import KINDS
from bevperception.world.rig import (
    CAMERAS,
    LIDAR_CHANNEL,
    LIDAR_POSITION_M,
    LIDAR_ROTATION_WXYZ,
)
from bevperception.world.settings import LOCATIONS, WorldConfig

Array = NDArray[np.float64]
Record = dict[str, Any]
Tables = dict[str, list[Record]]

TABLES: Final = (
    *("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose"),
    *("log", "scene", "sample", "sample_data", "sample_annotation", "map"),
)
SCENE_TABLES: Final = ("instance", "ego_pose", "log", "scene", "sample", "sample_data", "sample_annotation")
VISIBILITY: Final = ((0.4, "v0-40"), (0.6, "v40-60"), (0.8, "v60-80"), (1.01, "v80-100"))
ATTRIBUTES: Final = (
    *("cycle.with_rider", "cycle.without_rider", "pedestrian.moving", "pedestrian.standing"),
    *("pedestrian.sitting_lying_down", "vehicle.moving", "vehicle.parked", "vehicle.stopped"),
)
CHANNELS: Final = (*(mount.channel for mount in CAMERAS), LIDAR_CHANNEL)


@dataclass(frozen=True)
class Shot:
    """One image or lidar file of a sensor.

    Attributes:
        channel: of the sensor.
        frame: key frame that it belongs to.
        key: whether it is that key frame's own.
        stamp_us: time.
        pose: (3,) x, y, yaw of the ego car then.
        filename: under the data root.
    """

    channel: str
    frame: int
    key: bool
    stamp_us: int
    pose: Array
    filename: str


def visibility_level(visible_px: int, silhouette_px: int) -> str:
    """nuScenes' visibility token, 1 to 4, of an actor by its pixels in all six pictures."""
    share = visible_px / silhouette_px if silhouette_px else 0.0
    return str(next(level for level, (limit, _) in enumerate(VISIBILITY, start=1) if share < limit))


def shared_tables(config: WorldConfig, logs: Sequence[Record]) -> Tables:
    """The tables that do not belong to scenes.

    Args:
        config: settings.
        logs: all records of the table log.
    """
    seed = config.seed
    tables: Tables = {
        "category": [
            {
                "token": seeds.token(seed, "category", kind.category),
                "name": kind.category,
                "description": name,
            }
            for name, kind in KINDS.items()
        ],
        "attribute": [
            {"token": seeds.token(seed, "attribute", name), "name": name, "description": ""}
            for name in ATTRIBUTES
        ],
        "visibility": [
            {
                "token": str(level),
                "level": name,
                "description": f"visibility of the whole object, {name[1:]} %",
            }
            for level, (_, name) in enumerate(VISIBILITY, start=1)
        ],
        "sensor": [
            {
                "token": seeds.token(seed, "sensor", channel),
                "channel": channel,
                "modality": "lidar" if channel == LIDAR_CHANNEL else "camera",
            }
            for channel in CHANNELS
        ],
        "calibrated_sensor": [_mount(config, channel) for channel in CHANNELS],
        "map": [],
    }
    for location in LOCATIONS:
        log_tokens = [log["token"] for log in logs if log["location"] == location]
        if log_tokens:
            tables["map"].append(
                {
                    "token": seeds.token(seed, "map", location),
                    "log_tokens": log_tokens,
                    "category": "semantic_prior",
                    "filename": map_filename(location),
                }
            )
    return tables


def map_filename(location: str) -> str:
    """The picture of a location's map, under the data root."""
    return f"maps/{location}.png"


def _mount(config: WorldConfig, channel: str) -> Record:
    record: Record = {
        "token": seeds.token(config.seed, "calibrated_sensor", channel),
        "sensor_token": seeds.token(config.seed, "sensor", channel),
    }
    for mount in CAMERAS:
        if mount.channel == channel:
            position, rotation = mount.position_m, mount.rotation_wxyz
            intrinsics = mount.intrinsics(config.image_size).tolist()
            break
    else:
        position, rotation, intrinsics = LIDAR_POSITION_M, LIDAR_ROTATION_WXYZ, []
    unit = (np.array(rotation) / np.linalg.norm(rotation)).tolist()
    return {**record, "translation": list(position), "rotation": unit, "camera_intrinsic": intrinsics}


class SceneTables:
    """Collects the rows of one scene.

    Args:
        config: settings.
        name: of the scene.
        location: of its map.
        stamps_us: time stamps of the key frames.
        description: of the scene.
    """

    def __init__(
        self, config: WorldConfig, name: str, location: str, stamps_us: list[int], description: str
    ) -> None:
        self._config, self._name = config, name
        self.rows: Tables = {table: [] for table in SCENE_TABLES}
        log = self._token("log")
        self.rows["log"].append(
            {
                "token": log,
                "logfile": name,
                "vehicle": "world",
                "date_captured": "2020-01-01",
                "location": location,
            }
        )
        samples = [self._token("sample", frame) for frame in range(len(stamps_us))]
        for frame, stamp in enumerate(stamps_us):
            self.rows["sample"].append(
                {
                    "token": samples[frame],
                    "timestamp": stamp,
                    "prev": samples[frame - 1] if frame else "",
                    "next": samples[frame + 1] if frame + 1 < len(samples) else "",
                    "scene_token": self._token("scene"),
                }
            )
        self.rows["scene"].append(
            {
                "token": self._token("scene"),
                "log_token": log,
                "nbr_samples": len(samples),
                "first_sample_token": samples[0],
                "last_sample_token": samples[-1],
                "name": name,
                "description": description,
            }
        )

    def add_shots(self, shots: list[Shot]) -> None:
        """Add the files of one sensor, in the order of time."""
        tokens = [self._token("sample_data", shot.channel, number) for number, shot in enumerate(shots)]
        for number, shot in enumerate(shots):
            pose = self._token("ego_pose", shot.channel, number)
            self.rows["ego_pose"].append(
                {
                    "token": pose,
                    "timestamp": shot.stamp_us,
                    "rotation": quaternion(float(shot.pose[2])),
                    "translation": [float(shot.pose[0]), float(shot.pose[1]), 0.0],
                }
            )
            camera = shot.channel != LIDAR_CHANNEL
            height, width = self._config.image_size if camera else (0, 0)
            self.rows["sample_data"].append(
                {
                    "token": tokens[number],
                    "sample_token": self._token("sample", shot.frame),
                    "ego_pose_token": pose,
                    "calibrated_sensor_token": seeds.token(
                        self._config.seed, "calibrated_sensor", shot.channel
                    ),
                    "timestamp": shot.stamp_us,
                    "fileformat": "jpg" if camera else "pcd",
                    "is_key_frame": shot.key,
                    "height": height,
                    "width": width,
                    "filename": shot.filename,
                    "prev": tokens[number - 1] if number else "",
                    "next": tokens[number + 1] if number + 1 < len(tokens) else "",
                }
            )

    def add_annotations(
        self,
        cast: Cast,
        states: Array,
        visibility: list[list[str]],
        lidar_points: NDArray[np.int64],
        present: NDArray[np.bool_],
    ) -> None:
        """Add the boxes of all actors.

        Args:
            cast: the actors.
            states: (frames, actors, 4) at the key frames.
            visibility: token by frame and actor.
            lidar_points: (frames, actors).
            present: (frames, actors) where there is an annotation.
        """
        for number, actor in enumerate(cast.actors):
            frames = np.flatnonzero(present[:, number]).tolist()
            if not frames:
                continue
            tokens = [self._token("sample_annotation", number, frame) for frame in frames]
            instance = self._token("instance", number)
            self.rows["instance"].append(
                {
                    "token": instance,
                    "category_token": seeds.token(self._config.seed, "category", actor.category),
                    "nbr_annotations": len(tokens),
                    "first_annotation_token": tokens[0],
                    "last_annotation_token": tokens[-1],
                }
            )
            length, width, height = actor.size_m
            for place, frame in enumerate(frames):
                x, y, yaw, speed = states[frame, number].tolist()
                attribute = actor.attribute(speed)
                attributes = [seeds.token(self._config.seed, "attribute", attribute)] if attribute else []
                self.rows["sample_annotation"].append(
                    {
                        "token": tokens[place],
                        "sample_token": self._token("sample", frame),
                        "instance_token": instance,
                        "visibility_token": visibility[frame][number],
                        "attribute_tokens": attributes,
                        "translation": [round(x, 4), round(y, 4), round(height / 2, 4)],
                        "size": [width, length, height],
                        "rotation": [round(q, 7) for q in quaternion(yaw)],
                        "prev": tokens[place - 1] if place else "",
                        "next": tokens[place + 1] if place + 1 < len(tokens) else "",
                        "num_lidar_pts": int(lidar_points[frame, number]),
                        "num_radar_pts": 0,
                    }
                )

    def _token(self, table: str, *key: str | int) -> str:
        return seeds.token(self._config.seed, table, self._name, *key)
