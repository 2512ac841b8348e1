"""Make one scene from its settings to its files: stage, render, write."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from bevperception.world.can_messages import can_bus_messages
from bevperception.world.cast import actor_bounds
from bevperception.world.ground import paint_ground
from bevperception.world.lidar import sweep
from bevperception.world.render import NOISE_MARGIN, SceneRenderer
from bevperception.world.rig import CAMERAS, LIDAR_CHANNEL
from bevperception.world.roads import Town, build_town
from bevperception.world.scenery import Prop, furnish_town
from bevperception.world.seeds import generator
from bevperception.world.settings import KEY_FRAME_PERIOD_US, LOCATIONS, SWEEP_PERIOD_US, WorldConfig
from bevperception.world.staging import Stage, set_stage
from bevperception.world.tables import SceneTables, Shot, visibility_level
from bevperception.world.weather import Weather, draw_weather

Array = NDArray[np.float64]

FIRST_STAMP_US: Final = 1_577_836_800_000_000
SCENE_STEP_US: Final = 3_600_000_000
ANNOTATED_M: Final = 65.0
NEAR_SCENERY_M: Final = 140.0


@lru_cache(maxsize=4)
def furnished_town(seed: int, location: str) -> tuple[Town, list[Prop]]:
    """Build the roads and the scenery of a location; they are kept in memory."""
    town = build_town(seed, location)
    return town, furnish_town(town, seed)


class Scene:
    """One scene of a world, ready to be rendered.

    Args:
        config: settings of the world.
        number: of the scene, from 0.

    Attributes:
        name, location: of the scene.
        stage: what is there and moves.
        weather: its light.
        start_us: time stamp of the first key frame.
        renderer: of its pictures.
    """

    def __init__(self, config: WorldConfig, number: int) -> None:
        self.config, self.number = config, number
        self.name = config.scene_names[number]
        self.location = LOCATIONS[number % len(LOCATIONS)]
        self.start_us = FIRST_STAMP_US + number * SCENE_STEP_US
        self.duration_us = (config.frames - 1) * KEY_FRAME_PERIOD_US
        town, props = furnished_town(config.seed, self.location)
        self.stage: Stage = set_stage(town, config.seed, number, self.duration_us * 1e-6)
        rng = generator(config.seed, "look", number)
        self.weather: Weather = draw_weather(rng)
        line = self.stage.ego.poses(np.arange(0.0, self.duration_us * 1e-6 + 0.5, 0.5))[:, :2]
        self.props = _props_near(props, line)
        texel_m = 0.1 if config.image_size[1] <= 800 else 0.05
        ground = paint_ground(town, self.props, self.weather, line, texel_m, rng)
        self.renderer = SceneRenderer(
            self.stage.cast, self.props, ground, self.weather, config.image_size, rng
        )

    def frame_time_s(self, frame: int) -> float:
        """Time of a key frame from the first one."""
        return frame * KEY_FRAME_PERIOD_US * 1e-6

    def noise_place(self, camera: int, index: int) -> tuple[int, int]:
        """Draw the (row, column) at which the noise pattern is cut out for a picture."""
        rng = generator(self.config.seed, "noise", self.number, camera, index)
        row, column = rng.integers(0, NOISE_MARGIN + 1, 2).tolist()
        return row, column


def _props_near(props: list[Prop], line: Array) -> list[Prop]:
    places = np.array([prop.pose[:2] for prop in props])
    away = np.linalg.norm(places[:, None] - line[None, ::2], axis=-1).min(axis=1)
    return [prop for prop, distance in zip(props, away.tolist(), strict=True) if distance < NEAR_SCENERY_M]


def write_scene(config: WorldConfig, number: int, root: FilePath) -> dict[str, list[dict[str, Any]]]:
    """Render a scene and write its pictures, lidar files and CAN-bus messages.

    Args:
        config: settings of the world.
        number: of the scene.
        root: folder of the data set under construction.

    Returns:
        the scene's rows of the tables.
    """
    scene = Scene(config, number)
    stamps = [scene.start_us + frame * KEY_FRAME_PERIOD_US for frame in range(config.frames)]
    weather = scene.weather.name
    tables = SceneTables(config, scene.name, scene.location, stamps, f"procedural world, {weather}")
    actors = len(scene.stage.cast)
    visible = np.zeros((config.frames, actors), dtype=np.int64)
    silhouette = np.zeros_like(visible)
    for camera in range(len(CAMERAS)):
        tables.add_shots(_shoot(scene, camera, root, visible, silhouette))
    shots, points = _sweep_lidar(scene, root)
    tables.add_shots(shots)
    _annotate(scene, tables, visible, silhouette, points)
    for message, content in can_bus_messages(scene.stage.ego, scene.start_us, scene.duration_us).items():
        path = root / "can_bus" / f"{scene.name}_{message}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, separators=(",", ":")))
    return tables.rows


def _shoot(
    scene: Scene, camera: int, root: FilePath, visible: NDArray[np.int64], silhouette: NDArray[np.int64]
) -> list[Shot]:
    """Write one camera's pictures; adds to the pixels of actors at the key frames."""
    config, mount = scene.config, CAMERAS[camera]
    shots = []
    for index, (frame, offset_us) in enumerate(_exposures(config)):
        key = offset_us == 0
        time_us = frame * KEY_FRAME_PERIOD_US + offset_us + mount.delay_us
        pose = scene.stage.ego.poses(np.array([time_us * 1e-6]))[0]
        view = scene.renderer.render(camera, time_us * 1e-6, pose, scene.noise_place(camera, index))
        stamp = scene.start_us + time_us
        folder = "samples" if key else "sweeps"
        name = f"{folder}/{mount.channel}/{scene.name}__{mount.channel}__{stamp}.jpg"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        done, encoded = cv2.imencode(".jpg", view.image, [cv2.IMWRITE_JPEG_QUALITY, config.jpeg_quality])
        if not done:
            raise RuntimeError("OpenCV could not encode a picture as JPEG")
        (root / name).write_bytes(encoded.tobytes())
        shots.append(Shot(mount.channel, frame, key, stamp, pose, name))
        if key:
            visible[frame] += view.visible_px
            silhouette[frame] += view.silhouette_px
    return shots


