"""The tables of the FedARA study, from the records of its cells alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from studies.cells import mean_sd, paired
from studies.fedara.arms import switches
from studies.records import Record

BASE = "fedit"
OURS = ("fedara-4", "fedara-2")
WEAK, STRONG = ("fedit", "ffa", "fedadapter"), ("slora", "federa", "fedadalora", "fedsvd")
"""Our reading of the paper's two groups of baselines, which its abstract does not name."""
Group = dict[str, dict[int, Record]]
"""The cells of one data set and partition by arm and seed."""


def tables(found: Mapping[str, Record], rates: Mapping[str, Mapping[float, float]]) -> list[str]:
    """All tables, of finished cells by name: ``data/partition/arm/seed``."""
    groups: dict[str, Group] = {}
    for name, record in found.items():
        data, partition, arm, seed = name.split("/")
        group = groups.setdefault(f"{data}, {partition}", {})
        group.setdefault(arm, {})[int(seed)] = record
    lines = ["## Learning rates", "", *rate_table(rates), "", "## Over all settings", ""]
    lines += [*overall(groups), "", "## By skew", "", *by_skew(groups), ""]
    for title, group in groups.items():
        lines += [f"## {title}", "", *setting_table(group), ""]
    tried = {title: group for title, group in groups.items() if set(group) & set(switches())}
    for title, group in tried.items():
        lines += [f"## One switch turned: {title}", "", *switch_table(group), ""]
    return lines


