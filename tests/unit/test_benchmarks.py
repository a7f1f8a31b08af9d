"""What the benchmark of whole runs makes of its numbers, on small ones that a person can check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from benchmarks import peers
from benchmarks.peers import Run, largest_difference, ratios_of, results, rows_of, table
from benchmarks.plan import plan_rounds
from benchmarks.sides.work import Plan, Work, read_work, weighted_mean, write_work
from benchmarks.watch import watch

MIB = 2**20
OURS = [
    Run("full", "polyrank", pair, 2.0, 20.0, cpu_s, 400 * MIB, 0.0) for pair, cpu_s in enumerate([10, 20, 50])
]
THEIRS = [
    Run("full", "flower", pair, 9.0, 30.0, cpu_s, 900 * MIB, 1e-5) for pair, cpu_s in enumerate([30, 80, 50])
]


def test_ratios_are_taken_pair_by_pair():
    found = ratios_of([*OURS, *THEIRS])
    assert found["full"]["flower"]["cpu_s"] == {"median": 3.0, "least": 1.0, "most": 4.0}
    assert found["full"]["flower"]["wall_s"]["median"] == 1.5
    assert found["full"]["flower"]["peak_pss_bytes"]["most"] == 2.25
    assert "polyrank" not in found["full"]
    other = [replace(run, variant="top", cpu_s=2 * run.cpu_s) for run in OURS]
    assert ratios_of([*OURS, *THEIRS, *other])["full"] == found["full"]


def test_rows_are_medians_and_count_all_steps():
    ours, theirs = rows_of([*OURS, *THEIRS])
    assert (ours["side"], ours["cpu_s"], ours["steps_per_cpu_s"], ours["pairs"]) == ("polyrank", 20, 25.0, 3)
    assert (theirs["cpu_s"], theirs["start_s"], theirs["difference"]) == (50, 9.0, 1e-5)


def test_pairs_that_were_kept_are_read_again(tmp_path):
    path = tmp_path / "new" / "peers.runs.jsonl"
    assert peers.read_runs(path) == peers.read_runs(None) == []
    assert peers.keep(OURS, path) == peers.keep(OURS, None) == OURS
    peers.keep(THEIRS, path)
    assert peers.read_runs(path) == [*OURS, *THEIRS]


def test_the_json_and_the_table_say_the_same(tmp_path):
    path = tmp_path / "peers.json"
    path.write_text(json.dumps(results([*OURS, *THEIRS])))
    read = json.loads(path.read_text())
    assert {"date", "versions", "machine", "rows", "ratios", "runs"} == set(read)
    assert read["machine"]["cores"] >= 1
    assert len(read["runs"]) == 6
    assert read["ratios"]["full"]["flower"]["cpu_s"]["median"] == 3.0
    lines = table([*OURS, *THEIRS]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| polyrank | 20 | 1 |" in lines[2]
    assert "| flower | 50 | 3.00 (1.00 to 4.00) |" in lines[3]


def test_a_difference_counts_by_the_largest_change_of_its_kind():
    start = {"q/A": np.array([100.0]), "q/B": np.array([1.5, 0.0]), "head/w": np.array([0.0])}
    reference = {"q/A": np.array([100.5]), "q/B": np.array([0.5, -2.0]), "head/w": np.array([8.0])}
    assert largest_difference(reference, reference, start) == 0
    moved = {**reference, "q/B": np.array([0.5, -2.02])}
    assert largest_difference(moved, reference, start) == pytest.approx(0.01)
    assert largest_difference({**reference, "q/A": start["q/A"]}, reference, start) == 1
    assert largest_difference({"q/A": reference["q/A"]}, reference, start) == float("inf")
    assert largest_difference(start, start, start) == float("inf")


def test_a_side_that_ends_elsewhere_stops_the_benchmark(tmp_path, monkeypatch):
    finals = {"polyrank": 1.0, "near": 1.0005, "far": 1.002}

    def ran(variant, side, pair, folder, out):
        numbers = {"start_s": 1.0, "wall_s": 2.0, "cpu_s": 3.0, "peak_pss_bytes": 4}
        found = {"variant": variant, "side": side, "pair": pair, **numbers}
        return found, {"q/B": np.array([finals[side]])}

    monkeypatch.setattr(peers, "run_side", ran)
    save_file({"start/q/B": np.array([0.0]), "ids": np.array([1])}, tmp_path / "work.safetensors")
    near = peers.run_pair("full", 0, ["polyrank", "near"], tmp_path)[1]
    assert near.difference == pytest.approx(5e-4, rel=1e-2)
    with pytest.raises(SystemExit, match="far ends in another adapter"):
        peers.run_pair("full", 0, ["polyrank", "far"], tmp_path)


def test_a_side_without_its_package_is_skipped_with_one_line(capsys):
    sides = {"here": ("x", ("json",)), "gone": ("x", ("json", "no_such_package_anywhere"))}
    assert list(peers.present(sides)) == ["here"]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "gone: skipped, needs no_such_package_anywhere" in told[0]


def test_the_work_survives_its_folder_and_pads_as_told(tmp_path):
    sizes = [80 + 8 * (number % 5) for number in range(20)]
    rounds = plan_rounds(sizes)
    assert [len(cohort) for cohort in rounds] == [10] * 5
    session = rounds[0][1]
    first = sum(sizes[: session.client])
    assert [len(rows) for rows in session.batches] == [8] * 10
    assert all(first <= row < first + sizes[session.client] for rows in session.batches for row in rows)
    plan = Plan("m", 2, 1, 2.0, 0, 10, {"learning_rate": 0.1}, sizes, 4, 7, rounds)
    ids, starts = torch.tensor([5, 6, 8], dtype=torch.int32), torch.tensor([0, 2, 3])
    start = {
        "b/A": torch.ones(1, 2),
        "b/B": torch.zeros(2, 1),
        "a/A": torch.ones(1, 2),
        "head/w": torch.ones(1),
    }
    write_work(Work(plan, ids, starts, torch.tensor([1, 0]), start), tmp_path)
    back = read_work(tmp_path)
    assert back.plan == plan
    assert back.modules == ["b", "a"]
    inputs, labels = back.batch([1, 0])
    assert inputs["input_ids"].tolist() == [[8, 7, 7, 7], [5, 6, 7, 7]]
    assert inputs["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert labels.tolist() == [0, 1]
    longest = replace(back, plan=replace(plan, pad_to=None)).batch([0, 1])[0]
    assert longest["input_ids"].shape == (2, 2)


def test_the_mean_is_weighted_by_examples():
    mean = weighted_mean([{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}], [3, 1])
    assert mean["w"].item() == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_work_of_children_is_counted(tmp_path):
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    child = f"subprocess.run([sys.executable, '-c', {burn!r}])"
    hold = f"import subprocess, sys\nheld = bytearray(60 * 2**20)\n{child}"
    status, used = watch([sys.executable, "-c", hold], os.environ, tmp_path / "log")
    assert status == 0
    assert 0.4 <= used.cpu_s < 2
    assert used.peak_pss_bytes > 60 * MIB
    assert used.wall_s >= 0.3
    failed, _ = watch([sys.executable, "-c", "raise SystemExit(3)"], os.environ, tmp_path / "log")
    assert failed == 3


def test_the_peers_use_nothing_of_polyrank():
    files = {path.name: path.read_text() for path in (peers.ROOT / "benchmarks" / "sides").glob("*.py")}
    assert "import polyrank" not in (ours := files.pop("polyrank_side.py"))
    assert "from polyrank." in ours
    assert len(files) == 6
    assert not [name for name, text in files.items() if "from polyrank" in text or "import polyrank" in text]


def test_the_process_that_measures_shares_no_heavy_library_with_the_sides():
    code = "import sys, benchmarks.peers; assert not {'torch', 'transformers', 'polyrank'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks an old name
def test_the_benchmark_of_a_gpu_runs_small_on_a_cpu(tmp_path):
    pytest.importorskip("torchao")
    from benchmarks.gpu import SIZES, Work, results

    found = results(SIZES["tiny"], Work(2, 16, 2, 2), torch.device("cpu"), tmp_path)
    plain, rounded = found["rows"]
    assert (plain["base"], rounded["base"]) == ("bf16", "8bit")
    assert plain["polyrank"]["tokens_per_s"] > 0
    assert plain["speed_ratio"] == plain["polyrank"]["tokens_per_s"] / plain["peft"]["tokens_per_s"]
    assert rounded["peft"] is None
    assert plain["plan"]["base"] == 2 * plain["parameters"] > rounded["plan"]["base"]
    assert plain["polyrank"]["peak_bytes"] is plain["peak_over_plan"] is None  # torch tells of CUDA alone
    json.dumps(found, allow_nan=False)
