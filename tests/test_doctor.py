"""The doctor on a good data root and on ones that lack something."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bevperception.doctor import device
from bevperception.doctor.__main__ import main
from bevperception.doctor.data_root import Finding, check_data_root
from bevperception.doctor.environment import environment, operators
from bevperception.errors import USAGE_EXIT_CODE, ConfigError
from bevperception.ops import backend_report
from bevperception.taxonomy import CAMERA_NAMES
from tests.ops.problems import needs_native

VERSION = "v1.0-tiny"


@pytest.fixture
def root(tiny_nuscenes: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data set that a test may damage."""
    return Path(shutil.copytree(tiny_nuscenes, tmp_path / "data"))


def findings(
    root: Path, version: str | None = None, cameras: tuple[str, ...] = CAMERA_NAMES
) -> dict[str, Finding]:
    found = list(check_data_root(root, version, cameras))
    assert len({f.subject for f in found}) == len(found)
    return {f.subject: f for f in found}


def edit(root: Path, table: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
    path = root / VERSION / f"{table}.json"
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))


def images_of(root: Path, channel: str) -> list[Path]:
    return sorted((root / "samples" / channel).iterdir())


def test_good_root_is_usable(tiny_nuscenes: Path) -> None:
    found = findings(tiny_nuscenes)
    assert found["tables"].text == "13 of 13; 3 scenes, 12 samples, 3 logs"
    assert found["images"].text == "72 of 72 key-frame images present"
    assert found["usable"] == Finding("ok", "usable", "12 of 12 samples")
    for subject in ("version", "records", "sensors", "decoding", "calibration", "annotations", "splits"):
        assert found[subject].level == "ok", found[subject]
    assert "tiny_train (2 of 2)" in found["splits"].text
    assert found["map expansion"].level == "lost"
    assert "boston-seaport.json is missing" in found["map expansion"].text
    assert found["CAN bus"].text.startswith("2 of 3 scenes")
    assert "scene-9002" in found["CAN bus"].text


def test_missing_folder_version_or_tables_are_fatal(root: Path, tmp_path: Path) -> None:
    assert findings(tmp_path / "nowhere")["data root"].level == "FAIL"
    (tmp_path / "empty").mkdir()
    assert findings(tmp_path / "empty")["versions"].level == "FAIL"
    assert f"give the folder above, {root.resolve()}" in findings(root / VERSION)["versions"].text
    wrong = findings(root, "v1.0-mini")["version"]
    assert wrong.level == "FAIL"
    assert VERSION in wrong.text
    (root / VERSION / "ego_pose.json").unlink()
    scene = root / VERSION / "scene.json"
    scene.write_bytes(scene.read_bytes()[:50])
    broken = findings(root)["tables"]
    assert broken.level == "FAIL"
    assert "ego_pose.json is missing" in broken.text
    assert "scene.json is not valid JSON (truncated?" in broken.text


def test_trainval_is_preferred_among_versions(root: Path) -> None:
    shutil.copytree(root / VERSION, root / "v1.0-trainval")
    assert findings(root)["version"].text == "v1.0-trainval; there: v1.0-tiny, v1.0-trainval"


@pytest.mark.parametrize("damage", ["{]", '[{"token": 3}]'])
def test_table_that_ends_well_but_is_damaged_is_fatal(root: Path, damage: str) -> None:
    (root / VERSION / "sample.json").write_text(damage)
    assert findings(root)["tables"].level == "FAIL"


def test_missing_map_image_is_fatal(root: Path) -> None:
    for path in (root / "maps").glob("*.png"):
        path.unlink()
    assert findings(root)["tables"].level == "FAIL"


def test_missing_and_empty_images_cost_their_samples(root: Path) -> None:
    images_of(root, "CAM_FRONT")[0].unlink()
    images_of(root, "CAM_BACK")[5].write_bytes(b"")
    found = findings(root)
    assert found["images"].level == "lost"
    assert found["images"].text.startswith("70 of 72")
    assert images_of(root, "CAM_BACK")[5].name in found["images"].text
    assert found["usable"].level == "lost"
    assert found["usable"].text.startswith("10 of 12 samples; the others")


def test_root_without_any_image_is_unusable(root: Path) -> None:
    shutil.rmtree(root / "samples")
    found = findings(root)
    assert found["images"].text.startswith("0 of 72")
    assert "and 69 more" in found["images"].text
    assert found["usable"].level == "FAIL"


