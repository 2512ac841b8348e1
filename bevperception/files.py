"""Atomic writing: whole files or none, with several processes, a full disk, an interrupt or a kill.

What is being written lies beside its final place in a folder of its own, ``.NAME.RANDOM.partial``, and takes
its place in one step. A lock on that folder says that its process lives; the system lets go of the lock
whatever ends the process. So the next writer knows what a dead one has left behind, and removes it.

Locks are those of ``flock``. Where a disk has none all works but these: left-over partial folders stay, and a
second writer of an :func:`output_folder` is not noticed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from bevperception.errors import BevError, OutputError, os_error_in, os_error_sentence

LOCK_NAME: Final = ".lock"
"""In a folder that a program writes into, as long as it does."""

_PARTIAL: Final = re.compile(r"\..+\.[0-9a-f]{16}\.partial")

_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
"""Errors of a disk without locks; NFS, where it is a folder that is to be locked."""

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""
_tidied: set[Path] = set()
"""Folders that this process has looked through for left-over partial files."""


@contextlib.contextmanager
def writing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write a file to, which takes its final place when the block ends well.

    Whoever reads ``target`` meanwhile sees what was there before. A block that ends with an exception leaves
    nothing. Of several writers of one file the last one to end wins, whole.

    Args:
        target: of the file; its folder is made, a file that is there is replaced.

    Yields:
        A path on the same disk with the same last part, where nothing is yet.

    Raises:
        OutputError: it cannot be written; what was there is untouched.
    """
    target = Path(target)
    with explained(target), _partial_folder(target) as folder:
        partial = folder / target.name
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the name without the content
        partial.chmod(folder.stat().st_mode & 0o666)  # safetensors lets nobody else read its files
        os.replace(partial, target)


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, see :func:`writing`."""
    with writing(target) as path:
        path.write_text(text, encoding="utf-8")


def write_bytes(target: str | os.PathLike[str], data: bytes) -> None:
    """Write a binary file, see :func:`writing`."""
    with writing(target) as path:
        path.write_bytes(data)


def write_json(target: str | os.PathLike[str], content: Any, **options: Any) -> None:
    """Write a JSON file, see :func:`writing`.

    Args:
        target: of the file.
        content: plain containers.
        **options: of :func:`json.dump`.
    """
    with writing(target) as path, path.open("w", encoding="utf-8") as file:
        json.dump(content, file, **options)


@contextlib.contextmanager
def writing_folder(target: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """Give a path to make a folder at, which takes its final place when the block ends well.

    Args:
        target: of the folder.
        replace: take the place of a folder that is there; otherwise it must be absent or empty.

    Yields:
        A path with the same last part, where nothing is yet.

    Raises:
        OutputError: it cannot be written, or something is in the way; what was there is untouched.
    """
    target = Path(target)
    with explained(target), _partial_folder(target) as folder:
        yield folder / target.name
        if replace and target.is_dir():
            _exchange(folder / target.name, target, folder / "old")
        else:
            os.replace(folder / target.name, target)


def _exchange(new: Path, target: Path, old: Path) -> None:
    """Put a folder in the place of another; on failure the other one comes back."""
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise


@contextlib.contextmanager
def output_folder(
    folder: str | os.PathLike[str],
    files: Sequence[str] = (),
    folders: Sequence[str] = (),
    writes: bool = True,
) -> Iterator[Path]:
    """Open a folder for the results of a program before it works for hours, and keep other programs out.

    It is made and tried: a file is written into it. As long as the block runs, another program that opens it
    is refused. A folder that was made here and is still empty at the end goes again.

    Args:
        folder: to write into.
        files, folders: what will be written there, by name, as far as it is known.
        writes: False for those processes of a group that write nothing; then nothing is done.

    Yields:
        ``folder``.

    Raises:
        OutputError: it cannot be written into, something is in the way, or another program writes into it.
    """
    folder = Path(folder)
    if not writes:
        yield folder
        return
    with _made(folder):
        with explained(folder):
            lock = _lock(folder / LOCK_NAME)
        if lock is None:
            raise OutputError(
                f"another program is writing into {folder}\nwait until it has ended, or choose another folder"
            )
        with _released(lock, lambda: (folder / LOCK_NAME).unlink(missing_ok=True)):
            for name in files:
                _refuse_in_the_way(folder / name, wanted_folder=False)
            for name in folders:
                _refuse_in_the_way(folder / name, wanted_folder=True)
            with explained(folder):
                remove_leftovers(folder)
            yield folder


def open_lock(path: str | os.PathLike[str]) -> int:
    """Open a file to lock it, which is made if need be; never what a symbolic link leads to.

    Returns:
        A descriptor, to be closed by the caller.

    Raises:
        OutputError: it is a symbolic link: what it leads to would be made.
        OSError: it cannot be opened.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(path):
            raise OutputError(f"{path} is a symbolic link where a lock will be made; remove it") from None
        raise


