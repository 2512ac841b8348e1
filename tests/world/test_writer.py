"""Writing a world: the same bytes however it is made, no half-finished data root, nothing overwritten."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bevperception.cli import make_world as make_world_command
from bevperception.config import DataConfig
from bevperception.data.nuscenes import NuScenesReader
from bevperception.data.tables import load_tables
from bevperception.errors import ConfigError, DataError, OutputError, run_program
from bevperception.world import WorldConfig, make_world, scene, writer
from bevperception.world.settings import MINI_TRAIN, MINI_VAL, parse_size
from tests.interrupts import started

ROOT = Path(__file__).resolve().parents[2]
# As small as a world can be: most of the time goes into its two towns.
TINY = WorldConfig(scenes=2, seed=3, frames=2, image_size=(72, 128))
ARGUMENTS = ("--scenes", "2", "--seed", "3", "--frames", "2", "--size", "128x72")


def digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(TINY, tmp_path_factory.mktemp("tiny") / "world", progress=False)


def program(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "make_world.py"), *arguments]


@pytest.mark.slow
def test_same_bytes_on_any_number_of_workers_and_after_a_kill(tiny: Path, tmp_path: Path) -> None:
    root = tmp_path / "world"
    partial = tmp_path / ".world.partial"
    command = program(*ARGUMENTS, "--workers", "2", "--quiet", str(root))
    running = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not list((partial / "scenes").glob("scene-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not root.exists()
    assert partial.is_dir()
    with pytest.raises(DataError):
        load_tables(partial, TINY.version)
    other = subprocess.run(
        program("--scenes", "4", "--quiet", str(root)), capture_output=True, text=True, check=False
    )
    assert other.returncode == 2
    assert "unfinished world of other settings" in other.stderr
    assert "scenes 2 instead of 4" in other.stderr
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "world_train 1, world_val 1" in done.stdout
    assert not partial.exists()
    assert digest(root) == digest(tiny)


def test_another_seed_gives_another_world(tiny: Path, tmp_path: Path) -> None:
    config = WorldConfig(scenes=1, seed=4, frames=2, image_size=(72, 128))
    other = digest(make_world(config, tmp_path / "other", progress=False))
    ours = digest(tiny)
    assert other["maps/expansion/boston-seaport.json"] != ours["maps/expansion/boston-seaport.json"]
    shared = [name for name in other if name.endswith((".jpg", ".bin")) and name in ours]
    assert shared
    assert all(other[name] != ours[name] for name in shared)


def test_a_complete_world_is_found_and_left_alone(tiny: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    assert make_world(TINY, tiny, progress=False) == tiny
    assert {path: path.stat().st_mtime_ns for path in tiny.rglob("*")} == before
    with pytest.raises(DataError, match=r"a world of other settings.*\nit has seed 3 instead of 5"):
        make_world(WorldConfig(**{**TINY.__dict__, "seed": 5}), tiny, progress=False)


def test_what_is_not_a_world_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(DataError, match="something else than a world"):
        make_world(TINY, tmp_path / "mine", progress=False)
    with pytest.raises(DataError, match="is a file"):
        make_world(TINY, tmp_path / "mine" / "thesis.tex", progress=False)
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "thesis.tex").write_text("...")
    with pytest.raises(DataError, match="something else than an unfinished world"):
        make_world(TINY, tmp_path / "new", progress=False)
    assert sorted(path.name for path in tmp_path.rglob("*.tex")) == ["thesis.tex", "thesis.tex"]
    assert not (tmp_path / "new").exists()


def test_an_interrupt_does_not_wait_for_scenes_and_leaves_nothing(tmp_path: Path) -> None:
    root, partial = tmp_path / "world", tmp_path / ".world.partial"
    long = ("--scenes", "3", "--frames", "1000", "--size", "1600x900", "--workers", "2", "--quiet")
    with started(*program(*long, str(root))[1:]) as running:
        running.wait_until((partial / "world.json").exists, "unfinished world")
        running.wait_until(lambda: len(running.children()) > 1, "workers")
        assert running.interrupt() == (130, "", "interrupted\n")
        assert running.children() == []
    assert list(tmp_path.iterdir()) == []


def leave_unfinished(root: Path, config: WorldConfig, finished: int) -> Path:
    """What a killed run leaves behind."""
    partial = root.with_name(f".{root.name}.partial")
    (partial / "scenes").mkdir(parents=True)
    (partial / "samples").mkdir()
    (partial / "samples" / "half.jpg").write_bytes(b"half")
    (partial / "world.json").write_text(json.dumps(config.record()))
    for name in config.scene_names[:finished]:
        (partial / "scenes" / f"{name}.json").write_text("{}")
    return partial


def test_an_interrupt_keeps_finished_scenes_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write_scene", interrupt)
    root = tmp_path / "a world"
    partial = leave_unfinished(root, TINY, finished=1)
    arguments = [*ARGUMENTS, "--workers", "0", "--quiet", str(root)]
    with pytest.raises(SystemExit) as left:
        run_program(lambda: make_world_command.main(arguments))
    assert left.value.code == 130
    assert capsys.readouterr().err.splitlines() == [
        f"1 finished scenes stay in {partial}: the same command goes on there",
        f"to remove them: rm -r '{partial}'",
        "interrupted",
    ]
    assert (partial / "scenes" / "scene-9001.json").is_file()


def test_a_run_that_finished_no_scene_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ArithmeticError

    monkeypatch.setattr(writer, "write_scene", fail)
    with pytest.raises(ArithmeticError):
        make_world(TINY, tmp_path / "world", progress=False)
    assert list(tmp_path.iterdir()) == []
    other = WorldConfig(**{**TINY.__dict__, "seed": 8})
    partial = leave_unfinished(tmp_path / "world", other, finished=0)
    with writer._locked(partial):
        writer._open_partial(partial, TINY, tmp_path / "world")
    assert json.loads((partial / "world.json").read_text()) == TINY.record()
    assert sorted(path.name for path in partial.iterdir()) == ["lock", "scenes", "world.json"]


def test_an_unfinished_world_of_other_settings_is_named_with_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "a world"
    other = WorldConfig(2, 8, 2, (72, 128), sweeps=True, version="v1.0-mini", val_share=0.5, jpeg_quality=7)
    partial = leave_unfinished(root, other, finished=1)
    with pytest.raises(DataError) as refused:
        make_world(TINY, root, progress=False)
    said, finish, remove = str(refused.value).splitlines()
    assert said == (
        f"{partial} is an unfinished world of other settings (1 finished scenes): "
        "seed 8 instead of 3, sweeps True instead of False, version v1.0-mini instead of v1.0-world, "
        "val_share 0.5 instead of 0.2, jpeg_quality 7 instead of 90"
    )
    assert remove == f"to remove it: rm -r '{partial}'"
    assert (partial / "samples" / "half.jpg").is_file()
    made: list[tuple[WorldConfig, Path]] = []
    monkeypatch.setattr(make_world_command, "make_world", lambda c, root, **_: made.append((c, root)))
    program, command, *arguments = shlex.split(finish.removeprefix("to finish it: "))
    assert (program, command) == ("bevperception", "make-world")
    make_world_command.main(arguments)
    assert made == [(other, root)]


def test_a_world_of_another_version_of_the_program_can_only_be_removed(tmp_path: Path) -> None:
    partial = tmp_path / ".world.partial"
    (partial / "scenes").mkdir(parents=True)
    (partial / "scenes" / "scene-9001.json").write_text("{}")
    (partial / "world.json").write_text(json.dumps({**TINY.record(), "format": 0}))
    with pytest.raises(DataError, match=f"format 0 instead of .*\nto remove it: rm -r {partial}$"):
        make_world(TINY, tmp_path / "world", progress=False)
    (partial / "world.json").write_text("{")
    with pytest.raises(
        DataError, match=f"world.json.*not valid JSON.*\nto remove the world: rm -r {partial}$"
    ):
        make_world(TINY, tmp_path / "world", progress=False)


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_a_run_that_was_killed_at_its_last_step_goes_on_from_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    """Between the last table and the data root's name, with some of the records removed already."""
    partial = tmp_path / ".world.partial"
    shutil.copytree(tiny, partial)
    (partial / writer.DONE).mkdir()
    for name in TINY.scene_names[removed:]:
        (partial / writer.DONE / f"{name}.json").write_text("{}")
    if removed == 2:
        (partial / writer.DONE).rmdir()
    with pytest.raises(DataError, match="unfinished world of other settings"):
        make_world(WorldConfig(**{**TINY.__dict__, "seed": 8}), tmp_path / "world", progress=False)
    monkeypatch.setattr(writer, "write_scene", None)
    assert digest(make_world(TINY, tmp_path / "world", progress=False)) == digest(tiny)
    assert not partial.exists()


