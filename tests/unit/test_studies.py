"""What a study keeps of its cells."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from studies import records
from studies.causal import run as causal
from studies.cells import GIVEN, is_done, run_cells
from studies.fedara.arms import SMALL, arms, config
from studies.fedara.tables import tables
from studies.legend import run as legend
from studies.records import Record, Round, digest, made_of, read, recorded
from tests.small_runs import small_config


def cell(folder: Path, accuracy: float = 0.5) -> None:
    folder.mkdir(parents=True)
    rows = [
        {"bytes_down": 3, "bytes_up": 4, "simulated_s": 1.5},
        {"bytes_down": 1, "bytes_up": 2, "simulated_s": 2.5, "test_accuracy": accuracy},
    ]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"test_accuracy": accuracy, "active_slots": 9, "wall_s": 1.25}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_record_tells_bytes_and_when_a_target_was_reached(tmp_path):
    cell(tmp_path / "one")
    found = made_of("one", tmp_path / "one", "c0", "abc")
    assert found.rounds == [(7, None, 1.5, None), (3, 0.5, 2.5, None)]
    assert found.megabytes == pytest.approx(10e-6)
    assert found.spent_to(0.5) == pytest.approx((10e-6, 4.0, 0.0))
    assert found.spent_to(0.51) is None


def test_a_folder_of_another_config_is_not_that_cell(tmp_path):
    cell(tmp_path / "one")
    assert not is_done(tmp_path / "one", {"seed": 1})  # nobody knows what it is of
    (tmp_path / "one" / GIVEN).write_text(json.dumps({"seed": 1, "tiers": [1, 2]}))
    assert is_done(tmp_path / "one", {"seed": 1, "tiers": (1, 2)})
    assert not is_done(tmp_path / "one", {"seed": 2, "tiers": (1, 2)})
    assert not is_done(tmp_path / "two", {"seed": 1})


def test_a_cell_that_fails_keeps_no_other_from_being_done(tmp_path, capsys):
    tiny = small_config(tmp_path, "plain", "rounds=1").model_dump(mode="json")
    cells = {"bad": tiny | {"adapter": {"rank": 10**6}}, "good": tiny}
    with pytest.raises(RuntimeError, match="1 cells failed: bad"):
        run_cells(cells, tmp_path / "out", 1)
    assert is_done(tmp_path / "out" / "good", tiny)
    assert "bad: adapter.rank = 1000000: at most" in capsys.readouterr().out


def test_recorded_cells_are_run_again_only_when_their_config_changes(tmp_path, monkeypatch):
    ran: list[str] = []

    def finished(cells, out, workers):
        for name in cells:
            ran.append(name)
            cell(out / str(len(ran)) / name)
            (out / name).symlink_to(out / str(len(ran)) / name) if not (out / name).exists() else None
            yield name

    monkeypatch.setattr(records, "finished", finished)
    cells = {name: {"seed": seed, "data": {"source": "/here/x"}} for seed, name in enumerate("ab")}
    path = tmp_path / "records.jsonl"
    first = recorded(cells, tmp_path, 1, path)
    moved = {name: {**one, "data": {"source": "/there/x"}} for name, one in cells.items()}
    again = recorded(moved, tmp_path / "elsewhere", 1, path)
    assert (tmp_path / "elsewhere").is_dir()  # where tables go, though no cell was run
    assert ran == ["a", "b"]
    assert again == first
    moved["b"]["seed"] = 7
    recorded(moved, tmp_path, 1, path)
    assert ran == ["a", "b", "b"]
    assert read(path)["b"].config == digest(moved["b"])


def test_the_tables_of_a_study_say_what_its_records_say():
    found = {}
    for place, arm in enumerate(arms(20)):
        for seed in range(3):
            name, accuracy = f"banking77/dirichlet-0.1/{arm}/{seed}", 0.5 + place / 100 + seed / 1000
            rounds = [Round(2_000_000 - 100_000 * place, accuracy, 9.0 - place, 2e3)]
            found[name] = Record(name, "c", "abc", accuracy, 72, 1.0, 0.5, rounds)
    text = "\n".join(tables(found, {arm: {1e-3: 0.1, 3e-3: 0.2} for arm in arms(20)}))
    assert "| fedara-4 | 3 | 0.571 (0.001) | +7.0 [+7.0, +7.0] | 72 | 1.3 | 1.3 |" in text
    assert "| fedit | +7.0 (3 pairs) | +8.0 (3 pairs) |" in text
    assert "| fedit | 0.100 | **0.200** |" in text
    turned = dict.fromkeys(
        [f"banking77/dirichlet-0.1/arbitration-top/{seed}" for seed in (0, 1)], found[name]
    )
    alone = "banking77/dirichlet-0.1/fedara-4/2"  # no switch has this seed
    turned[alone] = dataclasses.replace(found[alone], accuracy=0.9)
    text = "\n".join(tables(found | turned, {arm: {1e-3: 0.1} for arm in arms(20)}))
    assert "| (the default) | 0.571 (0.001) |" in text
    assert "| arbitration-top | 0.582 (0.000) | +1.1 [+0.5, +1.8] |" in text
    skewed = {
        name.replace("dirichlet-0.1", "pathological"): dataclasses.replace(one, accuracy=1 - one.accuracy)
        for name, one in found.items()
    }
    text = "\n".join(tables(found | skewed, {arm: {1e-3: 0.1} for arm in arms(20)}))
    assert "| FedARA at 4 against | dirichlet-0.1 | pathological |" in text
    assert "| fedit | +7.0 (3 pairs) | -7.0 (3 pairs) |" in text


def test_the_table_of_legend_counts_the_seeds_that_got_there():
    found = {}
    for place, arm in enumerate(legend.arms()):
        for seed in range(3):
            rounds = [Round(10**6, 0.1, 4.0, 1e3), Round(10**6, 0.7 + seed / 100, 4.0 / (1 + place), 1e3)]
            found["sst2", arm, seed] = Record("x", "c", "abc", rounds[1].accuracy, 72, 1.0, 0.5, rounds)
    lines = legend.table("sst2", found)
    assert lines[0] == "\n## sst2, target 0.700\n"
    assert lines[3].startswith(
        "| fedit, no limits | 0.710 (0.010) |  | 3 of 3 | 8.0 | 1.00x | 2.0 | 2.00 | 0.50 |"
    )
    assert "| +0.0 [+0.0, +0.0] | 3 of 3 | 6.0 | 1.33x |" in lines[4]


def test_a_cell_names_every_key_that_a_config_knows(tmp_path):
    from polyrank.config import make_config

    for name, setting in SMALL.items():
        for partition in setting.partitions:
            for arm in arms(setting.rounds).values():
                make_config(config(tmp_path / name, name, partition, 0, arm, 1e-3, setting))


def test_the_table_of_language_models_compares_with_central_training_of_the_same_seed():
    found = {}
    for place, arm in enumerate(causal.ARMS):
        for seed in (1, 2):
            rounds = [Round(3 * 10**6, 0.3, 90.0, 1e3)] * 2
            reached = 50.0 * seed * (1 + place / 10)
            found[arm, seed] = Record("x", "c", "abc", 0.3, 336, 1.0, 0.5, rounds, reached)
    lines = causal.table(found, range(1, 3))
    assert lines[2].startswith(
        "| central | 75.000 (35.355) | -9.1 (-9.1 to -9.1) | 0.300 (0.000) | 6.0 | 3.00 | 336 |"
    )
    assert "| fedit | 90.000 (42.426) | +9.1 (+9.1 to +9.1) |" in lines[4]
