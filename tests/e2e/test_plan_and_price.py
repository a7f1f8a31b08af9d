"""The real MiniLM on simulated devices: the plan before, the run, its report, and pricing it afterwards."""

from __future__ import annotations

import json
import re
import sys

import pytest

import polyrank
from polyrank.assemble import prepare
from polyrank.cli import main
from polyrank.clock import FleetTable
from polyrank.config import load_config
from polyrank.errors import InputError
from polyrank.ledger import RunFolder
from polyrank.plan import make_plan, plan_lines, predict
from polyrank.recipes import recipes
from polyrank.replay import by_device, replay
from polyrank.round import federated_round
from tests.small_runs import METHODS, small_config

SMALL = """
fleet = { members = [{ device = "toaster", link = "lan" }] }
[devices.toaster]
title = "Toaster"
source = "its label"
peak_gflop_per_s = 2
achieved_share = 0.5
bandwidth_gb_per_s = 1
launch_s = 0
memory_gb = 0.05
usable_share = 1.0
modes = [{ name = "brown", speed = 1.0, compute_w = 800 }]
"""


EXTRA = {
    "hetlora": ["allocation.tiers=[{rank=2,share=0.5},{rank=3,share=0.5}]"],
    "replication": ["allocation.low_rank=1", "allocation.high_rank=3", "evaluation.validation_texts=8"],
    "legend+replication": [],
}