def check_output_file(target: str | os.PathLike[str]) -> None:
    """Try whether a file can be written, before the work for it begins; leaves nothing behind.

    Raises:
        OutputError: it cannot.
    """
    target = Path(target)
    with explained(target):
        _refuse_in_the_way(target, wanted_folder=False)
        with _partial_folder(target) as folder:
            (folder / target.name).write_bytes(b"1")


def _refuse_in_the_way(path: Path, wanted_folder: bool) -> None:
    if os.path.lexists(path) and path.is_dir() != wanted_folder:
        kind, wanted = ("a file", "folder") if wanted_folder else ("a folder", "file")
        raise OutputError(
            f"{path} is {kind} where a {wanted} will be written; remove it or choose another place"
        )


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn what the system says against writing into a sentence.

    Args:
        target: what is being written.

    Raises:
        OutputError: instead of an OSError, or of what a library makes of one.
    """
    try:
        yield
    except BevError:
        raise
    except Exception as error:
        reason = os_error_in(error)
        if reason is None or not _concerns(reason, target):
            raise
        raise OutputError(os_error_sentence(reason, f"cannot write {target}")) from error


def _concerns(error: OSError, target: Path) -> bool:
    """Whether an error is about a target's folder, one above or something in it, as far as it tells."""
    if not isinstance(error.filename, (str, os.PathLike)):
        return True
    named, folder = Path(error.filename).absolute(), target.parent.absolute()
    return named.is_relative_to(folder) or folder.is_relative_to(named)


def remove_leftovers(folder: Path) -> None:
    """Remove partial folders of processes that are gone; looks once in a process's life.

    Args:
        folder: where they lie; those of living processes stay, of other machines, too.
    """
    folder = folder.absolute()
    if folder in _tidied:
        return
    _tidied.add(folder)
    with os.scandir(folder) as entries:
        partial = [Path(entry.path) for entry in entries if _PARTIAL.fullmatch(entry.name)]
    for path in partial:
        with contextlib.suppress(OSError):  # another user's, or a disk without locks
            _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    lock = _lock(path, folder=True, must=True)
    if lock is not None:
        with _released(lock, lambda: shutil.rmtree(path)):
            pass


@contextlib.contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """Make an empty folder beside a target, locked; it goes with all that is left in it."""
    with _made(target.parent):
        remove_leftovers(target.parent)
        folder, lock = _new_partial(target)
        with _released(lock, lambda: shutil.rmtree(folder)):
            yield folder


def _new_partial(target: Path) -> tuple[Path, int]:
    """Make the folder of :func:`_partial_folder`; returns it and its lock."""
    while True:
        folder = target.with_name(f".{target.name}.{os.urandom(8).hex()}.partial")
        folder.mkdir()
        try:
            lock = _lock(folder, folder=True)
        except OSError:
            folder.rmdir()
            raise
        if lock is not None:  # or another process took it for a left-over before it was locked
            return folder, lock


def _lock(path: Path, folder: bool = False, must: bool = False) -> int | None:
    """Lock a file, which is made if need be, or a folder that is there.

    Args:
        path: to lock.
        folder: whether it is a folder.
        must: fail on a disk that has no locks, instead of going on without.

    Returns:
        The descriptor that holds the lock; None if another process has it, or has removed the folder.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW) if folder else open_lock(path)
        except FileNotFoundError:
            if folder:
                return None
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if must or error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            _held.add(descriptor)
            return descriptor
        os.close(descriptor)  # the one who had the lock has removed it


@contextlib.contextmanager
def _released(lock: int, remove: Callable[[], object]) -> Iterator[None]:
    """Remove something at the end of a block, then let go of the lock on it."""
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:  # and not a process that was forked inside the block
            try:
                remove()
            finally:
                _held.discard(lock)
                os.close(lock)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; those of them that are empty at the end of the block go again."""
    missing: list[Path] = []
    try:
        with explained(folder):
            missing += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


def _close_in_child() -> None:
    """Close the locks that a forked process got from its parent: they tell whether the parent lives."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
