"""Writing whole files or none: many writers at once, full disks, kills, what is in the way."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bevperception import files
from bevperception.errors import OutputError, run_program
from bevperception.files import (
    LOCK_NAME,
    check_output_file,
    output_folder,
    write_bytes,
    write_json,
    write_text,
    writing,
    writing_folder,
)
from bevperception.visualization.video import VideoError, write_video
from tests.fixtures.full_disk import limited_files

REPOSITORY = Path(__file__).resolve().parents[1]


def child(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program that has the functions of bevperception.files at hand."""
    head = "import json, os, sys, time\nfrom pathlib import Path\nfrom bevperception.files import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_under_its_name(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "results.json"
    with writing(target) as partial:
        assert partial.name == target.name
        assert partial != target
        partial.write_text("half")
        assert not target.exists()
        partial.write_text("whole")
    assert target.read_text() == "whole"
    write_json(target, {"a": [1, None]}, indent=1)
    assert json.loads(target.read_text()) == {"a": [1, None]}
    write_bytes(target, b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff"
    write_text(target, "–")
    assert target.read_bytes() == "–".encode()
    assert left(target.parent) == ["results.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a.json").write_text("before")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b").write_text("before")

    def write_half_a_file() -> None:
        with writing(tmp_path / "a.json") as partial:
            partial.write_text("half")
            raise error

    def write_half_a_folder() -> None:
        with writing_folder(tmp_path / "folder", replace=True) as partial:
            partial.mkdir()
            (partial / "b").write_text("half")
            raise error

    for write in (write_half_a_file, write_half_a_folder):
        with pytest.raises(error):
            write()
    assert left(tmp_path) == ["a.json", "folder"]
    assert (tmp_path / "a.json").read_text() == (tmp_path / "folder" / "b").read_text() == "before"


def test_a_folder_takes_its_place_whole_and_only_where_it_may(tmp_path: Path) -> None:
    target = tmp_path / "bag"
    for content in ("first", "second"):
        with writing_folder(target, replace=True) as partial:
            partial.mkdir()
            (partial / content).write_text(content)
        assert left(target) == [content]
    with pytest.raises(OutputError, match="in the way"), writing_folder(target) as partial:
        partial.mkdir()
    assert left(target) == ["second"]
    assert left(tmp_path) == ["bag"]


def test_a_folder_comes_back_when_its_place_cannot_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "bag"
    target.mkdir()
    (target / "old").write_text("old")
    replace = os.replace

    def refuse_second(source: Path, goal: Path) -> None:
        if Path(goal) == target and Path(source).name == "bag":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, goal)

    def make() -> None:
        with writing_folder(target, replace=True) as partial:
            partial.mkdir()
            monkeypatch.setattr(os, "replace", refuse_second)

    with pytest.raises(OutputError, match="Input/output error"):
        make()
    assert left(target) == ["old"]


def test_files_may_be_read_by_whom_the_mask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with writing(tmp_path / "a.safetensors") as partial:
            save_file({"a": torch.zeros(3)}, partial)  # which makes files for the user alone
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


WRITER = """
    for count in range(60):
        content = {"writer": int(sys.argv[2]), "numbers": [count] * 2000}
        write_json(Path(sys.argv[1]) / "results.json", content)
"""


def test_writers_at_once_leave_whole_files_at_any_moment(tmp_path: Path) -> None:
    writers = [child(WRITER, tmp_path, number) for number in range(3)]
    read, seen = 0, set()
    while any(writer.poll() is None for writer in writers):
        try:
            content = json.loads((tmp_path / "results.json").read_text())
        except FileNotFoundError:
            continue  # none has written yet
        assert len(set(content["numbers"])) == 1
        assert len(content["numbers"]) == 2000
        read, _ = read + 1, seen.add(content["writer"])
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert read > 20
    assert left(tmp_path) == ["results.json"]


DYING = """
    with writing(Path(sys.argv[1]) / "weights.bin") as partial:
        partial.write_bytes(b"half")
        forked = sys.argv[2] == "fork" and os.fork()
        if sys.argv[2] == "alone" or not forked:
            print("writing", flush=True)
        if sys.argv[2] == "fork" and not forked:
            time.sleep(5)
            os._exit(0)
        sys.stdin.read(1)
"""


@pytest.mark.parametrize("kind", ["alone", "fork"])
def test_what_a_killed_process_leaves_goes_and_what_a_living_one_writes_stays(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "weights.bin").write_bytes(b"before")
    for name in (".mine.partial", ".env", ".a.b.partial", "x.0123456789abcdef.partial"):
        (tmp_path / name).write_text("of somebody else")
    others = left(tmp_path)
    killed, living = child(DYING, tmp_path, kind), child(DYING, tmp_path, "alone")
    for process in (killed, living):
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(left(tmp_path)) == len(others) + 2
    write_text(tmp_path / "another.txt", "x")  # whoever writes there next
    assert len(left(tmp_path)) == len(others) + 2  # the living one's and another.txt
    assert (tmp_path / "weights.bin").read_bytes() == b"before"
    living.communicate("\n")
    assert left(tmp_path) == sorted([*others, "another.txt"])
    assert (tmp_path / "weights.bin").read_bytes() == b"half"


HOLDER = """
    with output_folder(Path(sys.argv[1])):
        if os.fork() == 0:
            print("open", flush=True)
            time.sleep(5)
            os._exit(0)
        sys.stdin.read(1)
"""