OFTEN = ("fedit", "ffa", "slora", "hetlora", "legend+fedara")
"""Methods that differ in what travels; all others are looked at in the slow tests."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    small_config(folder)
    return folder


def settings(tiny, method, fleet="edge3", **more):
    extra = [f"{key}={value}" for key, value in more.items()]
    return [*tiny, f"method={method}", f"fleet.name={fleet}", "engine.workers=1", *extra]


def test_a_finished_run_is_priced_as_it_was(tiny_settings, tmp_path):
    given = [*settings(tiny_settings, "fedara", rounds=3), "voting.target_rank=1", "allocation.depth=3"]
    result = polyrank.run(load_config(None, given), tmp_path / "run")
    rows = RunFolder(result.path).read_rows("clients.jsonl")
    again = replay(result.path, FleetTable(name="edge3"))
    assert [row["simulated"] for row in again] == [row["simulated"] for row in rows]
    assert len({tuple(row["simulated"]["ranks"]) for row in rows}) > 1  # slots were voted out
    assert {row["simulated"]["stored_blocks"] for row in rows} == {3}
    energy = sum(entry["energy_j"] for entry in by_device(again).values())
    assert energy == pytest.approx(result.summary["energy_j"])
    other = replay(result.path, FleetTable(name="uniform"))
    assert {row["simulated"]["device"] for row in other} == {"jetson-orin-nano"}
    page = (result.path / "report.html").read_text()
    for title in ("who waits for whom", "over simulated hours", "over simulated energy", "Depth by kind"):
        assert title in page


def test_a_run_with_frozen_slots_is_priced_as_it_was(tiny_settings, tmp_path):
    given = [*settings(tiny_settings, "anchored", rounds=2), "adapter.rank=8"]
    result = polyrank.run(load_config(None, given), tmp_path / "run")
    rows = RunFolder(result.path).read_rows("clients.jsonl")
    assert [row["simulated"] for row in replay(result.path, FleetTable(name="edge3"))] == [
        row["simulated"] for row in rows
    ]


@pytest.mark.parametrize("method", ["flora", "fedex"])
def test_a_run_that_folds_spoils_stored_prefixes_and_is_priced_as_it_was(method, tiny_settings, tmp_path):
    given = [*settings(tiny_settings, method, rounds=3), "allocation={kind='uniform', depth=1}"]
    result = polyrank.run(load_config(None, given), tmp_path / "run")
    rows = RunFolder(result.path).read_rows("clients.jsonl")
    again = replay(result.path, FleetTable(name="edge3"))
    assert [row["simulated"] for row in again] == [row["simulated"] for row in rows]
    assert {row["simulated"]["stored_blocks"] for row in rows} == {5}


def test_the_combination_runs_and_its_plan_is_told(tiny_settings, tmp_path):
    given = [*settings(tiny_settings, "legend+fedara", rounds=2), "voting.target_rank=1"]
    config = load_config(None, given)
    plan = make_plan(config)
    assert sum(row["count"] for row in plan["classes"].values()) == plan["clients"] == 4
    assert plan["round"]["bytes"] < plan["round_if_uniform"]["bytes"]
    assert plan["round"]["simulated_s"] <= plan["round_if_uniform"]["simulated_s"]
    for row in plan["classes"].values():
        assert row["memory_bytes"] <= row["limit_bytes"]
        assert sum(row["why"].values()) == row["count"]
        assert all(ranks == sorted(ranks) for ranks in row["ranks"])
    assert any("all blocks are done in time" in line for line in plan_lines(plan))
    json.dumps(plan, allow_nan=False)
    result = polyrank.run(config, tmp_path / "run")
    first = RunFolder(result.path).read_rows("rounds.jsonl")[0]
    ranks = [row["simulated"]["ranks"] for row in RunFolder(result.path).read_rows("clients.jsonl")]
    assert first["active_slots"] < 36 * 4  # the schedule is the bank that voting starts from
    assert all(row == sorted(row) for row in ranks)
    with pytest.raises(InputError, match=r"RUN = .*'legend' depends on more than its rows tell"):
        replay(result.path, FleetTable(name="edge3"))
    told = json.loads((result.path / "config.json").read_text())
    (result.path / "config.json").write_text(json.dumps({**told, "engine": {"kind": "flare", "kit": "kit"}}))
    with pytest.raises(InputError, match="RUN = .*ran over a network"):
        replay(result.path, FleetTable(name="edge3"))


def test_a_plan_that_does_not_fit_is_refused_in_one_line(tiny_settings, tmp_path, monkeypatch, capsys):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    words = [w for one in settings(tiny_settings, "fedit", str(path)) for w in ("--set", one)]
    monkeypatch.setattr(sys, "argv", ["polyrank", "plan", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(told) == 1
    assert re.search(r"client-0 \(toaster\) needs 0\.\d+ GB for 6 blocks, and may take 0\.05 GB", told[0])


@pytest.mark.parametrize(
    "method", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in recipes()]
)
def test_a_plan_tells_the_bytes_of_the_first_round(inputs, method):
    """But for a digest of the state and sampled attempts, which a plan has no need of."""
    ways = [*EXTRA.get(method, ()), "adapter.rank=16", "fleet.name=edge3", "fleet.ignore_memory=true"]
    experiment = prepare(small_config(inputs, "plain", f"method={method}", *ways))
    fed, state = experiment.federation, experiment.start
    planned = predict(fed, fed.clock, state, fed.allocation.allocate(state, list(state.clients)))
    _, record = federated_round(fed, state)
    fed.engine.close()
    for reply in record.replies:
        _, down, up = planned[reply.client]
        assert 0 <= reply.bytes_down - down <= 100
        assert 0 <= reply.bytes_up - up <= 100


def test_all_slots_everywhere_are_those_of_the_bank_with_votes_and_without(inputs):
    votes = ["method=legend+fedara", "voting.target_rank=1", "voting.warmup_share=0.5"]  # none at first
    both = make_plan(small_config(inputs, "plain", *votes, "fleet.name=edge3"))
    same = ["adapter.form=svd", "adapter.targets=all-linear"]
    alone = make_plan(small_config(inputs, "plain", "method=legend", "fleet.name=edge3", *same))
    assert both["round"]["bytes"] < both["round_if_uniform"]["bytes"]
    assert both["round_if_uniform"] == alone["round_if_uniform"]


GROWING = {
    "depth": ["method=fedadapter", "allocation.every=1", "rounds=2"],
    "rank": [*METHODS["loss_based"], "adapter.rank=16", "allocation.high_rank=16"],
}


@pytest.mark.parametrize("ways", GROWING.values(), ids=GROWING)
def test_a_plan_that_fits_at_first_and_not_later_is_refused(inputs, tmp_path, ways):
    given = [*ways, "engine.prefix_gb=0", "training.batch_size=1", "model.max_length=4"]
    experiment = prepare(small_config(inputs, "plain", *given, "fleet.name=edge3"))
    fed, state = experiment.federation, experiment.start
    fed.engine.close()
    first = [
        one.cost.memory_bytes
        for one, _, _ in predict(
            fed, fed.clock, state, fed.allocation.allocate(state, list(state.clients))
        ).values()
    ]
    path = tmp_path / "small.toml"
    path.write_text(SMALL.replace("memory_gb = 0.05", f"memory_gb = {1.01 * max(first) / 1e9}"))
    with pytest.raises(
        InputError, match=r"cannot fit: client-\d \(toaster\) needs .* blocks later in the run"
    ):
        prepare(small_config(inputs, "plain", *given, f"fleet.name={path}"))
    if "method=fedadapter" not in ways:
        return
    over = small_config(inputs, "plain", *given, f"fleet.name={path}", "fleet.ignore_memory=true")
    result = polyrank.run(over, tmp_path / "run")
    rows = RunFolder(result.path).read_rows("rounds.jsonl")
    assert rows[0]["over_memory"] == 0
    assert result.summary["over_memory"] == sum(row["over_memory"] for row in rows) > 0


def test_recomputed_blocks_take_less_memory_and_more_time_on_every_device(inputs):
    given = ["fleet.name=edge3", "training.batch_size=16"]
    once = make_plan(small_config(inputs, "causal", *given))
    twice = make_plan(small_config(inputs, "causal", *given, "model.gradient_checkpointing=true"))
    for device, row in once["classes"].items():
        assert twice["classes"][device]["memory_bytes"] < row["memory_bytes"]
        assert twice["classes"][device]["compute_s"] > row["compute_s"]
    assert small_config(inputs, "causal", "method=legend", *given, "model.gradient_checkpointing=true")


def test_a_plan_needs_a_fleet():
    with pytest.raises(InputError, match="fleet = None: must be given for a plan"):
        make_plan(load_config(None, []))
