"""The same run over a real network: same bits, same bytes, whatever is killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from tests.network.federation import Federation, rows, wait_for_rounds
from tests.site_runs import MIXED, SITES
from tests.small_runs import results

pytestmark = pytest.mark.network
MOMENTS = int(os.environ.get("POLYRANK_KILLS", "1"))
METHODS = {
    "mixed": (*MIXED, "evaluation.per_client=true"),
    "fedara": ("method=fedara", "voting.target_rank=1", "voting.arbitration=top"),
    "legend": ("method=legend", "fleet.name=edge3", "fleet.ignore_memory=true"),
}
LONG = ("rounds=25", *MIXED, "engine.deadline_s=8", "failures.retries=5")


@pytest.fixture(scope="module")
def uninterrupted(federation: Federation) -> Path:
    out = federation.folder / "uninterrupted"
    settings = [setting for setting in LONG if not setting.startswith("engine")]
    federation.run(out, *settings, network=False)
    return out


@pytest.mark.parametrize("method", METHODS)
def test_sites_and_simulated_clients_end_with_the_same_bits_and_bytes(federation, method):
    here, there = federation.folder / f"{method}-embedded", federation.folder / f"{method}-network"
    settings = ("rounds=4", *METHODS[method])
    federation.run(here, *settings, network=False)
    federation.run(there, *settings)
    assert results(here) == results(there)
    told = json.loads((there / "sites.json").read_text())
    assert set(told) == set(SITES)
    assert all(site["loads"] == 1 for site in told.values())
    assert len({site["pid"] for site in told.values()}) == len(SITES)


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_server_killed_within_a_round_goes_on_to_the_same_adapter(federation, uninterrupted, moment):
    draw = random.Random(moment)
    out = federation.folder / f"server-{moment}"
    driver = federation.begin(f"driver-{moment}", *federation.run_words(out, *LONG))
    wait_for_rounds(out, draw.randint(1, 20))
    federation.kill("server")
    driver.kill()
    driver.wait()
    committed = len(rows(out))
    assert committed < 25
    federation.start("server")
    words = federation.command("resume", str(out))
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    expected, found = results(uninterrupted), results(out)
    assert found["adapter/adapter_model.safetensors"] == expected["adapter/adapter_model.safetensors"]
    assert found["state.safetensors"] == expected["state.safetensors"]
    assert [row["round"] for row in rows(out)] == list(range(25))


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_site_killed_within_a_round_comes_back_and_every_round_is_committed(federation, moment):
    draw = random.Random(100 + moment)
    out, victim = federation.folder / f"site-{moment}", draw.choice(SITES)
    driver = federation.begin(f"site-driver-{moment}", *federation.run_words(out, *LONG))
    wait_for_rounds(out, draw.randint(1, 12))
    federation.kill(victim)
    federation.start(victim)
    assert driver.wait(timeout=300) == 0, (federation.folder / f"site-driver-{moment}.out").read_text()
    assert [row["round"] for row in rows(out)] == list(range(25))
    last = [row for row in rows(out, "clients.jsonl") if row["round"] == 24]
    assert {row["client"] for row in last if row["error"] is None} == set(SITES)  # it takes part again
    failed = [row for row in rows(out, "clients.jsonl") if row["error"]]
    assert {row["client"] for row in failed} <= {victim}
