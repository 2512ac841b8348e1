"""Whether a nuScenes-format data root can be used, and what is missing from it."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from nuscenes.eval.detection.utils import category_to_detection_name

from bevperception.data.images import read_image
from bevperception.data.nuscenes import REFERENCE_SENSOR, is_valid_intrinsics, load_tables
from bevperception.data.splits import describe_splits, usable_splits
from bevperception.errors import DataError
from bevperception.geometry import rotation_from_quaternion
from bevperception.taxonomy import DETECTION_CLASSES

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

TABLES: Final = (
    *("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose"),
    *("log", "scene", "sample", "sample_data", "sample_annotation", "map"),
)
"""The tables of a nuScenes version, one JSON file each."""

CAMERA_AZIMUTHS_DEG: Final = {
    "CAM_FRONT": 0.0,
    "CAM_FRONT_LEFT": 55.0,
    "CAM_FRONT_RIGHT": -55.0,
    "CAM_BACK": 180.0,
    "CAM_BACK_LEFT": 110.0,
    "CAM_BACK_RIGHT": -110.0,
}
"""Where the nuScenes cameras look, degrees counter-clockwise from straight ahead, to within a few."""

AZIMUTH_TOLERANCE_DEG: Final = 40.0
MAX_MOUNT_DISTANCE_M: Final = 20.0

Level = Literal["ok", "lost", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: 'ok'; 'lost' for what can be done without; 'FAIL' for what cannot.
        subject: what was looked at.
        text: what was found; where it is not 'ok', what that costs. Further lines are details.
    """

    level: Level
    subject: str
    text: str


def check_data_root(root: Path, version: str | None, cameras: Sequence[str]) -> Iterator[Finding]:
    """Look through a data root; findings come as they are made, since large sets take minutes.

    Args:
        root: folder that holds samples/, maps/ and the version's tables.
        version: for example v1.0-mini; None takes v1.0-trainval or else the first one found.
        cameras: channels that a sample must have.

    Yields:
        findings; the root is unusable if one of them says 'FAIL'.
    """
    if not root.is_dir():
        yield Finding("FAIL", "data root", f"{root} is not a folder")
        return
    versions = sorted(p.parent.name for p in root.glob("*/sample.json"))
    if version is None and versions:
        version = "v1.0-trainval" if "v1.0-trainval" in versions else versions[0]
    if version is None:
        yield Finding("FAIL", "versions", f"no folder in {root} holds a sample.json\n{_hint_at_parent(root)}")
        return
    found = ", ".join(versions) or "none"
    yield Finding("ok" if version in versions else "FAIL", "version", f"{version}; there: {found}")
    if version not in versions:
        return
    broken = list(_table_problems(root / version))
    if broken:
        yield Finding("FAIL", "tables", "\n".join(broken))
        return
    try:
        nusc = load_tables(root, version)
    except DataError as error:
        yield Finding("FAIL", "tables", str(error))
        return
    yield Finding(
        "ok",
        "tables",
        f"13 of 13; {len(nusc.scene)} scenes, {len(nusc.sample)} samples, {len(nusc.log)} logs",
    )
    yield from _check_samples(nusc, root, cameras)
    yield _check_annotations(nusc)
    yield _check_splits(nusc, root)
    yield _check_maps(nusc, root)
    yield _check_can_bus(nusc, root)


def _hint_at_parent(root: Path) -> str:
    if (root / "sample.json").is_file():
        return f"these are the tables themselves: give the folder above, {root.resolve().parent}"
    return "give the folder that holds v1.0-mini/ or another version, samples/ and maps/"


def _table_problems(folder: Path) -> Iterator[str]:
    """Missing or damaged tables; small ones are parsed here, the devkit parses the rest."""
    for table in TABLES:
        path = folder / f"{table}.json"
        if not path.is_file():
            yield f"{path.name} is missing"
            continue
        try:
            with path.open("rb") as file:
                file.seek(-min(64, path.stat().st_size), os.SEEK_END)
                complete = file.read().rstrip().endswith(b"]")
        except OSError as error:
            yield f"{path.name} cannot be read: {error.strerror}"
            continue
        if not complete:
            yield f"{path.name} does not end as a JSON list does; it is truncated: copy it again"