def test_two_processes_do_not_make_one_world(tmp_path: Path) -> None:
    partial = tmp_path / ".world.partial"
    with writer._locked(partial), pytest.raises(DataError, match="another process"):
        make_world(TINY, tmp_path / "world", progress=False)


def test_a_lock_that_is_a_link_empties_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "thesis.tex"
    mine.write_text("...")
    partial = leave_unfinished(tmp_path / "world", TINY, finished=0)
    (partial / writer.LOCK).symlink_to(mine)
    with pytest.raises(OutputError, match="is a symbolic link where a lock"):
        make_world(TINY, tmp_path / "world", progress=False)
    assert mine.read_text() == "..."


def test_a_full_disk_is_told_and_can_be_resumed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = writer.write_scene

    def full(config: WorldConfig, number: int, root: Path) -> dict[str, list[dict[str, object]]]:
        if number == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "somewhere.jpg"))
        return real(config, number, root)

    monkeypatch.setattr(writer, "write_scene", full)
    with pytest.raises(OutputError, match=r"No space left on device\n.*\n.*goes on where it stopped"):
        make_world(TINY, tmp_path / "world", progress=False)
    assert not (tmp_path / "world").exists()
    monkeypatch.setattr(writer, "write_scene", real)
    assert digest(make_world(TINY, tmp_path / "world", workers=2, progress=False)) == digest(tiny)


