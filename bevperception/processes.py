"""Processes that this one starts: they end when it ends, and an interrupt does not leave them behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, ParamSpec, TypeVar

_WATCH_S: Final = 1.0
_TIDY_UP_S: Final = 5.0
"""How long a program may take to end after an interrupt, and again after SIGTERM."""

PROGRAM = (sys.executable, str(Path(__file__).resolve().parent / "__main__.py"))
"""The command `bevperception` for a process of its own; the sub-command follows.

It is of this copy of the package. Not ``-m bevperception``, which takes a copy in the working directory.
"""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def program_name(command: str) -> str:
    """How the running program is called, for messages and ``--help``.

    Args:
        command: its sub-command, as the file in tools/ is called.

    Returns:
        ``tools/x.py`` where that is what the user has started, ``bevperception x`` otherwise.
    """
    started = Path(sys.argv[0])
    if started.stem in (command, f"{command}_checkpoint") and started.absolute().parent.name == "tools":
        return f"tools/{started.name}"
    return f"bevperception {command.replace('_', '-')}"


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C until the block ends; processes that are started in it never get it.

    The terminal sends SIGINT to all processes of a command. One that is in the middle of its imports or of a
    task would answer with a traceback, or go on. So the first process alone gets it, and ends the others.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # The mask is this thread's. Linux may give the signal to a library's thread, and Python would then
    # interrupt this one all the same: so the handler waits, too.
    waiting: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number)) if main else None
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if waiting:
            signal.raise_signal(signal.SIGINT)


def run_beside(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a program with this one's terminal, wait for its end and return its exit code.

    After an interrupt, which reaches both, it has time to tidy up, unlike with :func:`subprocess.run`.

    Args:
        command: program and arguments.
        environment: of the program; this one's if none is given.
    """
    process = subprocess.Popen(command, env=environment)
    try:
        return process.wait()
    except BaseException:
        end_all([process])
        raise


def end_all(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Wait for programs that got the terminal's interrupt too; those that go on get SIGTERM, then SIGKILL."""
    for signal_number in (None, signal.SIGTERM, signal.SIGKILL):
        deadline_s = time.monotonic() + _TIDY_UP_S
        for process in processes:
            if signal_number is not None:
                process.send_signal(signal_number)  # does nothing to one that has ended
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline_s - time.monotonic()))


class WorkerPool(ProcessPoolExecutor):
    """Newly started processes that take tasks; use it in a ``with`` statement.

    If the block ends with an exception, an interrupt for example, the processes are killed in the middle of
    their tasks; what a task writes must bear that (:mod:`bevperception.files`). If this process is killed,
    they end by themselves.

    Args:
        workers: processes, at most.
        prepare: run in each process before its first task.
    """

    def __init__(self, workers: int, prepare: Callable[[], None] | None = None) -> None:
        self._others = set(multiprocessing.active_children())
        context = multiprocessing.get_context("spawn")
        super().__init__(workers, mp_context=context, initializer=_begin, initargs=(os.getpid(), prepare))

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """See :meth:`concurrent.futures.Executor.submit`."""
        with interrupts_held():  # a submission may start a process
            return super().submit(fn, *args, **kwargs)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is not None:
            self.end_now()
        else:
            self.shutdown(wait=True)
        return None

    def end_now(self) -> None:
        """Kill the processes in the middle of their tasks."""
        for process in set(multiprocessing.active_children()) - self._others:
            process.kill()
        self.shutdown(wait=True, cancel_futures=True)


def end_with_parent(parent: int) -> None:
    """End this process, whatever it does, soon after its parent; to be called once in a started process.

    Args:
        parent: the parent's process id, which may have ended already.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(parent: int, prepare: Callable[[], Any] | None) -> None:
    """Set a worker up."""
    end_with_parent(parent)
    if prepare is not None:
        prepare()