def _exposures(config: WorldConfig) -> list[tuple[int, int]]:
    """(key frame that a picture belongs to, microseconds from it) of one camera, in order.

    As in nuScenes, pictures between two key frames belong to the later one.
    """
    exposures = []
    for frame in range(config.frames):
        if config.sweeps and frame:
            exposures += [(frame, -k * SWEEP_PERIOD_US) for k in range(5, 0, -1)]
        exposures.append((frame, 0))
    return exposures


def _sweep_lidar(scene: Scene, root: FilePath) -> tuple[list[Shot], NDArray[np.int64]]:
    cast, config = scene.stage.cast, scene.config
    bounds = np.array(
        [actor_bounds(actor.size_m) for actor in cast.actors] + [prop.bounds for prop in scene.props]
    )
    prop_poses = np.array([prop.pose for prop in scene.props]).reshape(-1, 3)
    counts, shots = np.zeros((config.frames, len(cast)), dtype=np.int64), []
    for frame in range(config.frames):
        time_s = scene.frame_time_s(frame)
        pose = scene.stage.ego.poses(np.array([time_s]))[0]
        result = sweep(pose, np.concatenate((cast.at(time_s)[:, :3], prop_poses)), bounds, len(cast))
        counts[frame] = result.counts
        stamp = scene.start_us + frame * KEY_FRAME_PERIOD_US
        name = f"samples/{LIDAR_CHANNEL}/{scene.name}__{LIDAR_CHANNEL}__{stamp}.pcd.bin"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(result.points.tobytes())
        shots.append(Shot(LIDAR_CHANNEL, frame, True, stamp, pose, name))
    return shots, counts


def _annotate(
    scene: Scene,
    tables: SceneTables,
    visible: NDArray[np.int64],
    silhouette: NDArray[np.int64],
    points: NDArray[np.int64],
) -> None:
    """Annotate near actors that the lidar hits; hidden ones have no box, as in nuScenes."""
    cast, frames = scene.stage.cast, scene.config.frames
    times = np.array([scene.frame_time_s(frame) for frame in range(frames)])
    states = np.array([cast.at(time) for time in times])
    ego = scene.stage.ego.poses(times)
    near = np.linalg.norm(states[..., :2] - ego[:, None, :2], axis=-1) < ANNOTATED_M
    levels = [
        [
            visibility_level(v, s)
            for v, s in zip(visible[frame].tolist(), silhouette[frame].tolist(), strict=True)
        ]
        for frame in range(frames)
    ]
    tables.add_annotations(cast, states, levels, points, near & (points > 0))
