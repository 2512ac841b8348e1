"""Calibration files and transform trees; against pyquaternion."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pyquaternion import Quaternion

from bevperception.errors import ConfigError
from bevperception.streaming.rig import (
    TransformTree,
    difference,
    pose_from_xyzw,
    read_extrinsics,
    write_extrinsics,
)

TURN = Quaternion(axis=[0.3, -0.5, 0.8], radians=1.1)
POSE = {
    "translation_m": [1.0, -2.0, 0.5],
    "rotation_xyzw": [float(v) for v in (TURN.x, TURN.y, TURN.z, TURN.w)],
}


def test_quaternions_are_in_the_order_of_ros() -> None:
    found = pose_from_xyzw(POSE["translation_m"], POSE["rotation_xyzw"]).numpy()
    np.testing.assert_allclose(found[:3, :3], TURN.rotation_matrix, atol=1e-12)
    np.testing.assert_array_equal(found[:3, 3], POSE["translation_m"])


def test_a_file_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "rig.yaml"
    write_extrinsics(path, {"cameras": {"CAM_FRONT": {"frame_id": "front", **POSE}}, "bev": POSE})
    found = read_extrinsics(path)
    assert found.frame_ids == {"CAM_FRONT": "front"}
    assert found.bev_to_base is not None
    torch.testing.assert_close(found.bev_to_base, found.camera_to_base["CAM_FRONT"])
    assert [p.name for p in tmp_path.iterdir()] == ["rig.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cameras: [", "not valid YAML"),
        ("{}", "has no section 'cameras'"),
        ("cameras: {A: {translation_m: [1, 2, 3]}}", r"cameras\.A needs translation_m and rotation_xyzw"),
        ("cameras: {A: {translation_m: [1, 2], rotation_xyzw: [0, 0, 0, 1]}}", "3 and 4 finite numbers"),
        ("cameras: {A: {translation_m: [1, 2, .nan], rotation_xyzw: [0, 0, 0, 1]}}", "finite"),
        ("cameras: {A: {translation_m: [1, 2, 3], rotation_xyzw: [0, 0, 0, 2]}}", "not of unit length"),
        ("cameras: {A: {translation_m: [1, 2, -1.e+300], rotation_xyzw: [0, 0, 0, 1]}}", "off the Earth"),
    ],
)
def test_wrong_files_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rig.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_extrinsics(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read calibration file .*nowhere"):
        read_extrinsics(tmp_path / "nowhere")


def test_difference_is_metres_and_degrees() -> None:
    one = pose_from_xyzw([1, 2, 3], [0, 0, 0, 1])
    half = math.radians(3.0) / 2
    other = pose_from_xyzw([1, 2, 3.5], [0, math.sin(half), 0, math.cos(half)])
    assert difference(one, other) == pytest.approx((0.5, 3.0), abs=1e-6)


def test_frames_are_found_over_common_ancestors() -> None:
    tree = TransformTree()
    roof = pose_from_xyzw([0, 0, 2], [0, 0, 0, 1])
    camera = pose_from_xyzw(POSE["translation_m"], POSE["rotation_xyzw"])
    tree.add("/body", "roof", roof)
    tree.add("roof", "camera", camera)
    tree.add("body", "base_link", pose_from_xyzw([0, 0, 1], [0, 0, 0, 1]))
    found = tree.between("camera", "base_link")
    assert found is not None
    wanted = camera.clone()
    wanted[2, 3] += 1.0
    torch.testing.assert_close(found, wanted)
    assert tree.between("camera", "elsewhere") is None
    tree.add("camera", "body", roof)  # a loop of a broken publisher ends
    assert tree.between("camera", "elsewhere") is None