def test_truncated_image_of_a_camera_is_found(root: Path) -> None:
    for path in images_of(root, "CAM_FRONT_LEFT"):
        path.write_bytes(path.read_bytes()[:300])
    found = findings(root)
    assert found["decoding"].level == "lost"
    assert "truncated" in found["decoding"].text


def camera_mounts(root: Path, channel: str) -> Callable[[Callable[[dict[str, Any]], object]], None]:
    sensors = json.loads((root / VERSION / "sensor.json").read_text())
    sensor = next(s["token"] for s in sensors if s["channel"] == channel)

    def change(function: Callable[[dict[str, Any]], object]) -> None:
        edit(
            root,
            "calibrated_sensor",
            lambda records: [function(r) for r in records if r["sensor_token"] == sensor],
        )

    return change


@pytest.mark.parametrize(
    "damage",
    [
        {"camera_intrinsic": [[1, 0, 0], [0, 0, 0], [0, 0, 1]]},
        {"camera_intrinsic": []},
        {"camera_intrinsic": [[float("nan"), 0, 0], [0, 1, 0], [0, 0, 1]]},
        {"camera_intrinsic": [[99, 0, 80], [0, 99, 45], [0, 0.1, 1]]},
        {"camera_intrinsic": [[99, 0, 80], [0, 99], [0, 0, 1]]},
        {"camera_intrinsic": None},
        {"rotation": [0, 0, 0, 0]},
        {"translation": [float("inf"), 0, 0]},
    ],
)
def test_unusable_calibration_costs_its_samples(root: Path, damage: dict[str, Any]) -> None:
    camera_mounts(root, "CAM_BACK")(lambda record: record.update(damage))
    found = findings(root)
    assert found["records"].level == "lost"
    assert (
        f"calibrated_sensor.json, record 'calibrated_sensor-0004': {next(iter(damage))}"
        in found["records"].text
    )
    assert found["usable"].level == "FAIL"
    other = findings(root, cameras=("CAM_FRONT", "CAM_BACK_LEFT"))
    assert other["usable"].level == "ok", "whoever does without this camera loses nothing"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"camera_intrinsic": [[-100, 0, 80], [0, 100, 45], [0, 0, 1]]}, "focal lengths"),
        ({"camera_intrinsic": [[100, 0, 800], [0, 100, 45], [0, 0, 1]]}, "principal point"),
        ({"rotation": [0.6, -0.6, 0.6, -0.6]}, "length 1"),
        ({"rotation": [1, 0, 0, 0]}, "looks up"),
        ({"translation": [100, 0, 0]}, "mounted 100 m"),
    ],
)
def test_odd_calibration_is_told_but_usable(root: Path, damage: dict[str, Any], words: str) -> None:
    camera_mounts(root, "CAM_FRONT")(lambda record: record.update(damage))
    found = findings(root)
    assert found["calibration"].level == "lost"
    assert words in found["calibration"].text
    assert found["usable"].level == "ok"


def test_swapped_cameras_are_noticed(root: Path) -> None:
    names = {"CAM_FRONT": "CAM_BACK", "CAM_BACK": "CAM_FRONT"}
    edit(
        root,
        "sensor",
        lambda records: [r.update(channel=names.get(r["channel"], r["channel"])) for r in records],
    )
    text = findings(root)["calibration"].text
    assert "CAM_FRONT" in text
    assert "where 0 is usual" in text
    assert "where 180 is usual" in text


def test_missing_camera_or_lidar_records_cost_their_samples(root: Path) -> None:
    edit(
        root,
        "sensor",
        lambda records: [r.update(channel="LIDAR_2") for r in records if r["channel"] == "LIDAR_TOP"],
    )
    found = findings(root)
    assert found["sensors"].level == "lost"
    assert "LIDAR_TOP in 12" in found["sensors"].text
    assert found["usable"].level == "FAIL"


def test_other_cameras_may_be_asked_for(tiny_nuscenes: Path) -> None:
    assert findings(tiny_nuscenes, cameras=("CAM_FRONT",))["images"].text.startswith("12 of 12")
    other = findings(tiny_nuscenes, cameras=("CAM_TELE",))
    assert "CAM_TELE in 12" in other["sensors"].text
    assert other["usable"].level == "FAIL"


def test_root_without_annotations_can_still_be_predicted_on(root: Path) -> None:
    edit(root, "sample_annotation", lambda records: records.clear())
    edit(root, "instance", lambda records: records.clear())
    found = findings(root)
    assert found["annotations"].level == "lost"
    assert "none" in found["annotations"].text
    assert found["usable"].level == "ok"


