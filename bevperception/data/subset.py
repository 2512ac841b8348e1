"""Cut a small data set from a large one: the first key frames of a scene, with complete tables.

The pictures, maps and CAN-bus files are linked, not copied; the source is only read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nuscenes.nuscenes import NuScenes

from bevperception.errors import DataError
from bevperception.files import write_json, writing_folder

LINKED_FOLDERS = ("samples", "maps", "can_bus")
WHOLE_TABLES = ("category", "attribute", "visibility", "sensor")
ADDED_BY_THE_DEVKIT = {
    "sample": ("anns", "data"),
    "sample_data": ("sensor_modality", "channel"),
    "sample_annotation": ("category_name",),
    "log": ("map_token",),
    "map": ("mask",),
}
"""Shortcuts that opening the tables puts into their records."""

Record = dict[str, Any]


def write_subset(
    nusc: NuScenes, scene_name: str, key_frames: int, target: Path, version: str, split: str
) -> list[str]:
    """Write the first key frames of a scene as a data set.

    Links between records that would lead out of the subset are cut, so an annotation at an end of it
    may lose its velocity.

    Args:
        nusc: the source, opened by the devkit.
        scene_name: for example scene-0061.
        key_frames: how many; fewer if the scene is shorter.
        target: new data root; an earlier subset there is replaced, anything else refused.
        version: name of the new tables.
        split: name of the split, in ``splits.json``, that holds the scene.

    Returns:
        sample tokens.

    Raises:
        DataError: if the scene does not exist, or ``target`` holds something else.
    """
    scene = next((s for s in nusc.scene if s["name"] == scene_name), None)
    if scene is None:
        raise DataError(f"no scene {scene_name!r} in {nusc.dataroot}, version {nusc.version}")
    if target.exists() and not (target / version / "splits.json").is_file():
        raise DataError(
            f"{target} exists and is no subset written earlier; remove it or choose another folder"
        )
    tokens = _first_samples(nusc, scene, key_frames)
    tables = _cut_tables(nusc, scene, tokens)
    with writing_folder(target, replace=True) as partial:
        for name, records in tables.items():
            write_json(partial / version / f"{name}.json", records)
        write_json(partial / version / "splits.json", {split: [scene_name]})
        source = Path(nusc.dataroot).resolve()
        for folder in LINKED_FOLDERS:
            if (source / folder).is_dir():
                (partial / folder).symlink_to(source / folder, target_is_directory=True)
    return tokens


def _first_samples(nusc: NuScenes, scene: Record, count: int) -> list[str]:
    tokens: list[str] = []
    token = scene["first_sample_token"]
    while token and len(tokens) < count:
        tokens.append(token)
        token = nusc.get("sample", token)["next"]
    return tokens


def _cut_tables(nusc: NuScenes, scene: Record, tokens: list[str]) -> dict[str, list[Record]]:
    kept = set(tokens)
    data = [r for r in nusc.sample_data if r["sample_token"] in kept and r["is_key_frame"]]
    annotations = [r for r in nusc.sample_annotation if r["sample_token"] in kept]
    poses = {r["ego_pose_token"] for r in data}
    mounts = {r["calibrated_sensor_token"] for r in data}
    first_last = {
        "first_sample_token": tokens[0],
        "last_sample_token": tokens[-1],
        "nbr_samples": len(tokens),
    }
    tables = {name: list(getattr(nusc, name)) for name in WHOLE_TABLES}
    tables |= {
        "scene": [scene | first_last],
        "sample": _relink([nusc.get("sample", token) for token in tokens]),
        "sample_data": _relink(data),
        "sample_annotation": _relink(annotations),
        "instance": _instances(nusc, annotations),
        "ego_pose": [r for r in nusc.ego_pose if r["token"] in poses],
        "calibrated_sensor": [r for r in nusc.calibrated_sensor if r["token"] in mounts],
        "log": [r for r in nusc.log if r["token"] == scene["log_token"]],
        "map": [
            r | {"log_tokens": [scene["log_token"]]}
            for r in nusc.map
            if scene["log_token"] in r["log_tokens"]
        ],
    }
    return {name: [_plain(name, r) for r in records] for name, records in tables.items()}


def _relink(records: list[Record]) -> list[Record]:
    known = {r["token"] for r in records}
    return [r | {end: r[end] if r[end] in known else "" for end in ("prev", "next")} for r in records]


def _instances(nusc: NuScenes, annotations: list[Record]) -> list[Record]:
    by_instance: dict[str, list[str]] = {}
    for record in annotations:
        by_instance.setdefault(record["instance_token"], []).append(record["token"])
    return [
        nusc.get("instance", token)
        | {
            "nbr_annotations": len(tokens),
            "first_annotation_token": tokens[0],
            "last_annotation_token": tokens[-1],
        }
        for token, tokens in by_instance.items()
    ]


def _plain(table: str, record: Record) -> Record:
    """The record as it is in the tables: without what the devkit adds on opening."""
    added = ADDED_BY_THE_DEVKIT.get(table, ())
    return {key: value for key, value in record.items() if key not in added}
