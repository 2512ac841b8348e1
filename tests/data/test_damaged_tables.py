"""Every kind of damage to tables gets a sentence: table, token, field and cause; what can be skipped is."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bevperception.config import DataConfig
from bevperception.data.dataset import NuScenesDataset
from bevperception.data.nuscenes import NuScenesReader
from bevperception.data.tables import load_tables, open_tables
from bevperception.doctor.data_root import check_data_root
from bevperception.errors import DataError, SampleError
from bevperception.structures import BadSample, Batch
from bevperception.taxonomy import CAMERA_NAMES
from tests.fixtures.damage import DamagedRoot, Tables
from tests.fixtures.tiny_nuscenes import KEY_FRAMES, TRAIN_SPLIT, VAL_SPLIT, VERSION

NAN = math.nan


@pytest.fixture
def damaged(tiny_nuscenes: Path, tmp_path: Path) -> DamagedRoot:
    return DamagedRoot(tiny_nuscenes, tmp_path / "data")


def record(tables: Tables, table: str, row: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = tables[table][row]
    return found


def edit(table: str, row: int, /, **fields: Any) -> Callable[[Tables], None]:
    """Set fields of a record; ``...`` takes the field away."""

    def change(tables: Tables) -> None:
        for name, value in fields.items():
            if value is ...:
                del record(tables, table, row)[name]
            else:
                record(tables, table, row)[name] = value

    return change


def repeat(table: str, row: int, /, **fields: Any) -> Callable[[Tables], None]:
    """Add a record like another."""
    return lambda tables: tables[table].append({**record(tables, table, row), **fields})


def open_reader(root: Path, **settings: Any) -> NuScenesReader:
    return NuScenesReader(DataConfig(root=str(root), version=VERSION, **settings))


def dataset(root: Path, split: str, **settings: Any) -> NuScenesDataset:
    reader = open_reader(root, image_size=(32, 64), **settings)
    return NuScenesDataset(reader, split, reader.config)


SCENE = [f"sample-{n:04d}" for n in range(KEY_FRAMES)]
"""Samples of the first scene. Rows of other tables: 7 sensors, in each 4 frames; 14 objects likewise."""

# Damage; samples of the training split that it costs; what the sentence says beside "probably".
LOSSES: dict[str, tuple[Callable[[Tables], None], list[str], str]] = {
    "box without a rotation": (
        edit("sample_annotation", 1, rotation=[0, 0, 0, 0]),
        SCENE[1:2],
        "sample_annotation.json, record 'sample_annotation-0001': rotation must be a rotation, 4 finite",
    ),
    "box without a volume": (
        edit("sample_annotation", 0, size=[0, 4, 1]),
        SCENE[:1],
        "0000': size must be 3 lengths",
    ),
    "box nowhere": (
        edit("sample_annotation", 0, translation=[NAN, 0, 0]),
        SCENE[:1],
        "translation must be 3 finite",
    ),
    "box of half a place": (edit("sample_annotation", 0, translation=[1, 2]), SCENE[:1], "got [1, 2]"),
    "box far out": (edit("sample_annotation", 0, translation=[1e300, 0, 0]), SCENE[:1], "got [1e+300, 0, 0]"),
    "two attributes": (
        edit("sample_annotation", 0, attribute_tokens=["attribute-0000", "attribute-0001"]),
        SCENE[:1],
        "attribute_tokens must be one attribute of nuScenes at most",
    ),
    "attribute that is not there": (
        edit("sample_annotation", 0, attribute_tokens=["attribute-0099"]),
        SCENE[:1],
        "attribute_tokens must be a list of tokens of attribute.json, got ['attribute-0099']",
    ),
    "attribute that the devkit does not know": (
        edit("attribute", 4, name="vehicle.flying"),
        [],
        "vehicle.flying",
    ),
    "visibility of words": (
        edit("sample_annotation", 0, visibility_token="good"),
        SCENE[:1],
        "visibility_token must",
    ),
    "points missing": (
        edit("sample_annotation", 0, num_radar_pts=...),
        SCENE[:1],
        "nothing (the field is missing)",
    ),
    "points null": (
        edit("sample_annotation", 0, num_lidar_pts=None),
        SCENE[:1],
        "num_lidar_pts must be a whole number",
    ),
    "object that is not there": (
        edit("sample_annotation", 0, instance_token="instance-0999"),
        SCENE[:1],
        "instance_token must be the token of a record of instance.json, got 'instance-0999'; probably",
    ),
    "object without a category": (
        edit("instance", 0, category_token="?"),
        SCENE,
        "instance.json, record 'instance-0000': category_token must be the token of a record of category",
    ),
    "category without a name": (
        edit("category", 4, name=None),  # vehicle.car, of which every sample has one
        [],
        "category.json, record 'category-0004': name must be a text of printable characters, got None",
    ),
    "box after nothing": (
        edit("sample_annotation", 0, next="x"),
        SCENE[:1],
        "next must be the token of a later record",
    ),
    "box before nothing": (
        edit("sample_annotation", 3, prev=7),
        SCENE[3:],
        "prev must be the token of an earlier",
    ),
    "box linked to null": (
        edit("sample_annotation", 3, next=None),
        SCENE[3:],
        "next must be the token of a later",
    ),
    "box linked to a list": (
        edit("sample_annotation", 3, next=[]),
        SCENE[3:],
        "next must be the token of a later",
    ),
    "box after itself": (
        edit("sample_annotation", 1, next="sample_annotation-0001"),
        SCENE[1:2],
        "of a later record",
    ),
    "box of another object next": (
        edit("sample_annotation", 0, next="sample_annotation-0005"),
        SCENE[:1],
        "next must be the token of a later record of the same instance, or empty, got 'sample_annotation-00",
    ),
    "box twice": (repeat("sample_annotation", 2), SCENE[2:3], "token is that of an earlier record too"),
    "object twice": (
        repeat("sample_annotation", 2, token="again"),
        SCENE[2:3],
        "instance_token 'instance-0000' is a second box of its object in sample 'sample-0002'",
    ),
    "pose far out": (
        edit("ego_pose", 2, translation=[1e300, 0, 0]),
        SCENE[2:3],
        "sample-0002, LIDAR_TOP: ego_pose.json, record 'ego_pose-0002': translation must be 3 finite",
    ),
    "pose without a rotation": (
        edit("ego_pose", 2, rotation=[0, 0, 0, 0]),
        SCENE[2:3],
        "ego_pose-0002': rotation",
    ),
    "pose of words": (edit("ego_pose", 5, rotation=["1", 0, 0, 0]), SCENE[1:2], "CAM_FRONT: ego_pose.json"),
    "pose that is not there": (
        edit("sample_data", 5, ego_pose_token="x"),
        SCENE[1:2],
        "CAM_FRONT: sample_data.json, record 'sample_data-0005': ego_pose_token must be the token",
    ),
    "time that is none": (
        edit("sample_data", 5, timestamp=NAN),
        SCENE[1:2],
        "timestamp must be a time in microseconds",
    ),
    "key frame or not": (
        edit("sample_data", 5, is_key_frame="yes"),
        SCENE[1:2],
        "is_key_frame must be true or false",
    ),
    "no width": (edit("sample_data", 5, width=0), SCENE[1:2], "width must be a whole number from 1"),
    "another width": (edit("sample_data", 5, width=320), SCENE[1:2], "as its camera's others, got (320, 90)"),
    "no file": (edit("sample_data", 5, filename=""), SCENE[1:2], "filename must be the name of a file"),
    "file of another sensor": (
        lambda t: record(t, "sample_data", 5).update(filename=record(t, "sample_data", 1)["filename"]),
        SCENE[1:2],
        "is a file of LIDAR_TOP too",
    ),
    "two key frames": (
        repeat("sample_data", 5, token="again", filename="samples/other.jpg"),
        SCENE[1:2],
        "calibrated_sensor_token 'calibrated_sensor-0001' is a second key frame of its sensor",
    ),
    "sweeps in a circle": (
        edit("sample_data", 2, next="sample_data-0001"),
        SCENE[2:3],
        "next must be the token of a",
    ),
    "sweep of another sensor next": (
        edit("sample_data", 2, next="sample_data-0007"),
        SCENE[2:3],
        "same calibrated",
    ),
    "sample before nothing": (
        edit("sample", 1, next="sample-9999"),
        SCENE,
        "'sample-0001': next must be the token of a sample of scene 'scene-9001', got 'sample-9999'",
    ),
    "samples in a circle": (edit("sample", 3, next="sample-0000"), SCENE, "the chain of samples is a circle"),
    "samples run into another scene": (
        edit("sample", 3, next="sample-0008"),
        SCENE,
        "next must be the token of a",
    ),
    "chain cut": (edit("sample", 1, next=""), SCENE, "next ends the chain after 2 of the scene's 4 samples"),
    "sample after another": (
        edit("sample", 2, prev="sample-0000"),
        SCENE,
        "prev must be 'sample-0001', the sample",
    ),
    "sample without a time": (
        edit("sample", 2, timestamp=NAN),
        SCENE,
        "timestamp must be a time in microseconds",
    ),
    "sample at a word": (edit("sample", 2, timestamp="noon"), SCENE, "got 'noon'"),
    "samples at one time": (
        lambda t: record(t, "sample", 2).update(timestamp=record(t, "sample", 1)["timestamp"]),
        SCENE,
        "timestamp must be later than",
    ),
    "scene without a first sample": (
        edit("scene", 0, first_sample_token=""),
        SCENE,
        "first_sample_token must be",
    ),
    "scene that begins in another": (
        edit("scene", 0, first_sample_token="sample-0008"),
        SCENE,
        "first_sample_token",
    ),
    "first sample missing": (
        edit("scene", 0, first_sample_token=...),
        SCENE,
        "nothing (the field is missing)",
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_damage_costs_its_samples_and_no_others(damaged: DamagedRoot, kind: str) -> None:
    change, lost, words = LOSSES[kind]
    tables = damaged.tables()
    change(tables)
    damaged.write(tables)
    reader = open_reader(damaged.root)
    everything = [
        token for split in (TRAIN_SPLIT, VAL_SPLIT) for s in reader.scenes(split) for token in s.sample_tokens
    ]
    assert everything == [f"sample-{n:04d}" for n in range(3 * KEY_FRAMES)]
    faulty = reader.faulty(everything)
    if lost:
        assert list(faulty) == lost
    for token, reason in faulty.items():
        assert words in reason
        assert "; probably " in reason
        with pytest.raises(SampleError, match="probably") as caught:
            reader.sample(token)
        assert caught.value.token == token
    first = next(iter(faulty))
    with pytest.raises(
        SampleError, match=f"\\n{len([t for t in faulty if t < 'sample-0008'])} of 8 samples"
    ) as caught:
        dataset(damaged.root, TRAIN_SPLIT)
    assert caught.value.token == first
    assert len(str(caught.value).splitlines()) <= 3
    told = {f.subject: f for f in check_data_root(damaged.root, VERSION, CAMERA_NAMES)}
    assert told["records"].level == "lost"
    assert words.split(", ")[-1].split(": ")[-1] in told["records"].text
    assert told["usable"].text.startswith(f"{12 - len(faulty)} of 12") or len(faulty) == 12
    skipping = dataset(damaged.root, TRAIN_SPLIT, bad_samples="skip")
    for index, token in enumerate(skipping.tokens):
        item = skipping[index]
        assert isinstance(item, BadSample if token in faulty else Batch)


def test_the_rest_of_a_damaged_object_keeps_its_velocity(damaged: DamagedRoot) -> None:
    """A box that is taken out leaves its neighbours the difference to the other side."""
    sound = open_reader(damaged.root)
    tables = damaged.tables()
    record(tables, "sample_annotation", 1)["size"] = None
    damaged.write(tables)
    reader = open_reader(damaged.root)
    for token in (SCENE[0], SCENE[2]):
        before = sound.annotations(sound.sample(token))
        after = reader.annotations(reader.sample(token))
        assert after.tokens == before.tokens
        velocities = after.boxes.values[1:, 7:], before.boxes.values[1:, 7:]
        np.testing.assert_array_equal(*velocities)
    assert np.isnan(reader.nusc.box_velocity("sample_annotation-0000")).all(), "it stands alone now"
    np.testing.assert_allclose(
        reader.nusc.box_velocity("sample_annotation-0002"),
        sound.nusc.box_velocity("sample_annotation-0002"),
        atol=1e-9,
    )


def test_damage_to_a_sensor_that_nobody_asks_for_costs_nothing(damaged: DamagedRoot) -> None:
    tables = damaged.tables()
    record(tables, "calibrated_sensor", 1)["camera_intrinsic"] = None  # CAM_FRONT
    damaged.write(tables)
    assert len(open_reader(damaged.root).faulty(SCENE)) == KEY_FRAMES
    reader = open_reader(damaged.root, cameras=("CAM_BACK",))
    assert reader.faulty(SCENE) == {}
    assert [c.channel for c in reader.sample(SCENE[0]).cameras] == ["CAM_BACK"]
    lidar = open_reader(damaged.root, cameras=("LIDAR_TOP",)).fault(SCENE[0])
    assert lidar is not None
    assert "the sensor is not a camera" in lidar


FATAL: dict[str, tuple[Callable[[Tables], None], str]] = {
    "missing token": (edit("sample", 0, token=...), "sample.json, record nothing .*: token must be 1 to 200"),
    "sample twice": (repeat("sample", 0), "record 'sample-0000': token is that of an earlier record too"),
    "box of no sample": (
        edit("sample_annotation", 0, sample_token="x"),
        "sample_token must be the token of a record",
    ),
    "key frame of no sample": (edit("sample_data", 0, sample_token=None), "'sample_data-0000': sample_token"),
    "sample of no scene": (
        edit("sample", 0, scene_token=["scene-0000"]),
        "scene_token must be the token of a record",
    ),
    "scene without a name": (edit("scene", 0, name=...), "'scene-0000': name must be a text"),
    "scene twice": (
        edit("scene", 1, name="scene-9001"),
        "'scene-0001': name is that of an earlier scene too",
    ),
    "scene of no log": (
        edit("scene", 0, log_token="x"),
        "'scene-0000': log_token must be the token of a record of log",
    ),
    "scene without samples": (
        lambda t: t["scene"].append({**t["scene"][0], "token": "s", "name": "n", "first_sample_token": ""}),
        "scene.json, record 's': token is not the scene of any sample",
    ),
    "log of nowhere": (edit("log", 0, location=5), "'log-0000': location must be a text"),
    "log without a map": (
        edit("map", 0, log_tokens=[]),
        "log.json, record 'log-0000': token is in the log_tokens of no",
    ),
    "map of nothing": (edit("map", 0, filename=None), "'map-0000': filename must be the name of a file"),
    "no map": (lambda t: t.update(map=[]), "is in the log_tokens of no record of map.json"),
    "list of lists": (
        lambda t: t.update(sample=[[1], [2]]),
        r"sample\.json must hold objects, got a list as record 0",
    ),
    "no list": (lambda t: t.update(log={"token": 1}), r"log\.json must hold a list of records, got a dict"),
    "null": (lambda t: t.update(log=None), r"log\.json must hold a list of records, got a NoneType"),
    "binary": (lambda t: t.update(instance=b"\x1f\x8b\xff\xff"), r"instance\.json is not UTF-8 text"),
    "empty": (lambda t: t.update(instance=b""), r"instance\.json is not valid JSON \(truncated"),
    "truncated": (
        lambda t: t.update(instance=json.dumps(t["instance"])[:-9].encode()),
        "instance.json is not valid",
    ),
    "deep": (lambda t: t.update(scene=b"[" * 200_000), r"scene\.json is nested too deeply"),
    "endless number": (
        lambda t: t.update(scene=b'[{"token": ' + b"9" * 9999 + b"}]"),
        r"scene\.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("kind", FATAL)
def test_damage_that_cannot_be_laid_to_samples_stops_everything(damaged: DamagedRoot, kind: str) -> None:
    change, words = FATAL[kind]
    tables = damaged.tables()
    change(tables)
    damaged.write(tables)
    with pytest.raises(DataError, match=words) as caught:
        open_reader(damaged.root, bad_samples="skip")
    assert len(str(caught.value).splitlines()) <= 3
    told = list(check_data_root(damaged.root, VERSION, CAMERA_NAMES))
    assert (told[-1].level, told[-1].subject) == ("FAIL", "tables")
    assert str(caught.value).splitlines()[1] in told[-1].text


def test_files_that_are_none_are_refused_unread(damaged: DamagedRoot) -> None:
    path = damaged.root / VERSION / "log.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"log\.json"):
        open_tables(damaged.root, VERSION)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(
        DataError, match=r"cannot read log\.json: it has 1099511627776 bytes, more than the \d+ allowed"
    ):
        open_tables(damaged.root, VERSION)


def test_several_tables_are_named_at_once(damaged: DamagedRoot) -> None:
    damaged.write({"log": b"", "scene": b"[]]", "map": b"x"})
    with pytest.raises(DataError, match=r"damaged \(and 1 more\):\nlog\.json .*\nscene\.json"):
        open_tables(damaged.root, VERSION)
    told = list(check_data_root(damaged.root, VERSION, CAMERA_NAMES))[-1].text
    assert all(f"{table}.json" in told for table in ("log", "scene", "map"))


def test_where_everything_is_to_be_used_damage_stops(damaged: DamagedRoot) -> None:
    assert len(load_tables(damaged.root, VERSION).sample) == 12
    tables = damaged.tables()
    record(tables, "sample_annotation")["size"] = [0, 0, 0]
    damaged.write(tables)
    with pytest.raises(DataError, match="'sample_annotation-0000': size must be"):
        load_tables(damaged.root, VERSION)


def test_sound_tables_are_the_devkits_own(tiny_nuscenes: Path) -> None:
    from nuscenes.nuscenes import NuScenes

    opened = open_tables(tiny_nuscenes, VERSION)
    plain = NuScenes(VERSION, str(tiny_nuscenes), verbose=False)
    assert (opened.lost, opened.damages) == ({}, [])
    for table in plain.table_names:
        if table == "map":
            continue
        assert getattr(opened.nusc, table) == getattr(plain, table)
    assert opened.nusc._token2ind == plain._token2ind
