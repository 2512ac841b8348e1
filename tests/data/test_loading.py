"""Loader processes: what cannot reach the main process is said there."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import get_worker_info

from bevperception.data.loading import build_loader, require_loaded
from bevperception.errors import ConfigError, run_program
from bevperception.structures import BadSample, Batch
from tests.training.standin import TinySource

BATCHES = [[(0, 0)], [(1, 0)], [(2, 0)]]
PATIENCE_S = 60.0
"""After which a loader that would wait without end gives up."""


class Source(TinySource):
    """Samples of which the second calls ``before`` in the process that loads it."""

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        super().__init__(history=1)
        self._before = before

    def __getitem__(self, item: tuple[int, int]) -> Batch | BadSample:
        assert get_worker_info() is not None
        if item[0] == 1:
            self._before()
        return super().__getitem__(item)


def load(source: Source) -> list[Any]:
    loader = build_loader(source, BATCHES, workers=1)
    loader.timeout = PATIENCE_S
    return [require_loaded(loaded) for loaded in loader]


def test_batches_come_through_whole() -> None:
    for (item,), found in zip(BATCHES, load(Source()), strict=True):
        wanted = TinySource(history=1)[item]
        assert isinstance(wanted, Batch)
        assert torch.equal(found.frames.images, wanted.frames.images)
        assert torch.equal(found.history[0].bev_to_image, wanted.history[0].bev_to_image)
        assert torch.equal(found.targets.boxes[0].values, wanted.targets.boxes[0].values)
        assert found.tokens == wanted.tokens


def test_too_little_shared_memory_is_said() -> None:
    def shrink() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # of files in /dev/shm, too

    with pytest.raises(
        ConfigError, match=r"a batch does not go through shared memory: .*\n.*data\.workers=0"
    ):
        load(Source(shrink))


def test_loader_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """In the middle of a sample that takes for ever: nothing asks them for another one."""
    told = tmp_path / "worker"

    def wait_for_ever() -> None:
        told.write_text(str(os.getpid()))
        time.sleep(10 * PATIENCE_S)

    parent = multiprocessing.get_context("fork").Process(target=load, args=(Source(wait_for_ever),))
    parent.start()
    deadline = time.monotonic() + PATIENCE_S
    while not (told.exists() and told.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    worker = int(told.read_text())
    parent.kill()
    parent.join()
    try:
        while is_alive(worker) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not is_alive(worker)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def is_alive(process: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        state = Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")


def test_a_killed_loader_process_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    def program() -> None:
        load(Source(lambda: os.kill(os.getpid(), signal.SIGKILL)))

    with pytest.raises(SystemExit) as left:
        run_program(program)
    assert left.value.code == 2
    said = capfd.readouterr().err
    assert re.fullmatch(r"error: a process that loads data has died\n.*\(data\.workers\).*\n", said)
    with pytest.raises(RuntimeError, match="another"):
        run_program(lambda: (_ for _ in ()).throw(RuntimeError("another")))