def rate_table(rates: Mapping[str, Mapping[float, float]]) -> list[str]:
    """Validation accuracy of every method at every rate; the chosen one is bold."""
    grid = sorted({rate for found in rates.values() for rate in found})
    lines = ["| method | " + " | ".join(f"{rate:g}" for rate in grid) + " |", "|---" * (len(grid) + 1) + "|"]
    for arm, found in rates.items():
        top = max(sorted(found), key=lambda rate: found[rate])
        told = {
            rate: f"**{reached:.3f}**" if rate == top else f"{reached:.3f}" for rate, reached in found.items()
        }
        cells = [told.get(rate, "") for rate in grid]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def setting_table(group: Group) -> list[str]:
    """Accuracy, difference to FedIT, slots, bytes, and bytes to FedIT's mean final accuracy."""
    target = mean(cell.accuracy for cell in group[BASE].values())
    lines = [
        f"| method | seeds | accuracy (sd) | points over {BASE} [95 %] | slots | MB | MB to {target:.3f} |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, cells in group.items():
        if arm in switches():
            continue
        slots = mean(cell.slots for cell in cells.values())
        size = mean(cell.megabytes for cell in cells.values())
        found = [str(len(cells)), accuracies(cells), over(group, arm, BASE), f"{slots:.0f}", f"{size:.1f}"]
        lines.append("| " + " | ".join([arm, *found, reached(cells, target)]) + " |")
    return lines


def switch_table(group: Group) -> list[str]:
    """What each switch of our reconstruction does to FedARA at target 4, on the seeds that all have."""
    seeds = set.intersection(*(set(group[arm]) for arm in switches() if arm in group))
    group = {arm: {seed: cells[seed] for seed in seeds & set(cells)} for arm, cells in group.items()}
    lines = [
        "| FedARA at 4, but | accuracy (sd) | points over the default [95 %] | slots in the end | MB |",
        "|---|---|---|---|---|",
    ]
    for arm in (OURS[0], *switches(), "fedsvd"):
        if arm not in group:
            continue
        cells = group[arm]
        slots = mean(cell.slots for cell in cells.values())
        size = mean(cell.megabytes for cell in cells.values())
        name = {OURS[0]: "(the default)", "fedsvd": "without dynamic ranks"}.get(arm, arm)
        gap = over(group, arm, OURS[0])
        lines.append(f"| {name} | {accuracies(cells)} | {gap} | {slots:.0f} | {size:.1f} |")
    return lines


def overall(groups: Mapping[str, Group]) -> list[str]:
    """Points of FedARA over each baseline and each group of them over all settings; bytes against FedIT."""
    lines = ["| against | FedARA at 4, points | FedARA at 2, points |", "|---|---|---|"]
    baselines = {name: (name,) for name in (*WEAK, *STRONG)}
    named = {"weak: " + ", ".join(WEAK): WEAK, "strong: " + ", ".join(STRONG): STRONG}
    for title, arms in {**baselines, **named}.items():
        lines.append(f"| {title} | " + " | ".join(points(groups, ours, arms) for ours in OURS) + " |")
    for title, of in (("MB in all", total), ("MB to FedIT's accuracy", to_target)):
        lines.append(
            f"| FedIT's over FedARA's {title} | " + " | ".join(of(groups, ours) for ours in OURS) + " |"
        )
    return lines


def by_skew(groups: Mapping[str, Group]) -> list[str]:
    """Points of FedARA at target 4 over each baseline, by partition over all data sets."""
    parts: dict[str, dict[str, Group]] = {}
    for title, group in groups.items():
        parts.setdefault(title.partition(", ")[2], {})[title] = group
    lines = ["| FedARA at 4 against | " + " | ".join(parts) + " |", "|---" * (len(parts) + 1) + "|"]
    for arm in (*WEAK, *STRONG):
        cells = [points(some, OURS[0], (arm,)) for some in parts.values()]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def points(groups: Mapping[str, Group], ours: str, arms: Sequence[str]) -> str:
    """Mean over settings and seeds of our accuracy minus that of some baselines, in points."""
    gaps = [
        100 * (group[ours][seed].accuracy - group[arm][seed].accuracy)
        for group in groups.values()
        for arm in arms
        if ours in group and arm in group
        for seed in sorted(set(group[ours]) & set(group[arm]))
    ]
    return f"{mean(gaps):+.1f} ({len(gaps)} pairs)" if gaps else ""


def total(groups: Mapping[str, Group], ours: str) -> str:
    return _ratio(groups, ours, lambda cell, _: cell.megabytes)


def to_target(groups: Mapping[str, Group], ours: str) -> str:
    return _ratio(groups, ours, _traffic_to)


def _traffic_to(cell: Record, target: float) -> float | None:
    spent = cell.spent_to(target)
    return None if spent is None else spent.megabytes


def _ratio(groups: Mapping[str, Group], ours: str, of: Callable[[Record, float], float | None]) -> str:
    """FedIT's traffic over ours, pair by pair; how many pairs did not get there is said."""
    ratios, pairs = [], 0
    for group in groups.values():
        target = mean(cell.accuracy for cell in group[BASE].values())
        for seed in sorted(set(group.get(ours, {})) & set(group[BASE])):
            plain, mine = of(group[BASE][seed], target), of(group[ours][seed], target)
            pairs += 1
            if plain is not None and mine is not None:
                ratios.append(plain / mine)
    return f"{mean(ratios):.2f} ({len(ratios)} of {pairs} pairs)" if ratios else "never"


def accuracies(cells: Mapping[int, Record]) -> str:
    return mean_sd([cells[seed].accuracy for seed in sorted(cells)])


def over(group: Group, arm: str, base: str) -> str:
    """Paired difference over the seeds that both have."""
    seeds = sorted(set(group[arm]) & set(group[base]))
    if arm == base or len(seeds) < 2:
        return ""
    return paired([group[arm][s].accuracy for s in seeds], [group[base][s].accuracy for s in seeds])


def reached(cells: Mapping[int, Record], target: float) -> str:
    """Mean traffic to a target over the seeds that reach it, and how many do."""
    found = [_traffic_to(cells[seed], target) for seed in sorted(cells)]
    there = [size for size in found if size is not None]
    if not there:
        return "never"
    return f"{mean(there):.1f}" + (
        f" ({len(there)} of {len(found)} seeds)" if len(there) < len(found) else ""
    )