def _check_samples(nusc: NuScenes, root: Path, cameras: Sequence[str]) -> Iterator[Finding]:
    """Sensors, images and calibration; a sample is usable if nothing of its own is missing."""
    data = {record["token"]: record for record in nusc.sample_data if record["is_key_frame"]}
    channels = sorted({nusc.get("sensor", c["sensor_token"])["channel"] for c in nusc.calibrated_sensor})
    bad: set[str] = set()
    lacking: Counter[str] = Counter()
    for sample in nusc.sample:
        missing = [c for c in (REFERENCE_SENSOR, *cameras) if sample["data"].get(c) not in data]
        lacking.update(missing)
        if missing:
            bad.add(sample["token"])
    if lacking:
        listed = ", ".join(f"{channel} in {count}" for channel, count in lacking.most_common())
        yield Finding(
            "lost",
            "sensors",
            f"samples lack key frames: {listed}; those cannot be used\nchannels: {channels}",
        )
    else:
        yield Finding("ok", "sensors", f"{REFERENCE_SENSOR} and {len(cameras)} cameras in every sample")
    shots = [
        (sample["token"], data[sample["data"][channel]])
        for sample in nusc.sample
        for channel in cameras
        if sample["data"].get(channel) in data
    ]
    yield from _check_images(root, shots, bad)
    yield _check_calibration(nusc, shots, bad)
    usable = len(nusc.sample) - len(bad)
    text = f"{usable} of {len(nusc.sample)} samples"
    if 0 < usable < len(nusc.sample):
        text += "; the others stop training, or are counted and left out with data.bad_samples=skip"
    yield Finding("FAIL" if usable == 0 else "lost" if bad else "ok", "usable", text)


def _check_images(root: Path, shots: list[tuple[str, dict[str, Any]]], bad: set[str]) -> Iterator[Finding]:
    """Files that exist and are not empty, and one of each camera decoded."""
    folders: dict[str, dict[str, int]] = {}
    missing: list[str] = []
    for token, record in shots:
        folder, _, name = record["filename"].rpartition("/")
        if folder not in folders:
            folders[folder] = _file_sizes(root / folder)
        if not folders[folder].get(name):
            missing.append(record["filename"])
            bad.add(token)
    text = f"{len(shots) - len(missing)} of {len(shots)} key-frame images present"
    if missing:
        more = f"\n... and {len(missing) - 3} more" if len(missing) > 3 else ""
        yield Finding("lost", "images", f"{text}; missing or empty:\n" + "\n".join(missing[:3]) + more)
    else:
        yield Finding("ok", "images", text)
    absent = set(missing)
    first = {r["channel"]: (t, r) for t, r in reversed(shots) if r["filename"] not in absent}
    yield from _check_decoding(root, first, bad)


def _check_decoding(
    root: Path, first: dict[str, tuple[str, dict[str, Any]]], bad: set[str]
) -> Iterator[Finding]:
    damaged: list[str] = []
    for token, record in first.values():
        try:
            read_image(root / record["filename"], (record["width"], record["height"]))
        except DataError as error:
            damaged.append(str(error))
            bad.add(token)
    if damaged:
        yield Finding("lost", "decoding", "\n".join(damaged))
    elif first:
        sizes = Counter(f"{r['width']}x{r['height']}" for _, r in first.values())
        yield Finding("ok", "decoding", f"one image of each camera decodes: {', '.join(sizes)}")


def _file_sizes(folder: Path) -> dict[str, int]:
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def _check_calibration(nusc: NuScenes, shots: list[tuple[str, dict[str, Any]]], bad: set[str]) -> Finding:
    users: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for token, record in shots:
        users.setdefault(record["calibrated_sensor_token"], []).append((token, record))
    wrong: list[str] = []
    odd: list[str] = []
    for mount_token, shots_of in users.items():
        record = shots_of[0][1]
        mount = nusc.get("calibrated_sensor", mount_token)
        problem = _calibration_problem(mount)
        if problem:
            wrong.append(
                f"{record['channel']}, {mount_token}: {problem}; its {len(shots_of)} samples are lost"
            )
            bad.update(token for token, _ in shots_of)
            continue
        oddity = _calibration_oddity(record["channel"], mount, record["width"], record["height"])
        if oddity:
            odd.append(f"{record['channel']}, {mount_token}: {oddity}")
    lines = wrong + odd
    if not lines:
        return Finding("ok", "calibration", f"{len(users)} camera mounts look sound")
    if odd:
        lines.append("boxes of an odd camera may not lie on the objects: look with tools/visualize.py")
    return Finding("lost", "calibration", "\n".join(lines[:8]))


def _calibration_problem(mount: dict[str, Any]) -> str:
    """Why a calibration cannot be used; '' if it can."""
    if not is_valid_intrinsics(torch.tensor(mount["camera_intrinsic"], dtype=torch.float64)):
        return f"camera_intrinsic {mount['camera_intrinsic']} is not a finite invertible 3x3 matrix"
    pose = [*mount["translation"], *mount["rotation"]]
    if not all(math.isfinite(v) for v in pose) or math.hypot(*mount["rotation"]) < 1e-6:
        return f"translation {mount['translation']}, rotation {mount['rotation']} is no pose"
    return ""


