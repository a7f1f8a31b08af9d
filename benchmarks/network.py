"""What a network costs: start-up, seconds a round, an adapter of 50 MB, and memory over a hundred rounds.

    python -m benchmarks.network --out DATED.json

A server and three sites as processes on this machine, over mutual TLS, against the same run simulated in one
process. A small model makes training next to free, so that what is left of a round is the way there and back.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.peers import machine
from tests.network.federation import Federation, rows, wait_for_rounds
from tests.site_runs import SITES
from tests.small_runs import results

WIDE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 4,
}
RANK, ROUNDS = 232, 100
MB = 1e6
PATIENCE_S = 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the run whose memory is watched")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        with running(Path(scratch) / "small") as federation:
            found = {"rounds": seconds_a_round(federation), "memory": memory(federation, given.rounds)}
        with running(Path(scratch) / "wide", wide=True) as federation:
            found["wide"] = wide_adapter(federation)
    print(json.dumps(found, indent=2))
    if given.out is not None:
        facts = {"date": str(datetime.date.today()), "machine": machine(), "load": psutil.getloadavg()}
        given.out.write_text(json.dumps({**facts, **found}, indent=2) + "\n")


@contextlib.contextmanager
def running(folder: Path, wide: bool = False) -> Iterator[Federation]:
    """A federation whose server and sites are up.

    Args:
        wide: with a model whose adapter takes 50 MB, and sites that allow one.
    """
    folder.mkdir()
    federation = Federation.made_in(folder)
    if wide:
        from tests.conftest import tiny_network

        tiny_network("bert", **WIDE).save_pretrained(folder / "model")
        for site in SITES:
            with (folder / site / "site.toml").open("a") as table:
                table.write(f"[limits]\nmax_rank = {RANK}\n")
    for name in ("server", *SITES):
        federation.start(name)
    try:
        yield federation
    finally:
        for name in list(federation.running):
            federation.kill(name)


def seconds_a_round(federation: Federation) -> dict[str, Any]:
    """Seconds from the command to the first row, and of each later round, over the network and embedded."""
    found: dict[str, Any] = {}
    for network in (True, False):
        name = "network" if network else "embedded"
        federation.run(federation.folder / f"{name}-warm", "rounds=1", network=network)  # the sites are there
        first_s, taken = timed(federation, name, "rounds=25", network=network)
        found[name] = {"first_row_s": first_s, "round_s": median(taken), "least_s": min(taken)}
    found["same_bits"] = same(federation.folder / "network", federation.folder / "embedded")
    found["overhead_s"] = found["network"]["round_s"] - found["embedded"]["round_s"]
    return found


def timed(federation: Federation, name: str, *settings: str, network: bool) -> tuple[float, list[float]]:
    """Seconds from the command to the first row, and from each row to the next."""
    out, begun = federation.folder / name, time.perf_counter()
    driver = federation.begin(f"{name}.driver", *federation.run_words(out, *settings, network=network))
    seen: list[float] = []
    while driver.poll() is None:
        new = len(rows(out)) - len(seen)
        seen += [time.perf_counter() - begun] * new
        time.sleep(0.01)
    assert driver.returncode == 0, (federation.folder / f"{name}.driver.out").read_text()
    return seen[0], [after - before for before, after in pairwise(seen)]


def same(first: Path, second: Path) -> bool:
    return results(first)["state.safetensors"] == results(second)["state.safetensors"]


def wide_adapter(federation: Federation) -> dict[str, Any]:
    """Four rounds with an adapter of 50 MB, there and back, over the network and embedded."""
    settings = ("rounds=4", "adapter.targets=all-linear", f"adapter.rank={RANK}", "training.local_steps=1")
    _, there = timed(federation, "network", *settings, network=True)
    _, here = timed(federation, "embedded", *settings, network=False)
    found = [federation.folder / name for name in ("network", "embedded")]
    size = max(row["bytes_up"] for row in rows(found[0], "clients.jsonl"))
    taken = {"network": median(there), "embedded": median(here)}
    return {"update_mb": size / MB, "same_bits": same(*found), "round_s": taken}


def memory(federation: Federation, rounds: int) -> dict[str, Any]:
    """Resident megabytes of the processes of a job, every tenth of a run, and whether they stayed."""
    out = federation.folder / "memory"
    driver = federation.begin("memory.driver", *federation.run_words(out, f"rounds={rounds}"))
    seen: list[dict[str, Any]] = []
    pids: dict[str, int] = {}
    for number in range(rounds // 10, rounds + 1, rounds // 10):
        wait_for_rounds(out, min(number, rounds - 1), PATIENCE_S)  # after the last one the processes end
        pids = pids or {**processes(out), "server": server_process(federation)}
        held = {name: psutil.Process(pid).memory_info().rss / MB for name, pid in pids.items()}
        seen.append({"round": number, **held})
    assert driver.wait() == 0
    told = json.loads((out / "sites.json").read_text())
    stayed = all(row["pid"] == pids[name] and row["loads"] == 1 for name, row in told.items())
    return {"resident_mb": seen, "grown_mb": grown(seen), "loaded_once": stayed}


def processes(run: Path) -> dict[str, int]:
    """The process of each site, as it says itself."""
    return {name: row["pid"] for name, row in json.loads((run / "sites.json").read_text()).items()}


def server_process(federation: Federation) -> int:
    """The process of the server in which a job runs."""
    family = psutil.Process(federation.running["server"].pid).children(recursive=True)
    return next(one.pid for one in family if "runner_process" in " ".join(one.cmdline()))


def grown(seen: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How much each process grew over the second half of a run."""
    middle, last = seen[len(seen) // 2 - 1], seen[-1]
    return {name: last[name] - middle[name] for name in last if name != "round"}


if __name__ == "__main__":
    main()
