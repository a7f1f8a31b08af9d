"""Files that a crash leaves whole, old or new: written, synced, renamed; and one writer of a folder.

Every write of a run goes through here, so that a test can break each system call in turn.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Literal

from polyrank.errors import InputError, RunError

_SPARE_BYTES = 1 << 20
_LOCK = ".lock"
_held: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """The right to write a folder; it ends with `release`, with the object, or with the process."""

    def __init__(self, number: int) -> None:
        self._close = weakref.finalize(self, os.close, number)
        _held.add(self)

    def release(self) -> None:
        """Let others write the folder; a second time does nothing."""
        self._close()


def kind_at(path: Path) -> Literal["file", "folder", "other", "nothing"]:
    """What lies at a path; nothing where the name is one that no file can have."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return "nothing"
    return "file" if S_ISREG(found.st_mode) else "folder" if S_ISDIR(found.st_mode) else "other"


def write(path: Path, data: bytes) -> None:
    """A file that is on the disk when this returns; on a crash, part of it."""
    _put(path, data, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def append(path: Path, data: bytes) -> None:
    """More bytes at the end of a file, on the disk when this returns; the name of a new file is not yet."""
    _put(path, data, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def replace(path: Path, data: bytes) -> None:
    """A file that is the old one or the new one at every moment, and on the disk when this returns."""
    unfinished = path.with_name(f"{path.name}.tmp")
    write(unfinished, data)
    os.replace(unfinished, path)
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """A new folder, with those above it that are not there; their names are on the disk when this returns.

    Raises: OSError when it is there already or cannot be made.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True)
    for folder in new:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """The names in a folder are on the disk when this returns."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def drop_folder(path: Path) -> None:
    """Take a folder away at once; its files follow."""
    leaving = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(leaving, ignore_errors=True)
    if path.exists():
        os.rename(path, leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def need_space(folder: Path, num_bytes: int) -> None:
    """Raises: OSError when a write of so many bytes could not be followed by one more of the small files."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _SPARE_BYTES:
        raise OSError(f"{(num_bytes + _SPARE_BYTES) / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What goes wrong on the disk in here stops the run with one line that says so.

    Raises: RunError in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"disk: {path} cannot be written ({error.strerror or error})") from error


def lock(folder: Path) -> Lock:
    """The right to write a run folder, for as long as the returned object lives.

    Raises: InputError at once when another process has it.
    """
    import fcntl

    number = -1
    try:
        number = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if number >= 0:
            os.close(number)
        taken = isinstance(error, BlockingIOError)
        why = "is being written by another process" if taken else f"cannot be locked ({error.strerror})"
        raise InputError("RUN", str(folder), f"{why}; nothing was touched") from error
    return Lock(number)


def is_taken(error: InputError) -> bool:
    """Whether `lock` failed because another process has the folder, and not for good."""
    return isinstance(error.__cause__, BlockingIOError)


def is_held(folder: Path) -> bool:
    """Whether another process has the lock of a folder; to find out, it is taken for a moment.

    Raises: InputError when it cannot be locked at all.
    """
    try:
        lock(folder).release()
    except InputError as error:
        if is_taken(error):
            return True
        raise
    return False


def _put(path: Path, data: bytes, flags: int) -> None:
    number = os.open(path, flags, 0o644)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(number, left) :]
        os.fsync(number)
    finally:
        os.close(number)


def _let_go() -> None:
    """A forked worker must not keep the lock of a parent that was killed."""
    for held in list(_held):
        held.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
