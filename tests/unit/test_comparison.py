"""Comparisons on synthetic cell folders, with numbers worked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import polyrank.compare as comparison
from polyrank.compare import compare, read_arms, show_cells, write_comparison
from polyrank.config import Config, make_config
from polyrank.errors import InputError, RunError
from polyrank.report.comparison import difference_text, spread_text, table_columns
from polyrank.report.comparison_figures import comparison_figures, mean_hours, mean_points, slots_by_client
from polyrank.report.comparison_numbers import Cell, paired_difference, read_cell, spread, to_target, unpaired

VERSIONS = {"packages": {"polyrank": "0.1.0"}, "commit": "abc"}


def write_cell(
    path: Path, seed: int, accuracies: list[float | None], slots: int = 4, **round_keys: Any
) -> dict[str, Any]:
    """A cell of clients a and b, 100 bytes down and 50 up per client and round; None is not scored."""
    path.mkdir(parents=True)
    rounds, clients = [], []
    for round_, accuracy in enumerate(accuracies):
        scores = {} if accuracy is None else {"test_accuracy": accuracy, "test_macro_f1": accuracy / 2}
        rounds.append({"round": round_, "bytes_down": 200, "bytes_up": 100, **scores, **round_keys})
        clients += [
            {"round": round_, "client": name, "slots": held}
            for name, held in (("a", slots), ("b", slots + 2))
        ]
    summary = {
        **{"method": "fedit", "seed": seed, "rounds": len(rounds), "majority_rate": 0.25},
        **{"test_accuracy": accuracies[-1], "test_macro_f1": (accuracies[-1] or 0) / 2, "test_loss": 1.0},
        **{"bytes_down": 200 * len(rounds), "bytes_up": 100 * len(rounds), "wall_s": 2.0},
    }
    for name, content in (("partition", {"seed": seed}), ("versions", VERSIONS), ("summary", summary)):
        (path / f"{name}.json").write_text(json.dumps(content))
    for name, lines in (("rounds", rounds), ("clients", clients)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return summary


def write_plan(out: Path, arms: dict[str, dict[str, Any]], seeds: list[int]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    plan = comparison.make_plan({label: make_config(given) for label, given in arms.items()}, seeds)
    (out / "plan.json").write_text(json.dumps(plan))


@pytest.fixture
def three_seeds(tmp_path: Path) -> Path:
    """One arm ends at 0.5, 0.6, 0.7, the other at 0.6, 0.8, 1.0: differences 0.1, 0.2, 0.3."""
    write_plan(tmp_path, {"one": {}, "two": {"adapter": {"rank": 4}}}, [0, 1, 2])
    for seed, (one, two) in enumerate([(0.5, 0.6), (0.6, 0.8), (0.7, 1.0)]):
        write_cell(tmp_path / f"cells/one-{seed}", seed, [0.2, None, one])
        write_cell(tmp_path / f"cells/two-{seed}", seed, [0.4, None, two], slots=6, aggregation_error=0.5)
    return tmp_path


def test_spread_and_paired_difference_by_hand():
    assert spread([0.5, 0.6, 0.7]) == pytest.approx({"mean": 0.6, "sd": 0.1})
    assert spread([0.5]) == {"mean": 0.5, "sd": None}
    assert spread([]) == {"mean": None, "sd": None}
    # d = 0.1, 0.2, 0.3: mean 0.2, sd 0.1, and t(0.975, 2) = 4.30265, so 0.2 +- 4.30265 * 0.1 / sqrt(3)
    found = paired_difference({0: 0.6, 1: 0.8, 2: 1.0}, {0: 0.5, 1: 0.6, 2: 0.7})
    assert found == pytest.approx({"difference": 0.2, "low": -0.048414, "high": 0.448414}, abs=1e-6)
    # two seeds: t(0.975, 1) = 12.7062, sd of 0.1 and 0.3 is sqrt(0.02), half is 12.7062 * 0.1
    found = paired_difference({0: 0.1, 1: 0.3}, {0: 0.0, 1: 0.0})
    assert found == pytest.approx({"difference": 0.2, "low": 0.2 - 1.27062, "high": 0.2 + 1.27062}, abs=1e-5)


def test_differences_pair_by_seed_and_not_by_place():
    assert paired_difference({1: 0.5, 0: 0.25}, {0: 0.0, 1: 0.25})["low"] == pytest.approx(0.25)
    only_seed_2 = paired_difference({1: 0.5, 2: 0.75}, {2: 0.5, 3: 0.0})
    assert only_seed_2 == {"difference": 0.25, "low": None, "high": None}
    assert paired_difference({0: 0.5}, {})["difference"] is None


def test_the_target_is_reached_in_the_first_scored_round_at_or_above_it():
    rows = [
        {"round": 0, "bytes_down": 10, "bytes_up": 1, "test_accuracy": 0.3},
        {"round": 1, "bytes_down": 20, "bytes_up": 2},
        {"round": 2, "bytes_down": 30, "bytes_up": 3, "test_accuracy": 0.6},
        {"round": 3, "bytes_down": 40, "bytes_up": 4, "test_accuracy": 0.5},
    ]
    assert to_target(rows, 0.3) == (1, 11)
    assert to_target(rows, 0.5) == (3, 66)
    assert to_target(rows, 0.6) == (3, 66)
    assert to_target(rows, 0.61) == (None, None)


def test_the_three_files_say_what_the_cells_hold(three_seeds):
    content = write_comparison(three_seeds, 0.7)
    assert json.loads((three_seeds / "compare.json").read_text()) == content
    one, two = content["arms"]
    assert one["accuracy"] == pytest.approx(
        {"mean": 0.6, "sd": 0.1, "difference": None, "low": None, "high": None}
    )
    assert two["accuracy"] == pytest.approx(
        {"mean": 0.8, "sd": 0.2, "difference": 0.2, "low": -0.048414, "high": 0.448414}, abs=1e-6
    )
    assert two["macro_f1"]["difference"] == pytest.approx(0.1)
    assert (one["bytes_down"], one["bytes_up"]) == (600, 300)
    assert two["slots"] == {"mean": 7, "min": 6, "max": 8}
    assert (one["reached"], one["rounds_to_target"], one["bytes_to_target"]) == (1, 3, 900)
    assert (two["reached"], two["rounds_to_target"], two["bytes_to_target"]) == (2, 3, 900)
    assert [cell["label"] for cell in content["cells"]] == ["one", "two"] * 3
    assert content["cells"][0]["rounds_to_target"] is None
    assert content["cells"][0]["wall_s"] == 2.0
    assert (content["unfinished"], content["unpaired"]) == ([], [])
    assert table_columns(content) == {
        "arm": ["one", "two"],
        "seeds": ["3", "3"],
        "accuracy": ["0.600 ± 0.100", "0.800 ± 0.200"],
        "accuracy - first": ["-", "+0.200 [-0.048, +0.448]"],
        "macro-F1": ["0.300 ± 0.050", "0.400 ± 0.100"],
        "macro-F1 - first": ["-", "+0.100 [-0.024, +0.224]"],
        "down": ["0.00 MB", "0.00 MB"],
        "up": ["0.00 MB", "0.00 MB"],
        "slots per client": ["5 (4 to 6)", "7 (6 to 8)"],
        "aggregation error": ["-", "0.5"],
        "rounds to 0.7": ["3 (1 of 3 seeds)", "3 (2 of 3 seeds)"],
        "bytes to 0.7": ["0.00 MB", "0.00 MB"],
    }
    lines = (three_seeds / "compare.md").read_text().splitlines()
    assert lines[4].startswith("| one | 3 | 0.600 ± 0.100 | - |")
    assert "- **seeds**: 0, 1, 2; a seed draws the partition and the client order" in lines
    assert "- **target**: test accuracy 0.7" in lines
    assert "- **majority class**: 0.250" in lines
    assert "- **polyrank**: 0.1.0, commit abc" in lines
    assert "- **all arms**: the defaults" in lines
    assert lines[-2:] == ["- **arm one**: adapter.rank = 8", "- **arm two**: adapter.rank = 4"]
    page = (three_seeds / "compare.html").read_text()
    for text in ("+0.200 [-0.048, +0.448]", "3 (1 of 3 seeds)", "7 (6 to 8)", "commit abc"):
        assert text in page


def test_columns_that_nobody_asked_for_or_measured_are_left_out(tmp_path):
    write_plan(tmp_path, {"one": {}, "two": {}}, [0])
    for label in ("one", "two"):
        write_cell(tmp_path / f"cells/{label}-0", 0, [0.5])
    content = write_comparison(tmp_path)
    columns = table_columns(content)
    assert not {"aggregation error", "rounds to 0.7", "bytes to 0.7"} & set(columns)
    assert not any("target" in key for row in content["arms"] + content["cells"] for key in row)
    assert columns["accuracy"] == ["0.500", "0.500"]
    assert columns["accuracy - first"] == ["-", "+0.000 -"]  # one seed: a difference without an interval


def test_what_is_missing_is_named_and_left_out(three_seeds):
    (three_seeds / "cells/one-2/summary.json").write_text("{half a fi")
    (three_seeds / "cells/two-0/summary.json").write_text("{}")
    content = write_comparison(three_seeds, 1.0)
    assert content["unfinished"] == ["two-0", "one-2"]
    assert [arm["n"] for arm in content["arms"]] == [2, 2]
    assert content["arms"][1]["accuracy"]["difference"] == pytest.approx(0.2)  # seed 1 alone has both
    assert table_columns(content)["rounds to 1"] == ["never", "3 (1 of 2 seeds)"]
    assert "two-0, one-2; left out of every number" in (three_seeds / "compare.md").read_text()
    for seed in (0, 1):
        (three_seeds / f"cells/one-{seed}/summary.json").unlink()
    content = write_comparison(three_seeds)
    assert [spread_text(arm["accuracy"]) for arm in content["arms"]] == ["-", "0.900 ± 0.141"]
    assert difference_text(content["arms"][1]["accuracy"]) == "-"
    for seed in (1, 2):
        (three_seeds / f"cells/two-{seed}/summary.json").unlink()
    with pytest.raises(InputError, match="has no finished cell"):
        write_comparison(three_seeds)


def test_arms_that_met_other_clients_are_called_unpaired(three_seeds):
    cells = [read_cell(three_seeds, label, seed, None) for seed in (0, 1) for label in ("one", "two")]
    assert unpaired(cells) == []
    (three_seeds / "cells/two-0/partition.json").write_text("{}")
    other = cells[3].clients[::-1]
    cells[3] = Cell("two", 1, cells[3].path, cells[3].row, cells[3].rounds, other)
    assert unpaired(cells) == [
        "seed 0: one and two had different clients or texts",
        "seed 1: one and two sampled different clients",
    ]
    write_comparison(three_seeds)
    assert "- **not paired**: seed 0: one and two had" in (three_seeds / "compare.md").read_text()


def test_curves_are_means_over_seeds(three_seeds):
    cells = [read_cell(three_seeds, "one", seed, None) for seed in range(3)]
    points = mean_points(cells)
    assert [point[:2] for point in points] == [(1, 300), (3, 900)]
    assert [point[2] for point in points] == pytest.approx([0.2, 0.6])
    percent, slots = slots_by_client(cells)
    assert slots == [4, 4, 4, 6, 6, 6]  # a and b of three seeds
    assert percent == pytest.approx([100 * n / 6 for n in range(1, 7)])


def test_every_arm_is_drawn_also_with_more_arms_than_colours(three_seeds):
    cell = read_cell(three_seeds, "one", 0, None)
    figures = comparison_figures({f"arm{number}": [cell] for number in range(10)} | {"empty": []})
    assert len(figures) == 6
    two = figures["Test accuracy over rounds (1 of 2)"] + figures["Test accuracy over rounds (2 of 2)"]
    assert all(two.count(f">arm{number}<") == 1 for number in range(1, 10))
    assert two.count(">arm0<") == 2  # the first arm leads every figure
    assert "#0102" not in two


def test_long_labels_fit_the_legend_and_stay_apart(three_seeds):
    cell = read_cell(three_seeds, "one", 0, None)
    long = "a-label-much-too-long-for-a-legend"
    figures = comparison_figures({f"{long}-1": [cell], f"{long}-2": [cell]}, target=0.4)
    drawn = figures["Test accuracy over rounds"]
    assert [f"a-label-much-t… ({place})" in drawn for place in (1, 2, 3)] == [True, True, False]
    assert ["target" in figure for figure in figures.values()] == [True, True, False]


def test_arms_are_recipes_and_files_with_the_settings_over_all(tmp_path):
    (tmp_path / "low.toml").write_text("seed = 9\n[adapter]\nrank = 2\n")
    arms = read_arms(["fedit", str(tmp_path / "low.toml")], ["rounds=3"])
    assert list(arms) == ["fedit", "low"]
    assert [(arm.method, arm.rounds, arm.adapter.rank) for arm in arms.values()] == [
        ("fedit", 3, 8),
        ("fedit", 3, 2),
    ]
    one, nine = (
        comparison.make_plan({"low": arms["low"].model_copy(update={"seed": s})}, [0]) for s in (1, 9)
    )
    assert one == nine  # a file's own seed says nothing


@pytest.mark.parametrize(
    ("names", "settings", "line"),
    [
        (["fedti"], [], "ARM = 'fedti': is no .toml file and no recipe; did you mean 'fedit'?"),
        (["fedit", "fedit"], [], "ARM = 'fedit': a second arm 'fedit'"),
        (["fedit", "a/fedit.toml"], [], "ARM = 'a/fedit.toml': a second arm 'fedit'"),
        (["nowhere.toml"], [], "nowhere: CONFIG = 'nowhere.toml': cannot be read"),
        (["fedit"], ["roundz=3"], "fedit: roundz = 3: unknown key; did you mean 'rounds'?"),
        (["fedit"], ["seed=3"], "--set = 'seed=3': arms bring their method and --seeds"),
        (["fedit"], [" method = fedit"], "--set = ' method = fedit': arms bring"),
    ],
)
def test_wrong_arms_are_one_line(names, settings, line):
    with pytest.raises(InputError) as caught:
        read_arms(names, settings)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("labels", "seeds", "target", "key"),
    [
        ([], [0], None, "ARM"),
        (["../away"], [0], None, "ARM"),
        (["_hidden"], [0], None, "ARM"),
        (["a b"], [0], None, "ARM"),
        (["a", "A"], [0], None, "ARM"),
        (["a"], [], None, "--seeds"),
        (["a"], [1, 1], None, "--seeds"),
        (["a"], [-1], None, "--seeds"),
        (["a"], [0], 1.5, "--target"),
        (["a"], [0], 0.0, "--target"),
        (["a"], [0], float("nan"), "--target"),
    ],
)
def test_a_wrong_plan_is_refused_before_a_folder_is_made(labels, seeds, target, key, tmp_path):
    with pytest.raises(InputError) as caught:
        compare({label: Config() for label in labels}, seeds, tmp_path / "out", target)
    assert caught.value.key == key
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def ran(monkeypatch):
    """Runs are replaced by synthetic cells; arms named in ``fails`` stop with that error."""
    calls: list[str] = []
    fails: dict[str, Exception] = {}

    def fake_run(config: Config, out: Path) -> None:
        calls.append(out.name)
        assert not out.exists()
        if out.name in fails:
            raise fails[out.name]
        write_cell(out, config.seed, [0.5, 0.25 * config.seed])

    monkeypatch.setattr(comparison, "run", fake_run)
    return calls, fails


def test_only_missing_cells_run_and_half_a_cell_runs_anew(ran, tmp_path):
    calls, _ = ran
    arms, out = {"a": Config(), "b": Config(rounds=3)}, tmp_path / "out"
    rows = list(compare(arms, [0, 1], out, 0.25))
    assert calls == ["a-0", "b-0", "a-1", "b-1"] == comparison.cell_names(arms, [0, 1])
    assert [row["status"] for row in rows] == ["done"] * 4
    assert [row["seed"] for row in rows] == [0, 0, 1, 1]
    assert [row["rounds_to_target"] for row in rows] == [1, 1, 1, 1]
    calls.clear()
    (out / "cells/b-0/summary.json").unlink()
    (out / "cells/b-0/left").write_text("over")
    (out / "cells/mine").mkdir()
    rows = list(compare(arms, range(2), out))  # without the target it is the same plan
    assert calls == ["b-0"]
    assert [(row["label"], row["seed"], row["status"]) for row in rows] == [
        ("a", 0, "kept"),
        ("a", 1, "kept"),
        ("b", 1, "kept"),
        ("b", 0, "done"),
    ]
    assert "rounds_to_target" not in rows[0]
    assert not (out / "cells/b-0/left").exists()
    assert (out / "cells/mine").is_dir()


def test_half_a_cell_that_can_go_on_goes_on(ran, tmp_path, monkeypatch):
    calls, _ = ran
    out, gone_on = tmp_path / "out", []
    list(compare({"a": Config()}, [0], out))
    calls.clear()
    cell = out / "cells/a-0"
    summary = (cell / "summary.json").read_text()
    (cell / "summary.json").unlink()

    def fake_resume(path: Path) -> None:
        gone_on.append(path)
        (path / "summary.json").write_text(summary)

    monkeypatch.setattr(comparison, "resume", fake_resume)
    assert [row["status"] for row in compare({"a": Config()}, [0], out)] == ["done"]
    assert gone_on == [cell]
    assert calls == []


def test_time_and_energy_of_simulated_devices_worked_by_hand(tmp_path):
    write_plan(tmp_path, {"one": {}, "two": {"rounds": 4}}, [0])
    write_cell(tmp_path / "cells/one-0", 0, [0.2, None, 0.6], simulated_s=1800.0, energy_j=500.0)
    write_cell(tmp_path / "cells/two-0", 0, [0.6, 0.7], simulated_s=20.0, energy_j=1500.0)
    for arm, rounds, one_s, one_j in (("one", 3, 1800.0, 500.0), ("two", 2, 20.0, 1500.0)):
        path = tmp_path / f"cells/{arm}-0/summary.json"
        totals = {"simulated_s": rounds * one_s, "energy_j": rounds * one_j, "waiting_s": 2.5}
        path.write_text(json.dumps({**json.loads(path.read_text()), **totals}))
    columns = table_columns(write_comparison(tmp_path, 0.6))
    assert columns["simulated time"] == ["1.50 h", "40 s"]
    assert columns["waiting a round"] == ["2.5 s", "2.5 s"]
    assert columns["energy"] == ["1.5 kJ", "3 kJ"]
    assert columns["time to 0.6"] == ["1.50 h", "20 s"]
    assert columns["energy to 0.6"] == ["1.5 kJ", "1.5 kJ"]
    figures = comparison_figures({"one": [read_cell(tmp_path, "one", 0, None)]})
    assert "Test accuracy over simulated hours" in figures
    x, y = mean_hours([read_cell(tmp_path, "one", 0, None)])
    assert (x, y) == ([0.5, 1.5], [0.2, 0.6])


@pytest.mark.parametrize(
    ("labels", "seeds", "rounds"),
    [(["a"], [0], 4), (["a"], [0, 1], 3), (["b"], [0], 3), (["a", "b"], [0], 3)],
)
def test_another_plan_in_the_same_folder_is_refused(labels, seeds, rounds, ran, tmp_path):
    calls, _ = ran
    out = tmp_path / "out"
    list(compare({"a": Config(rounds=3)}, [0], out))
    calls.clear()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(InputError, match="exists already and holds another comparison; name a new folder"):
        compare({label: Config(rounds=rounds) for label in labels}, seeds, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert calls == []


def test_a_folder_that_is_no_comparison_is_refused(ran, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="holds another comparison"):
        compare({"a": Config()}, [0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_link_in_the_place_of_a_cell_is_left_alone(ran, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    list(compare({"a": Config()}, [0], out))
    (out / "cells/a-0").rename(elsewhere)
    (elsewhere / "summary.json").unlink()
    (out / "cells/a-0").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(InputError, match="nothing was overwritten"):
        list(compare({"a": Config()}, [0], out))
    assert (elsewhere / "rounds.jsonl").exists()


def test_a_cell_that_cannot_go_on_leaves_the_others_and_is_tried_again(ran, tmp_path):
    calls, fails = ran
    fails["a-0"] = RunError("round 1: no client gave a usable update")
    arms, out = {"a": Config(), "b": Config()}, tmp_path / "out"
    rows = list(compare(arms, [0, 1], out))
    assert [row["status"] for row in rows] == ["failed", "done", "done", "done"]
    assert rows[0]["error"] == "round 1: no client gave a usable update"
    calls.clear()
    fails.clear()
    assert [row["status"] for row in compare(arms, [0, 1], out)] == ["kept", "kept", "kept", "done"]
    assert calls == ["a-0"]


def test_bad_input_names_the_arm_and_leaves_no_empty_comparison(ran, tmp_path):
    _, fails = ran
    fails["b-0"] = InputError("data.source", "x.csv", "must be a file")
    arms, out = {"a": Config(), "b": Config()}, tmp_path / "out"
    with pytest.raises(InputError, match="b: data.source = 'x.csv': must be a file"):
        list(compare(arms, [0], out))
    assert (out / "cells/a-0/summary.json").exists()
    with pytest.raises(InputError, match="b: data.source"):
        list(compare({"b": Config()}, [0], tmp_path / "other"))
    assert not (tmp_path / "other").exists()


ROWS = [
    {"label": "a", "seed": 1, "status": "kept", "test_accuracy": 0.5, "wall_s": 3.6},
    {"label": "a", "seed": 0, "status": "failed", "error": "why"},
    {"label": "long", "seed": 0, "status": "done", "test_accuracy": 0.625, "wall_s": 2.0},
]


def test_progress_is_one_plain_line_per_cell(capsys):
    assert list(show_cells(ROWS, ["a-0", "long-0", "a-1"])) == ROWS
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["cell", "status", "accuracy", "wall", "s", "ETA"],
        ["a-1", "kept", "0.500", "4"],
        ["a-0", "failed", "0:00"],
        ["long-0", "done", "0.625", "2", "0:00"],
    ]


def test_the_time_left_is_guessed_from_the_cells_that_ran_in_this_call(monkeypatch, capsys):
    clock = iter([0.0, 100.0, 200.0])
    monkeypatch.setattr(comparison, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    list(show_cells(ROWS, ["a-0", "long-0", "a-1", "b-1"]))
    # a kept cell says nothing; then one cell took 100 s and two are left; then one is left
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]] == ["4", "3:20", "1:40"]


def test_progress_on_a_terminal_shows_what_runs_and_what_waits(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = show_cells(ROWS, ["a-0", "long-0", "a-1"])
    assert next(shown) == ROWS[0]
    picture = capsys.readouterr().out
    assert [word for word in ("running", "waiting", "kept") if word in picture] == [
        "running",
        "waiting",
        "kept",
    ]
    assert picture.index("running") < picture.index("waiting")
    assert list(shown) == ROWS[1:]
    last = capsys.readouterr().out
    assert "failed" in last
    assert "0.625" in last


def test_the_default_folder_is_the_first_free_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert comparison.free_folder() == Path("comparisons/1")
    (tmp_path / "comparisons/1").mkdir(parents=True)
    assert comparison.free_folder() == Path("comparisons/2")
