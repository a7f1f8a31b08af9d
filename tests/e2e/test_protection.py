"""Whole runs with robust means and with differential privacy, on the real MiniLM."""

from __future__ import annotations

import json

import pytest

from polyrank.charges import CHARGES, KEY, read_charges
from polyrank.config import load_config
from polyrank.errors import InputError
from polyrank.experiment import run
from polyrank.ledger import RunFolder

UNIFORM = ["aggregation.kind=replication_padding", "aggregation.weights=uniform"]


def rows_of(result):
    return RunFolder(result.path).read_rows("rounds.jsonl")


def test_a_robust_run_says_what_it_did_and_what_it_cannot_do(tiny_settings, tmp_path):
    tiers = 'allocation={kind="tiers", tiers=[{rank=2, share=0.75}, {rank=4, share=0.25}]}'
    settings = [*tiny_settings, *UNIFORM, tiers, "sampling.kind=all", "robust.attackers=1"]
    result = run(load_config(settings=[s for s in settings if "count" not in s]), tmp_path / "run")
    rows = rows_of(result)
    assert [row["clipped"] for row in rows] == [2, 2]  # the half of 4 that is above the median
    assert {row["still_slots"] for row in rows} == {36}  # slots 2 and 3 of 18 modules have one holder
    assert "withstands at most 1 lying client" in result.summary["robust_limits"]
    assert "withstands at most 1 lying client" in (result.path / "report.html").read_text()


def test_a_robust_run_needs_enough_clients(tiny_settings, tmp_path):
    with pytest.raises(InputError, match=r"robust.attackers = 1: needs at least 3 clients .* found 2"):
        run(load_config(settings=[*tiny_settings, *UNIFORM, "robust.attackers=1"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_private_run_stops_at_its_budget_and_records_nothing_of_the_texts(
    tiny_settings, tmp_path, monkeypatch
):
    pytest.importorskip("dp_accounting")
    poisson = ["sampling.kind=poisson", "sampling.rate=0.5", "rounds=5"]
    privacy = ["privacy.epsilon=3", "privacy.noise_multiplier=1.5", "privacy.noise_seed=3"]
    wanted = [s for s in tiny_settings if "count" not in s and "rounds" not in s]
    config = load_config(settings=[*wanted, *UNIFORM, *poisson, *privacy])
    result, again = (run(config, tmp_path / name) for name in ("first", "second"))
    rows = rows_of(result)
    assert 1 < len(rows) < 5  # the budget pays for no more
    spent = [row["epsilon"] for row in rows]
    assert spent == sorted(spent)
    assert spent[-1] == result.summary["epsilon"] <= 3
    assert config.privacy.mechanism(config.sampling).epsilon(len(rows) + 1) > 3
    assert [charge.epsilon for charge in read_charges(result.path / CHARGES)] == spent
    assert not (result.path / KEY).exists()  # an experiment, its noise follows from the config
    assert "test_accuracy" in rows[-1]
    assert all("train_loss" not in row and "aggregation_error" not in row for row in rows)
    clients = (result.path / "clients.jsonl").read_text().splitlines()
    assert all(json.loads(line)["metrics"] is None for line in clients)
    partition = json.loads((result.path / "partition.json").read_text())
    card, count = (
        (result.path / "adapter" / "README.md").read_text(),
        sum(client["num_train"] for client in partition["clients"]),
    )
    assert count > 99
    assert str(count) not in card
    assert f"epsilon {spent[-1]:.4g} at delta 1e-05 for each client; its noise follows from" in card
    assert "Epsilon spent (delta 1e-05)" in (result.path / "report.html").read_text()
    assert result.summary["adapter_sha256"] == again.summary["adapter_sha256"]
    monkeypatch.chdir(tmp_path)
    hidden = config.privacy.model_copy(update={"noise_seed": None})
    secret = run(config.model_copy(update={"privacy": hidden, "rounds": 1}))
    assert (secret.path / KEY).stat().st_size == 32
    assert secret.summary["adapter_sha256"] != result.summary["adapter_sha256"]
