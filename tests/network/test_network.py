"""The same run over a real network: same bits, same bytes, whatever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("nvflare")

from polyrank import durable
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
ROUNDS = 10
LONG = (
    f"rounds={ROUNDS}",
    *MIXED,
    "training.local_steps=30",
    "training.learning_rate=0.002",
    "engine.deadline_s=300",
)


@pytest.fixture(scope="module")
def uninterrupted(federation: Federation) -> Path:
    out = federation.folder / "uninterrupted"
    settings = [setting for setting in LONG if not setting.startswith("engine")]
    federation.run(out, *settings, network=False)
    return out


def some_time_within_a_round(out: Path, draw: random.Random, latest: int) -> int:
    """Wait for a random moment, as likely early as late in a round; returns how many rounds are committed."""
    number = draw.randint(2, latest)
    wait_for_rounds(out, number - 1, 300.0)
    start = time.monotonic()
    wait_for_rounds(out, number)
    time.sleep(draw.uniform(0, time.monotonic() - start))
    return len(rows(out))


def assert_same_result(out: Path, expected: Path) -> None:
    found, wanted = results(out), results(expected)
    assert found["adapter/adapter_model.safetensors"] == wanted["adapter/adapter_model.safetensors"]
    assert found["state.safetensors"] == wanted["state.safetensors"]
    assert [row["round"] for row in rows(out)] == list(range(ROUNDS))


def answered(out: Path) -> set[str]:
    """The sites whose answers are in the journal of the round that is being worked on."""
    held = b""
    with contextlib.suppress(FileNotFoundError):
        held = b"".join(path.read_bytes() for path in (out / "journal").glob("*"))
    return {site for site in SITES if site.encode() in held}


def resume(federation: Federation, out: Path) -> None:
    words = federation.command("resume", str(out))
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr


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
    out = federation.folder / f"server-{moment}"
    driver = federation.begin(f"driver-{moment}", *federation.run_words(out, *LONG))
    committed = some_time_within_a_round(out, random.Random(moment), ROUNDS // 2)
    federation.kill("server")
    driver.kill()
    driver.wait()
    assert committed < ROUNDS
    federation.start("server")
    resume(federation, out)
    assert_same_result(out, uninterrupted)


def test_a_server_killed_between_two_answers_asks_only_for_what_is_missing(federation, uninterrupted):
    out = federation.folder / "between"
    driver = federation.begin("driver-between", *federation.run_words(out, *LONG))
    wait_for_rounds(out, 2, 300.0)
    slow = psutil.Process(federation.running["site-c"].pid).children(recursive=True)
    for process in slow:
        process.suspend()
    until = time.monotonic() + 200
    while answered(out) != {"site-a", "site-b"}:
        assert time.monotonic() < until
        time.sleep(0.05)
    federation.kill("server")
    driver.kill()
    driver.wait()
    for process in slow:
        process.resume()
    assert answered(out) == {"site-a", "site-b"}
    federation.start("server")
    resume(federation, out)
    assert_same_result(out, uninterrupted)


def test_a_server_that_comes_back_is_enough_while_the_driver_lives(federation, uninterrupted):
    out = federation.folder / "server-alone"
    driver = federation.begin("driver-alone", *federation.run_words(out, *LONG))
    some_time_within_a_round(out, random.Random(7), 6)
    federation.kill("server")
    federation.start("server")
    assert driver.wait(timeout=900) == 0, (federation.folder / "driver-alone.out").read_text()
    assert_same_result(out, uninterrupted)


def test_a_driver_that_dies_alone_leaves_a_job_that_a_resume_follows(federation, uninterrupted):
    out = federation.folder / "driver-only"
    driver = federation.begin("driver-only", *federation.run_words(out, *LONG))
    some_time_within_a_round(out, random.Random(8), 4)
    driver.kill()
    driver.wait()
    job = (out / "job.json").read_bytes()
    resume(federation, out)
    assert_same_result(out, uninterrupted)
    assert (out / "job.json").read_bytes() == job  # no second one was begun


def test_a_driver_that_is_stopped_by_hand_ends_its_job(federation, uninterrupted):
    out = federation.folder / "by-hand"
    driver = federation.begin("by-hand", *federation.run_words(out, *LONG))
    some_time_within_a_round(out, random.Random(9), 4)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=60) == 130
    until = time.monotonic() + 60
    while durable.is_held(out):
        assert time.monotonic() < until
        time.sleep(0.5)
    assert len(rows(out)) < ROUNDS
    resume(federation, out)
    assert_same_result(out, uninterrupted)


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_site_killed_within_a_round_comes_back_and_every_round_is_committed(federation, moment):
    draw = random.Random(100 + moment)
    out, victim = federation.folder / f"site-{moment}", draw.choice(SITES)
    driver = federation.begin(
        f"site-driver-{moment}", *federation.run_words(out, *LONG, "engine.deadline_s=45")
    )
    some_time_within_a_round(out, draw, 3)
    federation.kill(victim)
    federation.start(victim)
    assert driver.wait(timeout=900) == 0, (federation.folder / f"site-driver-{moment}.out").read_text()
    assert [row["round"] for row in rows(out)] == list(range(ROUNDS))
    last = [row for row in rows(out, "clients.jsonl") if row["round"] == ROUNDS - 1]
    assert {row["client"] for row in last if row["error"] is None} == set(SITES)  # it takes part again
    failed = [row for row in rows(out, "clients.jsonl") if row["error"]]
    assert {row["client"] for row in failed} <= {victim}
