"""Figures and tables of a report: no series is lost, and what voting did is told as it was."""

from __future__ import annotations

import pytest

from polyrank import report
from polyrank.report import dead_modules
from polyrank.report.figures import SERIES, bars, curve

NAMES = [f"device-{number}" for number in range(10)]


def test_more_series_than_colours_are_all_drawn_and_look_different():
    rising = {name: ([1, 2, 3], [number, number + 1, number + 2]) for number, name in enumerate(NAMES)}
    figure = str(curve("round", rising))
    assert all(name in figure for name in NAMES)
    assert len(NAMES) > len(SERIES)
    assert figure.count("stroke-dasharray") > 0
    assert "stroke-dasharray" not in str(curve("round", {n: rising[n] for n in NAMES[: len(SERIES)]}))
    stacked = str(bars("round", [1, 2, 3], {name: [1, 1, 1] for name in NAMES}))
    assert all(name in stacked for name in NAMES)
    assert "<pattern" in stacked  # hatches


def rows_of_a_voted_run():
    """Three rounds: 6 active slots, then 4, then 3, and 2 in the end; q dies in the second round."""
    common = {"client_wall_s": 1.0, "steps": 10}
    rows = [
        {"round": t, "active_slots": active, "planned_slots": planned, **common}
        for t, (active, planned) in enumerate([(6, 5), (4, 3), (3, 2)])
    ]
    slots = [
        {"round": 0, "slots": {"b.0.q": 3, "b.1.q": 3, "b.1.v": 0}},
        {"round": 1, "slots": {"b.0.q": 0, "b.1.q": 3, "b.1.v": 0}},
        {"round": 2, "slots": {"b.0.q": 0, "b.1.q": 2, "b.1.v": 0}},
    ]
    return rows, slots


def test_a_module_is_dead_from_the_first_round_that_it_did_without():
    assert dead_modules(rows_of_a_voted_run()[1]) == {"b.1.v": 1, "b.0.q": 2}
    assert dead_modules([]) == {}


def test_what_was_planned_stands_beside_what_came_of_it_in_the_same_round(monkeypatch):
    """A row tells the slots at its beginning: what it left stands in the next, and at last in the summary."""
    drawn = []
    monkeypatch.setattr(report, "curve", lambda x, lines: drawn.append(lines) or "")
    rows, slots = rows_of_a_voted_run()
    figures = report._slot_figures(rows, slots, 2)
    assert list(figures) == [
        "Active slots after each round",
        "Milliseconds per local step",
        "Active slots of each module",
    ]
    assert drawn[0] == {"planned": ([1, 2, 3], [5, 3, 2]), "realised": ([1, 2, 3], [4, 3, 2])}
    assert drawn[1]["step"][1] == pytest.approx([100, 100, 100])
    assert all(name in figures["Active slots of each module"] for name in ("0.q", "1.q", "1.v"))
