"""What is left of a folder when the power goes: no more than was synced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "close")
REAL: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CALLS}
Keeps = Literal["all", "names", "synced"]
"""After ``kill -9`` all is left; after a power cut the synced content, under names as they are (a disk may be
ahead with them) or as they were when their folder was synced last."""


class Disk:
    """Notes what is synced below a folder, whoever writes it; what is there at the start counts as synced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[int, dict[str, int]] = {}
        self.content: dict[int, bytes] = {}
        self.held: list[int] = []  # no number of a file is used again while it is open
        for folder, _, files in os.walk(root):
            for path in (Path(folder), *(Path(folder, name) for name in files)):
                self.note(path)

    def note(self, path: Path) -> None:
        """A file or folder is on the disk as it is now."""
        self.held.append(REAL["open"](path, os.O_RDONLY))
        number = os.fstat(self.held[-1]).st_ino
        if path.is_dir():
            self.names[number] = self.listing(path)
        else:
            self.content[number] = path.read_bytes()

    def listing(self, path: Path) -> dict[str, int]:
        return {entry.name: entry.inode() for entry in os.scandir(path)}

    def cut(self, keeps: Keeps, ahead: str = "") -> None:
        """Make the folder what a power cut leaves of it.

        Args:
            ahead: one name of the folder itself that came to the disk before its sync.
        """
        if keeps == "all":
            return
        if keeps == "names":
            for folder, _, _ in os.walk(self.root):
                self.names[Path(folder).stat().st_ino] = self.listing(Path(folder))
        top = dict(self.names[self.root.stat().st_ino])
        if ahead:
            top[ahead] = (self.root / ahead).stat().st_ino
        kinds = {e.inode() for f, _, _ in os.walk(self.root) for e in os.scandir(f) if e.is_dir()}
        kinds |= set(self.names)
        for entry in self.root.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.build(self.root, top, kinds)

    def build(self, path: Path, names: dict[str, int], folders: set[int]) -> None:
        for name, number in names.items():
            if number in folders:
                (path / name).mkdir()
                self.build(path / name, self.names.get(number, {}), folders)
            else:
                (path / name).write_bytes(self.content.get(number, b""))


class Cut:
    """Counts the system calls of a process, and ends it at one of them, with all that was not synced."""

    def __init__(self, disk: Disk, keeps: Keeps, at: int = 0) -> None:
        self.disk, self.keeps, self.at, self.count = disk, keeps, at, 0
        for name in CALLS:
            setattr(os, name, self.counted(name))

    def counted(self, name: str) -> Callable[..., Any]:
        def call(*words: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                if name == "write":
                    REAL["write"](words[0], words[1][: len(words[1]) // 2])
                self.crash(9)
            if name == "fsync":
                return self.disk.note(Path(os.readlink(f"/proc/self/fd/{words[0]}")))
            return REAL[name](*words, **options)

        return call

    def crash(self, code: int, ahead: str = "") -> None:
        for name, real in REAL.items():
            setattr(os, name, real)
        self.disk.cut(self.keeps, ahead)
        os._exit(code)
