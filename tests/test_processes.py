"""Processes that programs start: an interrupt, an error or the end of their parent ends them."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from bevperception.processes import WorkerPool, interrupts_held
from tests.interrupts import PATIENCE_S, Program, started

POOL = """
import os, sys, time
from pathlib import Path
from bevperception.errors import run_program
from bevperception.processes import WorkerPool, interrupts_held

def work(folder, number):
    Path(folder, f"{number}").touch()
    time.sleep(600)

def main():
    with WorkerPool(2) as pool:
        waiting = [pool.submit(work, sys.argv[1], number) for number in range(5)]
        Path(sys.argv[1], "submitted").touch()
        waiting[0].result()

if __name__ == "__main__":
    run_program(main)
"""


def write_program(folder: Path, text: str) -> str:
    path = folder / "program.py"
    path.write_text(text)
    return str(path)


def none_left(program: Program) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while program.children() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not program.children()


@pytest.mark.parametrize("sign", ["submitted", "1"])
def test_an_interrupt_ends_workers_in_imports_and_in_tasks(tmp_path: Path, sign: str) -> None:
    with started(write_program(tmp_path, POOL), str(tmp_path)) as program:
        program.wait_until((tmp_path / sign).exists, sign)
        code, out, err = program.interrupt()
        assert (code, out, err) == (130, "", "interrupted\n")
        assert none_left(program)


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    with started(write_program(tmp_path, POOL), str(tmp_path)) as program:
        program.wait_until((tmp_path / "1").exists, "task")
        program.process.kill()
        assert none_left(program)


def fail(message: str) -> None:
    raise ValueError(message)


def test_an_error_in_a_task_ends_the_others_and_comes_out() -> None:
    pool = WorkerPool(2)
    failing = pool.submit(fail, "seven")
    others = [pool.submit(time.sleep, 600.0) for _ in range(3)]
    with pytest.raises(ValueError, match="seven"), pool:
        failing.result()
    assert all(other.done() for other in others)


def test_tasks_give_their_results_after_a_preparation() -> None:
    with WorkerPool(1, prepare) as pool:
        assert pool.submit(prepared).result() == ["once"]
        assert pool.submit(max, 3, 5).result() == 5


def test_workers_never_get_the_interrupt() -> None:
    """Or they would print a traceback each before they are killed."""
    with WorkerPool(1) as pool:
        assert pool.submit(interrupt_itself).result() == "went on"


def interrupt_itself() -> str:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    return "went on"


_PREPARED: list[str] = []


def prepare() -> None:
    _PREPARED.append("once")


def prepared() -> list[str]:
    return _PREPARED


PARENT = """
import sys
from bevperception.errors import run_program
from bevperception.processes import run_beside

def main():
    return run_beside([sys.executable, "-c", CHILD, sys.argv[1]])

CHILD = '''{child}'''

if __name__ == "__main__":
    run_program(main)
"""
TIDY = """
import sys, time
from pathlib import Path
try:
    Path(sys.argv[1], "ready").touch()
    time.sleep(600)
finally:
    time.sleep(1.0)
    Path(sys.argv[1], "tidy").touch()
"""
STUBBORN = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)
Path(sys.argv[1], "ready").touch()
time.sleep(600)
"""


def test_a_program_beside_has_time_to_tidy_up_after_an_interrupt(tmp_path: Path) -> None:
    with started(write_program(tmp_path, PARENT.format(child=TIDY)), str(tmp_path)) as program:
        program.wait_until((tmp_path / "ready").exists, "child")
        code, _, _ = program.interrupt()
        assert code == 130
        assert (tmp_path / "tidy").exists()
        assert none_left(program)


def test_a_program_beside_that_does_not_obey_is_ended(tmp_path: Path) -> None:
    with started(write_program(tmp_path, PARENT.format(child=STUBBORN)), str(tmp_path)) as program:
        program.wait_until((tmp_path / "ready").exists, "child")
        assert program.interrupt()[0] == 130
        assert none_left(program)


def test_the_exit_code_of_a_program_beside_is_its_own(tmp_path: Path) -> None:
    path = write_program(tmp_path, PARENT.format(child="raise SystemExit(7)"))
    with started(path, str(tmp_path)) as program:
        program.process.communicate(timeout=PATIENCE_S)
        assert program.process.returncode == 7


def interrupted_inside(finished: list[bool]) -> None:
    with interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        finished.append(True)


def test_an_interrupt_that_a_librarys_thread_gets_is_held_too() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()  # before the block: its mask lets SIGINT through
    finished: list[bool] = []
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted_inside(finished)
    finally:
        release.set()
        thread.join()
    assert finished == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