def test_a_folder_is_for_one_program_and_free_when_that_ends_or_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for end in ("killed", "done"):
        holder = child(HOLDER, out)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(OutputError, match="another program is writing into"), output_folder(out):
            pass
        with output_folder(out, writes=False):  # a helper of the program that holds it
            pass
        if end == "killed":
            holder.send_signal(signal.SIGKILL)
            holder.wait()
        else:
            assert holder.stdin is not None
            holder.stdin.close()
            assert holder.wait() == 0
    with output_folder(out) as folder:
        assert left(folder) == [LOCK_NAME]
        (folder / "result").write_text("x")
    assert left(out) == ["result"]


def test_a_folder_that_stays_empty_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError), output_folder(tmp_path / "a" / "b"):  # noqa: PT011
        raise ValueError
    assert left(tmp_path) == []
    check_output_file(tmp_path / "c" / "d.png")
    assert left(tmp_path) == []


def test_what_is_in_the_way_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out" / "results.json").mkdir(parents=True)
    (tmp_path / "out" / "logs").write_text("mine")
    for inside in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OutputError, match=r"cannot write .*\nsomething else is in the way"):
            output_folder(inside).__enter__()
    with pytest.raises(OutputError, match=r"results\.json is a folder where a file will be written"):
        output_folder(tmp_path / "out", files=("metrics.json", "results.json")).__enter__()
    with pytest.raises(OutputError, match="logs is a file where a folder will be written"):
        output_folder(tmp_path / "out", folders=("logs",)).__enter__()
    with pytest.raises(OutputError, match="is a folder where a file"):
        check_output_file(tmp_path / "out")
    with pytest.raises(OutputError, match="in the way"):
        check_output_file(tmp_path / "file" / "a.png")
    assert left(tmp_path / "out") == ["logs", "results.json"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.EROFS, "can only be read"), (errno.EACCES, "change the permissions"), (errno.ENOSPC, "is full")],
)
def test_what_the_system_refuses_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    def refuse(*arguments: Any, **options: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "open", refuse)  # how a lock is made
    with pytest.raises(OutputError, match=rf"cannot write .*{os.strerror(number)}\n.*{hint}"):
        output_folder(tmp_path / "run").__enter__()
    with pytest.raises(OutputError, match=hint):
        check_output_file(tmp_path / "folder" / "a.png")
    monkeypatch.undo()
    assert left(tmp_path) == []


def test_a_lock_that_is_a_link_makes_nothing_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock, absent, mine = tmp_path / "run" / LOCK_NAME, tmp_path / "absent", tmp_path / "mine"
    mine.write_text("mine")
    for target in (absent, mine, tmp_path):
        lock.symlink_to(target)
        with pytest.raises(OutputError, match=rf"{lock} is a symbolic link where a lock will be made"):
            output_folder(lock.parent).__enter__()
        assert lock.is_symlink()
        lock.unlink()
    assert not absent.exists()
    assert mine.read_text() == "mine"
    with output_folder(lock.parent):
        assert lock.is_file()


def pictures(count: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.integers(0, 255, (65, 97, 3), dtype=np.uint8)


def test_every_way_of_writing_says_that_the_disk_is_full(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limit = 5000
    kept = tmp_path / "kept"
    kept.write_bytes(b"before")

    def torch_save() -> None:
        with writing(kept) as partial, partial.open("wb") as file:
            torch.save({"a": torch.zeros(limit)}, file)

    def safetensors_save() -> None:
        with writing(kept) as partial:
            save_file({"a": torch.zeros(limit)}, partial)

    ways = [torch_save, safetensors_save, lambda: write_json(kept, [0] * limit)]
    with limited_files(limit):
        for way in (*ways, lambda: write_bytes(kept, b"x" * (limit + 1))):
            with pytest.raises(OutputError, match=r"cannot write .*kept: File too large\n"):
                way()
        with pytest.raises(VideoError, match=r"kept 0 of 20 pictures\.\nThe disk is probably full"):
            write_video(tmp_path / "a.mp4", pictures(20), 2.0)
        with pytest.raises(OutputError):
            write_bytes(tmp_path / "new" / "folder" / "a", b"x" * (limit + 1))
        write_bytes(kept, b"x" * limit)  # as much as there is room for
    assert capfd.readouterr().err == ""  # nothing of FFmpeg's own
    assert left(tmp_path) == ["kept"]


def test_a_fault_of_another_place_or_kind_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path / "a"):
        (tmp_path.parent / "input-that-is-not-there").read_bytes()
    with pytest.raises(RuntimeError, match="a bug"), writing(tmp_path / "a"):
        raise RuntimeError("a bug")


def leave(main: Any, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    with pytest.raises(SystemExit) as left_with:
        run_program(main)
    return left_with.value.code, capsys.readouterr().err


def test_a_program_says_what_the_system_says(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "logs/metrics.csv")

    code, said = leave(full, capsys)
    assert code == 2
    assert said.startswith("error: cannot use logs/metrics.csv: No space left on device\nthe disk is full")

    def bug() -> int:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), "x")

    with pytest.raises(FileNotFoundError):
        run_program(bug)


@pytest.mark.parametrize(("output", "code"), [("/dev/full", 2), ("a pipe that is closed", 141)])
def test_output_that_cannot_be_written(output: str, code: int) -> None:
    program = "from bevperception.errors import run_program\nrun_program(lambda: print('x' * 100000))"
    reading, writing_end = os.pipe()
    os.close(reading)
    target = os.open(output, os.O_WRONLY) if output.startswith("/") else writing_end
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=target, stderr=subprocess.PIPE, text=True, check=False
    )
    for descriptor in {target, writing_end}:
        os.close(descriptor)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert ("its output cannot be written" in done.stderr) == (code == 2)


def test_opencv_writes_where_it_is_told(tmp_path: Path) -> None:
    assert write_video(tmp_path / "a.mp4", pictures(5), 2.0) == 5
    assert left(tmp_path) == ["a.mp4"]
    assert cv2.VideoCapture(str(tmp_path / "a.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 5