def _calibration_oddity(channel: str, mount: dict[str, Any], width: int, height: int) -> str:
    """What is unlikely about a calibration that can be used; '' if nothing is."""
    (fx, _, cx), (_, fy, cy), _ = mount["camera_intrinsic"]
    if fx <= 0 or fy <= 0 or not (0 < cx < width and 0 < cy < height):
        return f"focal lengths {fx:.0f}, {fy:.0f} or principal point ({cx:.0f}, {cy:.0f}) of {width}x{height}"
    if abs(math.hypot(*mount["rotation"]) - 1) > 1e-3:
        return f"the quaternion {mount['rotation']} has not length 1"
    if math.hypot(*mount["translation"]) > MAX_MOUNT_DISTANCE_M:
        return f"it is mounted {math.hypot(*mount['translation']):.0f} m from the ego origin"
    camera_to_ego = rotation_from_quaternion(torch.tensor(mount["rotation"], dtype=torch.float64))
    x, y, z = camera_to_ego[:, 2].tolist()  # the optical axis
    azimuth = math.degrees(math.atan2(y, x))
    if abs(z) > 0.6:
        return f"it looks {'up' if z > 0 else 'down'} at {math.degrees(math.asin(abs(z))):.0f} degrees"
    off = abs((azimuth - CAMERA_AZIMUTHS_DEG.get(channel, azimuth) + 180) % 360 - 180)
    if off > AZIMUTH_TOLERANCE_DEG:
        return f"it looks to {azimuth:.0f} degrees, where {CAMERA_AZIMUTHS_DEG[channel]:.0f} is usual"
    return ""


def _check_annotations(nusc: NuScenes) -> Finding:
    if not nusc.sample_annotation:
        return Finding("lost", "annotations", "none: predicting works, training and evaluation do not")
    counts = Counter(category_to_detection_name(a["category_name"]) for a in nusc.sample_annotation)
    there = {name: counts[name] for name in DETECTION_CLASSES if counts[name]}
    text = f"{sum(there.values())} boxes in {len(there)} of {len(DETECTION_CLASSES)} detection classes"
    absent = [name for name in DETECTION_CLASSES if name not in there]
    if absent:
        text += f"\nabsent, so their AP is 0 in mAP and NDS: {', '.join(absent)}"
    return Finding("lost" if absent else "ok", "annotations", text)


def _check_splits(nusc: NuScenes, root: Path) -> Finding:
    names = [scene["name"] for scene in nusc.scene]
    folder = root / nusc.version
    try:
        usable = usable_splits(folder, names)
        text = describe_splits(folder, names)
    except DataError as error:
        return Finding("FAIL", "splits", f"{error}\nmend or remove it: no split can be chosen until then")
    if not usable:
        return Finding("lost", "splits", f"nothing to train on or to evaluate\n{text}")
    return Finding("ok", "splits", text.partition(": ")[2])


def _check_maps(nusc: NuScenes, root: Path) -> Finding:
    problems: list[str] = []
    locations = sorted({log["location"] for log in nusc.log})
    for location in locations:
        path = root / "maps" / "expansion" / f"{location}.json"
        if not path.is_file():
            problems.append(f"maps/expansion/{path.name} is missing")
            continue
        try:
            version = json.loads(path.read_text()).get("version", "none")
        except (ValueError, AttributeError) as error:
            problems.append(f"maps/expansion/{path.name} is not a JSON object: {error}")
            continue
        if str(version) < "1.3":
            problems.append(f"maps/expansion/{path.name} has version {version}; the devkit needs 1.3")
    if not problems:
        return Finding("ok", "map expansion", f"{len(locations)} locations: {', '.join(locations)}")
    cost = "the map layers of the segmentation head get no labels there; boxes and vehicle still train"
    return Finding("lost", "map expansion", "\n".join([cost, *problems]))


def _check_can_bus(nusc: NuScenes, root: Path) -> Finding:
    sizes = _file_sizes(root / "can_bus")
    missing = sorted(s["name"] for s in nusc.scene if not sizes.get(f"{s['name']}_pose.json"))
    text = f"{len(nusc.scene) - len(missing)} of {len(nusc.scene)} scenes"
    if not missing:
        return Finding("ok", "CAN bus", text)
    cost = f"{text}; where it is missing, speed and turn rate are derived from the ego poses"
    more = " ..." if len(missing) > 8 else ""
    return Finding("lost", "CAN bus", f"{cost}\nwithout: {', '.join(missing[:8])}{more}")
