"""CPU-seconds, wall seconds and memory of a process with all its children. Linux only: it reads /proc."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL_S = 0.2


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its children used.

    Args:
        started: when it was launched, in seconds since the epoch.
        peak_pss_bytes: largest sum of proportional set sizes (a page that n processes share counts 1/n).
    """

    started: float
    wall_s: float
    cpu_s: float
    peak_pss_bytes: int


def watch(command: Sequence[str], environment: Mapping[str, str], log: Path) -> tuple[int, Usage]:
    """Run a command to its end; returns its exit status and what its processes used.

    CPU-seconds are those the kernel gives for the command and every child that was waited for, or the sum
    of what was last seen of each process, if that is more: Ray's processes are waited for by nobody, so
    their last fifth of a second is missing.
    """
    seen: dict[psutil.Process, float] = {}
    peak, started, start = 0, time.time(), time.perf_counter()
    with log.open("wb") as output:
        root = subprocess.Popen(command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT)
    tree = psutil.Process(root.pid)
    while True:
        peak = max(peak, look(tree, seen))
        ended, status, used = os.wait4(root.pid, os.WNOHANG)
        if ended:
            break
        time.sleep(INTERVAL_S)
    wall_s = time.perf_counter() - start
    root.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
    end(seen)
    cpu_s = max(used.ru_utime + used.ru_stime, sum(seen.values()))
    return root.returncode, Usage(started, wall_s, cpu_s, peak)


def look(root: psutil.Process, seen: dict[psutil.Process, float]) -> int:
    """Bytes that the tree holds now; notes the CPU-seconds of each of its processes so far."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in {root, *root.children(recursive=True), *seen}:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess, OSError):
                times = process.cpu_times()
                seen[process] = times.user + times.system
                total += pss_bytes(process.pid)
    return total


def pss_bytes(pid: int) -> int:
    """The proportional set size of one process."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def end(processes: Mapping[psutil.Process, float]) -> None:
    """Wait for what the command left running, and stop what stays."""
    _, alive = psutil.wait_procs([p for p in processes if p.is_running()], timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
