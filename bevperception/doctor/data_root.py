"""Check whether a nuScenes-format data root can be used, and what is missing from it."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from nuscenes.eval.detection.utils import category_to_detection_name

from bevperception.config import DataConfig
from bevperception.data.can_bus import CanBusReader
from bevperception.data.ground_truth import has_ground_truth
from bevperception.data.images import read_image
from bevperception.data.map_labels import load_map
from bevperception.data.nuscenes import REFERENCE_SENSOR, NuScenesReader
from bevperception.data.splits import describe_splits, usable_splits
from bevperception.data.table_checks import check_tables
from bevperception.data.tables import read_tables
from bevperception.errors import DataError
from bevperception.evaluation.detection import class_range_by_name
from bevperception.geometry import rotation_from_quaternion
from bevperception.taxonomy import DETECTION_CLASSES

if TYPE_CHECKING:
    from nuscenes.nuscenes import NuScenes

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
MOST_LINES: Final = 8
"""So many details of one kind are shown."""

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
    """Check a data root; findings are yielded one by one, since large sets take minutes.

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
    listed = ", ".join(versions) or "none"
    yield Finding("ok" if version in versions else "FAIL", "version", f"{version}; there: {listed}")
    if version not in versions:
        return
    try:
        reader = NuScenesReader(DataConfig(root=str(root), version=version, cameras=tuple(cameras)))
    except DataError as error:
        yield Finding("FAIL", "tables", _every_problem(root / version, error))
        return
    nusc = reader.nusc
    yield Finding(
        "ok",
        "tables",
        f"13 of 13; {len(nusc.scene)} scenes, {len(nusc.sample)} samples, {len(nusc.log)} logs",
    )
    yield _check_records(reader)
    bad = set(reader.faulty(sample["token"] for sample in nusc.sample))
    yield from _check_samples(reader, bad)
    yield from _check_annotations(reader)
    yield _check_splits(reader, bad)
    yield _check_maps(reader)
    yield _check_can_bus(reader)


def _hint_at_parent(root: Path) -> str:
    if (root / "sample.json").is_file():
        return f"these are the tables themselves: give the folder above, {root.resolve().parent}"
    return "give the folder that holds v1.0-mini/ or another version, samples/ and maps/"


def _every_problem(folder: Path, error: DataError) -> str:
    """List every fault of the tables, where the reader stops at the first."""
    tables, problems = read_tables(folder)
    if not problems:
        problems = check_tables(tables).fatal
    more = [f"... and {len(problems) - MOST_LINES} more"] if len(problems) > MOST_LINES else []
    return "\n".join([*problems[:MOST_LINES], *more]) or str(error)


def _check_records(reader: NuScenesReader) -> Finding:
    """Report damaged records; the samples that they belong to are counted under 'usable'."""
    if not reader.damages:
        return Finding("ok", "records", "sound, and they fit together")
    total = sum(count for _, count in reader.damages)
    lines = [f"{total} damaged; samples that they belong to cannot be used"]
    for first, count in reader.damages[:MOST_LINES]:
        lines.append(first if count == 1 else f"{first} (and {count - 1} more like it)")
    if len(reader.damages) > MOST_LINES:
        lines.append(f"... and {len(reader.damages) - MOST_LINES} other kinds of damage")
    return Finding("lost", "records", "\n".join(lines))


def _check_samples(reader: NuScenesReader, bad: set[str]) -> Iterator[Finding]:
    """Check sensors, images and calibration; a sample is usable if none of its parts is missing.

    Args:
        reader: open tables.
        bad: samples that cannot be used; those without images are added.
    """
    nusc, cameras = reader.nusc, reader.config.cameras
    lacking: Counter[str] = Counter()
    for sample in nusc.sample:
        lacking.update(channel for channel in (REFERENCE_SENSOR, *cameras) if channel not in sample["data"])
    if lacking:
        listed = ", ".join(f"{channel} in {count}" for channel, count in lacking.most_common())
        channels = ", ".join(sorted({record["channel"] for record in nusc.sensor}))
        yield Finding(
            "lost",
            "sensors",
            f"samples lack key frames: {listed}; those cannot be used\nchannels: {channels}",
        )
    else:
        yield Finding("ok", "sensors", f"{REFERENCE_SENSOR} and {len(cameras)} cameras in every sample")
    shots = [
        (sample["token"], nusc.get("sample_data", sample["data"][channel]))
        for sample in nusc.sample
        for channel in cameras
        if channel in sample["data"]
    ]
    yield from _check_images(reader.root, shots, bad)
    yield _check_calibration(nusc, shots, bad)
    usable = len(nusc.sample) - len(bad)
    text = f"{usable} of {len(nusc.sample)} samples"
    if 0 < usable < len(nusc.sample):
        text += "; the others stop training, or are counted and left out with data.bad_samples=skip"
    yield Finding("FAIL" if usable == 0 else "lost" if bad else "ok", "usable", text)


