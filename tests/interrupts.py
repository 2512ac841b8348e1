"""Programs that are interrupted from the keyboard: the terminal sends SIGINT to all their processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 60.0
"""Nothing that is waited for here takes so long, and everything that must be cut off takes longer."""


@dataclass
class Program:
    """A program with a process group of its own, as in a terminal."""

    process: subprocess.Popen[str]

    def interrupt(self) -> tuple[int, str, str]:
        """Press Ctrl-C; exit code, stdout and stderr."""
        os.killpg(self.process.pid, signal.SIGINT)
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, err

    def wait_until(self, holds: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert self.process.poll() is None, f"it ended before {what}: {self.process.communicate()[1]}"
            assert time.monotonic() < deadline, f"no {what}"
            time.sleep(0.02)

    def children(self) -> list[int]:
        """Living processes of the group but the first one."""
        shown = subprocess.run(
            ["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True, check=True
        )
        rows = [line.split() for line in shown.stdout.splitlines()]
        group = [int(pid) for pid, pgid, state in rows if int(pgid) == self.process.pid and state[0] != "Z"]
        return [pid for pid in group if pid != self.process.pid]


@contextmanager
def started(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Program]:
    """Run Python with some arguments; whatever is left of it at the end is killed."""
    command: Sequence[str] = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )
    program = Program(process)
    try:
        yield program
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
