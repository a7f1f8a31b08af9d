"""A link that is cut, silently, in each phase of a round: nothing is lost, and the result has the same bits.

Server, driver and two sites are in one network namespace, site-b in another; a port of the bridge between
them is taken off and put back. This needs root on Linux.

POLYRANK_CUTS=all cuts every phase for 20 and for 120 s; without it one phase is cut for 20 s.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from tests.network.federation import Federation, rows, wait_for_rounds
from tests.site_runs import SITES
from tests.small_runs import results

HERE, AWAY = (f"polyrank-{side}-{os.getpid()}" for side in ("here", "away"))
BRIDGE, PORT, ADDRESS = "prbr0", "prport", "10.213.77.1"
PHASES = ("downloading", "computing", "uploading", "waiting")
ALL = os.environ.get("POLYRANK_CUTS") == "all"
CASES = [("site-b", phase, s) for s in (20, 120) for phase in PHASES] + [("all", "computing", 20)]
FEW = [("site-b", "uploading", 20)]
ROUNDS, RANK = 6, 192
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4}
SETTINGS = (
    f"rounds={ROUNDS}",
    "method=fedit",
    "adapter.targets=all-linear",
    f"adapter.rank={RANK}",
    "training.local_steps=24",
    "training.learning_rate=0.002",
    "failures.quorum=1.0",
)
SIZE = 4 * RANK * 2 * (4 * (512 + 512) + 2 * (512 + 1024))
"""Bytes of the adapter, which a task and an update weigh at least."""


pytestmark = pytest.mark.network


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def bridged():
    """Two namespaces and a bridge between them."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("makes network namespaces: root on Linux, with the program ip")
    for name in (HERE, AWAY):
        try:
            ip("netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
        ip("-n", name, "link", "set", "lo", "up")
    ip("-n", HERE, "link", "add", BRIDGE, "type", "bridge")
    ip("-n", HERE, "addr", "add", f"{ADDRESS}/24", "dev", BRIDGE)
    ip("-n", HERE, "link", "add", PORT, "type", "veth", "peer", "name", "prsite", "netns", AWAY)
    ip("-n", HERE, "link", "set", PORT, "master", BRIDGE, "up")
    ip("-n", HERE, "link", "set", BRIDGE, "up")
    ip("-n", AWAY, "addr", "add", "10.213.77.2/24", "dev", "prsite")
    ip("-n", AWAY, "link", "set", "prsite", "up")
    yield
    for name in (HERE, AWAY):
        ip("netns", "delete", name)


@pytest.fixture(scope="module")
def made(tmp_path_factory, bridged):
    """Kits for the address of the bridge, a wide model, and the run that nothing happens to."""
    from tests.conftest import tiny_network

    federation = Federation.made_in(tmp_path_factory.mktemp("link"), ADDRESS)
    tiny_network("bert", **WIDE).save_pretrained(federation.folder / "model")
    for site in SITES:
        with (federation.folder / site / "site.toml").open("a") as table:
            table.write(f"[limits]\nmax_rank = {RANK}\n")
    federation.run(federation.folder / "uncut", *SETTINGS, network=False)
    return federation


@pytest.fixture(scope="module")
def federation(made, request):
    """Its processes, with the sites behind the port that the cases name; they outlive the cuts."""
    away = SITES if request.param == "all" else (request.param,)
    for name in ("server", *SITES):
        made.start(name, "ip", "netns", "exec", AWAY if name in away else HERE)
    yield made
    for name in list(made.running):
        made.kill(name)


@pytest.mark.parametrize(("federation", "phase", "seconds"), CASES if ALL else FEW, indirect=["federation"])
def test_a_cut_link_costs_time_and_nothing_else(federation, phase, seconds):
    start, name = time.monotonic(), f"{phase}-{seconds}-{len(list(federation.folder.iterdir()))}"
    here, out = ["ip", "netns", "exec", HERE], federation.folder / name
    driver = federation.begin(
        f"{name}-driver", *federation.run_words(out, *SETTINGS, "engine.deadline_s=100"), before=here
    )
    told = federation.folder / f"{name}-driver.out"
    try:
        wait_for_rounds(out, 2, 400)
        cut = [*here, sys.executable, str(Path(__file__).with_name("cut.py"))]
        words = [*cut, BRIDGE, PORT, phase, str(seconds), str(SIZE)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds + 400, check=False)
        assert done.returncode == 0, done.stderr
        back, committed = time.monotonic(), len(rows(out))
        assert committed < ROUNDS
        wait_for_rounds(out, committed + 1, 600.0)
        recovered_s = time.monotonic() - back
        assert driver.wait(timeout=900) == 0, told.read_text()
    finally:
        driver.kill()
    told_rows = rows(out)
    facts = {**json.loads(done.stdout), "recovered_s": round(recovered_s, 1)}
    facts |= {"total_s": round(time.monotonic() - start, 1), "attempts": [r["attempts"] for r in told_rows]}
    facts |= {
        "client_wall_s": [round(row["client_wall_s"], 1) for row in told_rows],
        "driver": told.read_text(),
    }
    print(json.dumps(facts))
    expected, found = results(federation.folder / "uncut"), results(out)
    for part in ("adapter/adapter_model.safetensors", "state.safetensors"):
        assert found[part] == expected[part]
    assert [row["round"] for row in told_rows] == list(range(ROUNDS))
    for number in range(ROUNDS):
        counted = [r for r in rows(out, "clients.jsonl") if r["round"] == number and r["aggregated"]]
        assert {row["client"] for row in counted if row["error"] is None} == set(SITES)