def _check_images(root: Path, shots: list[tuple[str, dict[str, Any]]], bad: set[str]) -> Iterator[Finding]:
    """Check that image files exist and are not empty, and decode one of each camera."""
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
    """Report implausible calibration of usable samples; damaged records are reported elsewhere."""
    users: dict[str, dict[str, Any]] = {}
    for token, record in shots:
        if token not in bad:
            users.setdefault(record["calibrated_sensor_token"], record)
    odd: list[str] = []
    for mount_token, record in users.items():
        mount = nusc.get("calibrated_sensor", mount_token)
        oddity = _calibration_oddity(record["channel"], mount, record["width"], record["height"])
        if oddity:
            odd.append(f"{record['channel']}, {mount_token}: {oddity}")
    if odd:
        odd.append("boxes of an odd camera may not lie on the objects: look with `bevperception visualize`")
        return Finding("lost", "calibration", "\n".join(odd[-MOST_LINES:]))
    return Finding("ok", "calibration", f"{len(users)} camera mounts of usable samples look sound")


def _calibration_oddity(channel: str, mount: dict[str, Any], width: int, height: int) -> str:
    """Describe what is implausible about a usable calibration; '' for nothing."""
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


def _check_annotations(reader: NuScenesReader) -> Iterator[Finding]:
    """Check that there is ground truth, over all scenes and in each scene."""
    nusc = reader.nusc
    if not nusc.sample_annotation:
        yield Finding("lost", "annotations", "none: predicting works, training and evaluation do not")
        return
    counts = Counter(category_to_detection_name(a["category_name"]) for a in nusc.sample_annotation)
    present = {name: counts[name] for name in DETECTION_CLASSES if counts[name]}
    text = f"{sum(present.values())} boxes in {len(present)} of {len(DETECTION_CLASSES)} detection classes"
    absent = [name for name in DETECTION_CLASSES if name not in present]
    if absent:
        text += f"\nabsent, so their AP is 0 in mAP and NDS: {', '.join(absent)}"
    annotated = {sample["scene_token"] for sample in nusc.sample if sample["anns"]}
    bare = [scene["name"] for scene in nusc.scene if scene["token"] not in annotated]
    if bare:
        text += f"\nscenes without any, which would teach that nothing is there: {_first_names(bare)}"
    yield Finding("lost" if absent or bare else "ok", "annotations", text)


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_LINES]) + (" ..." if len(names) > MOST_LINES else "")


def _check_splits(reader: NuScenesReader, bad: set[str]) -> Finding:
    names = [scene["name"] for scene in reader.nusc.scene]
    folder = reader.root / reader.nusc.version
    try:
        usable = usable_splits(folder, names)
        lines = [describe_splits(folder, names)]
    except DataError as error:
        return Finding("FAIL", "splits", f"{error}\nmend or remove it: no split can be chosen until then")
    if not usable:
        return Finding("lost", "splits", f"nothing to train on or to evaluate\n{lines[0]}")
    lines[0] = lines[0].partition(": ")[2]
    tokens = {name: [t for scene in reader.scenes(name) for t in scene.sample_tokens] for name in usable}
    lost = [name for name in usable if bad.issuperset(tokens[name])]
    ranges = class_range_by_name()
    bare = [name for name in usable if not has_ground_truth(reader, tokens[name], 1, ranges)]
    if lost:
        lines.append(f"without any sample that can be used: {_first_names(lost)}")
    if bare:
        lines.append(f"without ground truth, only to predict on: {_first_names(bare)}")
    return Finding("lost" if lost or bare else "ok", "splits", "\n".join(lines))


def _check_maps(reader: NuScenesReader) -> Finding:
    """Load the map expansions as training and evaluation load them."""
    problems: list[str] = []
    damaged = False
    locations = sorted({log["location"] for log in reader.nusc.log})
    for location in locations:
        try:
            town_map = load_map(reader.root, location, reader.config.divider_width_m)
        except DataError as error:
            problems.append(str(error))
            damaged = True
            continue
        if town_map is None:
            problems.append(f"maps/expansion/{location}.json is missing")
    if not problems:
        return Finding("ok", "map expansion", f"{len(locations)} locations: {', '.join(locations)}")
    cost = "the map layers of the segmentation head get no labels there; boxes and vehicle still train"
    if damaged:
        cost = "a damaged map stops training and evaluation: mend it, or remove it to do without"
    return Finding("FAIL" if damaged else "lost", "map expansion", "\n".join([cost, *problems]))


def _check_can_bus(reader: NuScenesReader) -> Finding:
    can_bus = CanBusReader(reader)
    missing: list[str] = []
    damaged: list[str] = []
    for scene in reader.nusc.scene:
        try:
            if not can_bus.has_messages(scene["name"]):
                missing.append(scene["name"])
        except DataError as error:
            damaged.append(str(error))
    total = len(reader.nusc.scene)
    text = f"{total - len(missing) - len(damaged)} of {total} scenes"
    if not missing and not damaged:
        return Finding("ok", "CAN bus", text)
    lines = [text]
    if missing:
        lines[0] += "; where it is missing, speed and turn rate are derived from the ego poses"
        lines.append(f"without: {_first_names(missing)}")
    if damaged:
        lines += ["a model that reads it cannot use these scenes:", *damaged[:MOST_LINES]]
    return Finding("lost", "CAN bus", "\n".join(lines))
