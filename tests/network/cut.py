"""Cut one link in one phase of a round: ``python cut.py BRIDGE PORT PHASE SECONDS BYTES``.

It runs where the bridge is, watches what the port has sent and received, takes the port off the bridge at the
moment that was asked for, and puts it back; no packet tells anybody. The phase is that of the site behind the
port, and BYTES is what a task or an update weighs at least. Prints one line of JSON.
"""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

ADD, TAKE_AWAY = 0x89A2, 0x89A3  # SIOCBRADDIF, SIOCBRDELIF
QUIET_S, TICK_S, PATIENCE_S = 0.15, 0.002, 300.0
BEGUN = 0.15
"""The share of a task or an update that has passed when its transfer is cut."""


class Port:
    """What passes a port of a bridge: ``down`` to the site, ``up`` from it."""

    def __init__(self, name: str) -> None:
        self.files = {way: Path(f"/sys/class/net/{name}/statistics/{word}_bytes") for way, word in
                      (("down", "tx"), ("up", "rx"))}  # fmt: skip
        self.last = self.counts()
        self.moved = time.monotonic()

    def counts(self) -> dict[str, int]:
        return {way: int(path.read_text()) for way, path in self.files.items()}

    def until(self, fits: Callable[[dict[str, int], float], bool]) -> dict[str, int]:
        """Look until something is so of the bytes that have passed and of the seconds of quiet."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            now = self.counts()
            if (
                sum(now.values()) - sum(self.last.values()) > 20_000
            ):  # less is a sign of life, and no transfer
                self.last, self.moved = now, time.monotonic()
            if fits(now, time.monotonic() - self.moved):
                return now
            if time.monotonic() > deadline:
                raise SystemExit(f"the phase did not come: {now}")
            time.sleep(TICK_S)


def wait_for(phase: str, port: Port, size: int) -> dict[str, int]:
    """Wait for a phase of the next round that begins; returns what had passed at the cut."""
    start = port.until(lambda now, quiet: quiet > QUIET_S)
    start = port.until(lambda now, quiet: now["down"] - start["down"] > BEGUN * size)
    base = start["down"] - BEGUN * size
    if phase == "downloading":
        return start
    start = port.until(lambda now, quiet: now["down"] - base > 0.95 * size and quiet > QUIET_S)
    if phase == "computing":
        return start
    sent = port.until(lambda now, quiet: now["up"] - start["up"] > BEGUN * size)
    if phase == "uploading":
        return sent
    return port.until(lambda now, quiet: now["up"] - start["up"] > 0.95 * size and quiet > QUIET_S)


def main(bridge: str, name: str, phase: str, seconds: str, size: str) -> None:
    port = Port(name)
    with socket.socket() as control:
        request = struct.pack("16si", bridge.encode(), socket.if_nametoindex(name))
        before = wait_for(phase, port, int(size))
        fcntl.ioctl(control, TAKE_AWAY, request)
        time.sleep(1.0)
        at_cut = port.counts()
        time.sleep(float(seconds) - 1.0)
        fcntl.ioctl(control, ADD, request)
    print(json.dumps({"phase": phase, "seconds": float(seconds), "before": before, "a second later": at_cut}))


if __name__ == "__main__":
    main(*sys.argv[1:])