def test_absent_classes_are_named(root: Path) -> None:
    def rename(records: list[dict[str, Any]]) -> None:
        for record in records:
            record["name"] = "animal" if record["name"] == "vehicle.bicycle" else record["name"]

    edit(root, "category", rename)
    found = findings(root)["annotations"]
    assert found.level == "lost"
    assert found.text.splitlines()[1].endswith(": bicycle")


def test_without_splits_of_its_own_nothing_can_be_trained(root: Path) -> None:
    (root / VERSION / "splits.json").unlink()
    found = findings(root)["splits"]
    assert found.level == "lost"
    assert "splits.json" in found.text
    (root / VERSION / "splits.json").write_text("[1]")
    assert findings(root)["splits"].level == "FAIL", "no split can be chosen, a predefined one neither"


@pytest.mark.parametrize("content", ["{", '{"version": "1.2"}', "[]"])
def test_damaged_or_old_map_expansion_is_told(root: Path, content: str) -> None:
    (root / "maps" / "expansion" / "singapore-onenorth.json").write_text(content)
    found = findings(root)["map expansion"]
    assert found.level == "FAIL", "training and evaluation stop at it"
    assert "singapore-onenorth.json" in found.text


@pytest.mark.parametrize("content", ["[{}]", '[{"utime": 1e300}]', "{", "3"])
def test_damaged_can_bus_file_is_told(root: Path, content: str) -> None:
    (root / "can_bus" / "scene-9003_pose.json").write_text(content)
    found = findings(root)["CAN bus"]
    assert found.level == "lost"
    assert found.text.startswith("1 of 3 scenes")
    assert "scene-9003_pose.json is damaged" in found.text


def test_scenes_and_splits_without_annotations_are_named(root: Path) -> None:
    samples = json.loads((root / VERSION / "sample.json").read_text())
    bare = {s["token"] for s in samples if s["scene_token"] == "scene-0002"}

    def strip(records: list[dict[str, Any]]) -> None:
        records[:] = [r for r in records if r["sample_token"] not in bare]

    edit(root, "sample_annotation", strip)
    found = findings(root)
    assert (
        "scenes without any, which would teach that nothing is there: scene-9003" in found["annotations"].text
    )
    assert found["splits"].text.endswith("without ground truth, only to predict on: tiny_val")
    assert {found["annotations"].level, found["splits"].level} == {"lost"}


def test_environment_names_versions_hardware_and_operators() -> None:
    rows = dict(environment())
    assert rows["torch"].startswith("2.")
    assert rows["numpy"].startswith("1.26")
    assert "cores usable" in rows["CPU"]
    assert {"python", "C++ compiler", "GPU", "threads", "vector units"} <= set(rows)
    backends = dict(operators())
    for operator in backend_report().operators:
        assert backends[operator.operator] == operator.backend.value
    assert backends["because"]


def test_reference_operators_are_told_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEVPERCEPTION_OPS", "reference")
    assert dict(operators())["dcnv3"] == "reference"
    monkeypatch.setenv("BEVPERCEPTION_OPS", "fastest")
    with pytest.raises(ConfigError, match="fastest"):
        main([])


def test_compiler_that_is_missing_or_broken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert dict(environment())["C++ compiler"].startswith("none found")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "does not run" in dict(environment())["C++ compiler"]


def test_exit_codes_and_alignment(
    tiny_nuscenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    assert main([str(tiny_nuscenes)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "This data root can be used, less what is lost above." in lines
    rows = [line for line in lines if line.startswith(("  ok ", "  lost "))]
    assert len(rows) == 12
    assert all(row[21] == " " and row[23] != " " for row in rows)
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "cannot be used" in capsys.readouterr().out


def test_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bevperception.doctor", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert "is not a folder" in done.stdout
    assert "Traceback" not in done.stderr


@needs_native
def test_operators_are_verified_and_timed_for_practice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    assert main(["--gpu"]) == 0
    told = capsys.readouterr().out
    assert "They say nothing about a GPU" in told
    assert "106 of 106 passed" in told
    assert "native float16" in told
    monkeypatch.setitem(device.TOLERANCES, torch.float32, 0.0)
    monkeypatch.setattr(device, "time_operators", lambda *_: iter(()))  # they were timed above
    assert main(["--gpu"]) == USAGE_EXIT_CODE
    assert "FAIL  dcnv3, narrow, float32: output: differs by" in capsys.readouterr().out