def test_version_mini_has_the_names_and_splits_of_nuscenes(tmp_path: Path) -> None:
    config = WorldConfig(scenes=2, seed=3, frames=2, image_size=(72, 128), version="v1.0-mini")
    root = make_world(config, tmp_path / "mini", progress=False)
    reader = NuScenesReader(DataConfig(root=str(root), version="v1.0-mini"))
    assert [s.name for s in reader.scenes("mini_train")] == [MINI_TRAIN[0]]
    assert [s.name for s in reader.scenes("mini_val")] == [MINI_VAL[0]]


def test_sweeps_come_at_12_hz_and_belong_to_the_next_key_frame(tmp_path: Path) -> None:
    config = WorldConfig(scenes=1, seed=3, frames=3, image_size=(72, 128), sweeps=True)
    nusc = load_tables(make_world(config, tmp_path / "world", progress=False), config.version)
    front = [r for r in nusc.sample_data if r["channel"] == "CAM_FRONT"]
    assert [r["is_key_frame"] for r in front] == [True, *[False] * 5] * 2 + [True]
    stamps = [r["timestamp"] for r in front]
    assert all(83_000 <= b - a <= 84_000 for a, b in itertools.pairwise(stamps))
    for record in front:
        assert (Path(nusc.dataroot) / record["filename"]).is_file()
        assert record["filename"].startswith("samples" if record["is_key_frame"] else "sweeps")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scenes": 0}, "scenes must be 1 to 999"),
        ({"scenes": 11, "version": "v1.0-mini"}, "scenes must be 1 to 10 in v1.0-mini"),
        ({"version": "v1.0-trainval"}, "version must be v1.0-world or v1.0-mini"),
        ({"image_size": (225, 401)}, "16k x 9k pixels"),
        ({"image_size": (400, 400)}, "16k x 9k pixels"),
        ({"frames": 1}, "frames must be 2 to 1000"),
        ({"seed": -1}, "seed must be 0 to "),
        ({"val_share": 1.0}, "val_share must be at least 0 and below 1"),
        ({"jpeg_quality": 0}, "jpeg_quality must be 1 to 100"),
    ],
)
def test_wrong_settings_say_what_is_allowed(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorldConfig(**settings)  # type: ignore[arg-type]


def test_sizes_are_read_in_either_order() -> None:
    assert parse_size("400x225") == parse_size("225x400") == (225, 400)
    with pytest.raises(ConfigError, match="like 400x225"):
        parse_size("400")
    with pytest.raises(ConfigError, match="workers must be 0 or more"):
        make_world(TINY, Path("unused"), workers=-1)


def test_program_explains_itself_and_refuses_politely(tmp_path: Path) -> None:
    shown = subprocess.run(program("--help"), capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert "--scenes" in shown.stdout
    assert "examples:" in shown.stdout
    wrong = subprocess.run(
        program("--scenes", "0", str(tmp_path / "w")), capture_output=True, text=True, check=False
    )
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "Traceback" not in wrong.stderr


def test_splits_hold_the_last_scenes_out() -> None:
    config = WorldConfig(scenes=10, val_share=0.3)
    assert config.splits["world_val"] == ["scene-9008", "scene-9009", "scene-9010"]
    assert len(config.splits["world_train"]) == 7
    assert WorldConfig(scenes=10, version="v1.0-mini").scene_names == MINI_TRAIN + MINI_VAL
    assert scene.LOCATIONS[0] == "boston-seaport"
