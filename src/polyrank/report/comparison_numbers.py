"""The numbers of a comparison: finished cells read back from their folders, and their statistics.

Every difference is paired: an arm minus the first arm on the same seed, so on the same clients and in the
same order of clients.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.special import stdtrit  # type: ignore[import-untyped, unused-ignore]

from polyrank.errors import InputError
from polyrank.ledger import RunFolder
from polyrank.measures import Measures, measures_of

SIMULATED = ("simulated_s", "energy_j")
"""What adds up over the rounds of a run on simulated devices."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One finished run of one arm.

    Args:
        row: the keys of summary.json, and what else the comparison says of this cell.
        rounds: the lines of rounds.jsonl.
        clients: the lines of clients.jsonl.
    """

    label: str
    seed: int
    path: Path
    row: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    clients: Sequence[Mapping[str, Any]]


def cell_path(out: Path, label: str, seed: int) -> Path:
    """The run folder of one cell."""
    return out / "cells" / f"{label}-{seed}"


def is_finished(path: Path) -> bool:
    """Whether a cell's summary.json, the last word of a run, can be read."""
    try:
        summary = RunFolder(path).read("summary.json")
    except InputError:
        return False
    return isinstance(summary, dict) and measures_of(summary) is not None


def read_cell(out: Path, label: str, seed: int, target: float | None) -> Cell:
    """A finished cell, with the rounds and bytes it took to ``target`` when there is one."""
    path = cell_path(out, label, seed)
    folder = RunFolder(path)
    rounds = folder.read_rows("rounds.jsonl")
    row = {"label": label, **folder.read("summary.json")}
    errors = [r["aggregation_error"] for r in rounds if r.get("aggregation_error") is not None]
    if errors:
        row["aggregation_error"] = statistics.fmean(errors)
    if target is not None:
        row["rounds_to_target"], row["bytes_to_target"] = to_target(rounds, target)
        if "simulated_s" in row and row["rounds_to_target"] is not None:
            until = [r for r in rounds if r["round"] < row["rounds_to_target"]]
            row |= {f"{name}_to_target": sum(r[name] for r in until) for name in SIMULATED}
    return Cell(label, seed, path, row, rounds, folder.read_rows("clients.jsonl"))


def to_target(rows: Sequence[Mapping[str, Any]], target: float) -> tuple[int | None, int | None]:
    """Rounds, and bytes down and up, to the first scored round as good as ``target``; None for never."""
    lead = next(both[0] for row in rows if (both := measures_of(row)) is not None)
    for rounds, total, value in scored_points(rows):
        if lead.reaches(value, target):
            return rounds, total
    return None, None


def scored_points(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, float]]:
    """(rounds so far, bytes so far, test accuracy or perplexity) of every scored round."""
    total = 0
    for row in rows:
        total += row["bytes_down"] + row["bytes_up"]
        if (both := measures_of(row)) is not None:
            yield row["round"] + 1, total, row[both[0].on_test]


def simulated_points(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, float]]:
    """(simulated seconds so far, leading score) of every scored round."""
    total = 0.0
    for row in rows:
        total += row["simulated_s"]
        if (both := measures_of(row)) is not None:
            yield total, row[both[0].on_test]


def arm_row(label: str, cells: Sequence[Cell], first: Sequence[Cell], measures: Measures) -> dict[str, Any]:
    """The numbers of one arm over its seeds.

    Args:
        first: the cells of the first arm; none for the first arm itself, which has no difference.
    """
    rows = [cell.row for cell in cells]
    row: dict[str, Any] = {"label": label, "n": len(cells)}
    for measure in measures:
        values, reference = ({c.seed: c.row[measure.on_test] for c in arm} for arm in (cells, first))
        row[measure.key] = spread(list(values.values())) | paired_difference(values, reference)
    for name in ("bytes_down", "bytes_up"):
        row[name] = _mean([cell[name] for cell in rows])
    held = [client["slots"] for cell in cells for client in cell.clients]
    row["slots"] = {"mean": _mean(held), "min": min(held, default=None), "max": max(held, default=None)}
    errors = [cell["aggregation_error"] for cell in rows if "aggregation_error" in cell]
    if errors:
        row["aggregation_error"] = _mean(errors)
    if any("rounds_to_target" in cell for cell in rows):
        reached = [cell for cell in rows if cell["rounds_to_target"] is not None]
        row["reached"] = len(reached)
        for name in ("rounds_to_target", "bytes_to_target"):
            row[name] = _mean([cell[name] for cell in reached])
    for name in (*SIMULATED, "waiting_s", *(f"{name}_to_target" for name in SIMULATED)):
        if any(name in cell for cell in rows):
            row[name] = _mean([cell[name] for cell in rows if name in cell])
    return row


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation (n - 1); None where there are too few values."""
    return {"mean": _mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> dict[str, float | None]:
    """Mean of values minus reference over the seeds of both, with a 95 % Student t interval.

    Equation: mean(d) +- t(0.975, n - 1) sd(d) / sqrt(n) for the n differences d.
    """
    differences = [values[seed] - reference[seed] for seed in values if seed in reference]
    mean, low, high = _mean(differences), None, None
    if mean is not None and len(differences) > 1:
        quantile = float(stdtrit(len(differences) - 1, 0.975))
        half = quantile * statistics.stdev(differences) / len(differences) ** 0.5
        low, high = mean - half, mean + half
    return {"difference": mean, "low": low, "high": high}


def unpaired(cells: Sequence[Cell]) -> list[str]:
    """Where arms of one seed did not see the same clients in the same order, as phrases."""
    phrases: list[str] = []
    first: dict[int, Cell] = {}
    for cell in cells:
        leader = first.setdefault(cell.seed, cell)
        pair = f"seed {cell.seed}: {leader.label} and {cell.label}"
        partition, other = (RunFolder(c.path).read("partition.json") for c in (leader, cell))
        if partition != other:
            phrases.append(f"{pair} had different clients or texts")
        elif any(a != b for a, b in zip(_cohorts(leader), _cohorts(cell), strict=False)):
            phrases.append(f"{pair} sampled different clients")
    return phrases


def _cohorts(cell: Cell) -> list[list[str]]:
    """The clients of every round, in the order they were sampled."""
    cohorts: dict[int, list[str]] = {}
    for row in cell.clients:
        if not row.get("aggregated", True):
            continue  # trained only to be scored
        cohorts.setdefault(row["round"], []).append(row["client"])
    return [cohorts[round_] for round_ in sorted(cohorts)]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
