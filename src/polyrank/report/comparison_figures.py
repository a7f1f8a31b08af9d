"""The figures of a comparison: scores over rounds and over bytes, and slots per client."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from markupsafe import Markup

from polyrank.measures import judged, measures_of
from polyrank.report.comparison_numbers import Cell, scored_points, simulated_points
from polyrank.report.figures import SERIES, Line, curve


def comparison_figures(cells: Mapping[str, Sequence[Cell]], target: float | None = None) -> dict[str, Markup]:
    """Figures by title, a line per arm that has a finished cell."""
    names = {label: legend_name(label, place) for place, label in enumerate(cells, start=1)}
    finished = {names[label]: arm for label, arm in cells.items() if arm}
    points = {name: mean_points(arm) for name, arm in finished.items()}
    largest = max((total for arm in points.values() for _, total, _ in arm), default=0.0)
    unit, size = ("megabytes", 1e6) if largest >= 5e6 else ("kilobytes", 1e3)
    rounds = {name: ([p[0] for p in arm], [p[2] for p in arm]) for name, arm in points.items()}
    traffic = {name: ([p[1] / size for p in arm], [p[2] for p in arm]) for name, arm in points.items()}
    slots = {name: slots_by_client(arm) for name, arm in finished.items()}
    level = None if target is None else ("target", target)
    hours = {name: mean_hours(arm) for name, arm in finished.items() if "simulated_s" in arm[0].row}
    scored = [row for arm in finished.values() for row in arm[0].rounds if measures_of(row) is not None]
    title = judged(scored[0])[0].title if scored else "accuracy"
    return {
        **dict(_drawn(f"Test {title} over rounds", "round", rounds, level)),
        **dict(_drawn(f"Test {title} over traffic", f"{unit}, down and up", traffic, level)),
        **(dict(_drawn(f"Test {title} over simulated hours", "hours", hours, level)) if hours else {}),
        **dict(_drawn("Slots of each client", "percent of clients, fewest slots first", slots)),
    }


def legend_name(label: str, place: int) -> str:
    """A label that fits into a legend; one that was cut keeps its place in the table."""
    return label if len(label) <= 20 else f"{label[:14]}… ({place})"


def mean_points(cells: Sequence[Cell]) -> list[tuple[float, float, float]]:
    """(round, bytes so far, test score) of every scored round, bytes and score as means over seeds."""
    runs = [list(scored_points(cell.rounds)) for cell in cells]
    return [
        (
            same_round[0][0],
            statistics.fmean(p[1] for p in same_round),
            statistics.fmean(p[2] for p in same_round),
        )
        for same_round in zip(*runs, strict=True)
    ]


def mean_hours(cells: Sequence[Cell]) -> Line:
    """Simulated hours so far and leading score of every scored round, as means over seeds."""
    runs = [list(simulated_points(cell.rounds)) for cell in cells]
    same = list(zip(*runs, strict=True))
    return [statistics.fmean(p[0] for p in points) / 3600 for points in same], [
        statistics.fmean(p[1] for p in points) for points in same
    ]


def slots_by_client(cells: Sequence[Cell]) -> Line:
    """Percent of clients, and the slots each held (mean over its rounds), fewest first.

    A client of another seed is another client.
    """
    held: dict[tuple[int, str], list[int]] = {}
    for cell in cells:
        for row in cell.clients:
            held.setdefault((cell.seed, row["client"]), []).append(row["slots"])
    slots = sorted(statistics.fmean(values) for values in held.values())
    return [100 * (place + 1) / len(slots) for place in range(len(slots))], slots


def _drawn(
    title: str, x_label: str, lines: Mapping[str, Line], level: tuple[str, float] | None = None
) -> Iterator[tuple[str, Markup]]:
    """One figure, or several with the first line in each where there are more lines than colours."""
    first, *others = lines
    room = len(SERIES) - 1  # beside the first
    groups = [others[start : start + room] for start in range(0, max(1, len(others)), room)]
    for number, group in enumerate(groups, start=1):
        part = f" ({number} of {len(groups)})" if len(groups) > 1 else ""
        yield title + part, curve(x_label, {name: lines[name] for name in (first, *group)}, level)
