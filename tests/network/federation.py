"""A server and three sites as processes on this machine, over mutual TLS."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.site_runs import SITES, make_sites, site_settings

_POLYRANK = """
import signal
from polyrank.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell would ignore it
main()
"""
SMALL = (
    "training.local_steps=2",
    "training.batch_size=4",
    "training.learning_rate=0.02",
    "model.max_length=12",
    "adapter.rank=3",
    "sampling.count=3",
    "engine.workers=1",
    "engine.fuse=1",
)


@dataclass
class Federation:
    """Kits in ``folder``/kits, and the processes that are running.

    Args:
        task: what its sites have: texts with labels, or prompts with responses.
    """

    folder: Path
    task: str = "classification"
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @classmethod
    def made_in(cls, folder: Path, server: str = "localhost", task: str = "classification") -> Federation:
        make_sites(folder)
        federation = cls(folder, task)
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = str(probe.getsockname()[1])
        named = [word for site in SITES for word in ("--site", site)]
        words = ["provision", "demo", "--server", server, "--port", port, "--out", str(folder / "kits")]
        subprocess.run(federation.command(*words, *named), check=True, capture_output=True)
        return federation

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-c", _POLYRANK, *words]

    def start(self, name: str, *before: str) -> None:
        """The server or a site; what it prints goes to ``folder``/NAME.out.

        Args:
            before: words that lead the command, such as those that enter a network namespace.
        """
        kit = str(self.folder / "kits" / name)
        table = str(self.folder / name / ("speaker.toml" if self.task == "causal_lm" else "site.toml"))
        words = ["serve", kit] if name == "server" else ["join", kit, "--data", table]
        self.running[name] = self.begin(name, *words, before=before)

    def begin(self, told: str, *words: str, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        command = [*before, *self.command(*words)]
        with (self.folder / f"{told}.out").open("ab") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ})

    def kill(self, name: str) -> None:
        """kill -9, for the process and for those that FLARE started for its jobs."""
        process = self.running.pop(name)
        family = [psutil.Process(process.pid)]
        with contextlib.suppress(psutil.NoSuchProcess):
            family += family[0].children(recursive=True)
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()

    def run_words(self, out: Path, *settings: str, network: bool = True) -> list[str]:
        kit = ["engine.kind=flare", f"engine.kit={self.folder / 'kits' / 'admin'}"] if network else []
        name = "speaker" if self.task == "causal_lm" else "model"
        model = [f"task={self.task}", f"model.name={self.folder / name}"]
        given = [*model, *site_settings(self.folder, self.task), *SMALL, *kit, *settings]
        return ["run", "--out", str(out), *(word for setting in given for word in ("--set", setting))]

    def run(self, out: Path, *settings: str, network: bool = True) -> float:
        """A whole run; returns its seconds."""
        start = time.perf_counter()
        words = self.run_words(out, *settings, network=network)
        done = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr
        return time.perf_counter() - start


def rows(run: Path, name: str = "rounds.jsonl") -> list[dict[str, Any]]:
    text = (run / name).read_text() if (run / name).exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for_rounds(run: Path, count: int, patience_s: float = 150.0) -> None:
    until = time.monotonic() + patience_s
    while len(rows(run)) < count:
        assert time.monotonic() < until, f"{run.name}: {len(rows(run))} of {count} rounds"
        time.sleep(0.02)
