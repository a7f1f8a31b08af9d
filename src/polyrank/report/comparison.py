"""compare.json, compare.md and compare.html: made from a comparison's folder alone.

    plan.json             the arms (label and resolved config) and the seeds
    cells/LABEL-SEED/     the run folder of one cell

Cells that are not finished are named and left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyrank.config import Config
from polyrank.errors import InputError
from polyrank.ledger import RunFolder
from polyrank.measures import Measures, judged, measures_of
from polyrank.report import dotted, template
from polyrank.report.comparison_figures import comparison_figures
from polyrank.report.comparison_numbers import (
    Cell,
    arm_row,
    cell_path,
    is_finished,
    read_cell,
    unpaired,
)
from polyrank.report.devices import duration, energy

PLAN = "plan.json"


def write_comparison(out: Path, target: float | None = None) -> dict[str, Any]:
    """Write compare.json, compare.md and compare.html; returns what stands in compare.json.

    Args:
        target: a test accuracy (or perplexity); with one, the tables say what it took to reach it.

    Raises: InputError when ``out`` is not a comparison, or none of its cells is finished.
    """
    folder = RunFolder(out)
    plan = folder.read(PLAN)
    labels, seeds = [arm["label"] for arm in plan["arms"]], plan["seeds"]
    names = [(label, seed) for seed in seeds for label in labels]
    done = [name for name in names if is_finished(cell_path(out, *name))]
    if not done:
        raise InputError("COMPARISON", str(out), "has no finished cell")
    cells = [read_cell(out, label, seed, target) for label, seed in done]
    by_label = {label: [cell for cell in cells if cell.label == label] for label in labels}
    first, measures = by_label[labels[0]], judged(cells[0].row)
    arms = [
        arm_row(label, by_label[label], first if label != labels[0] else (), measures) for label in labels
    ]
    content = {
        "target": target,
        "seeds": seeds,
        "unfinished": [f"{label}-{seed}" for label, seed in names if (label, seed) not in done],
        "unpaired": unpaired(cells),
        "arms": arms,
        "cells": [dict(cell.row) for cell in cells],
    }
    folder.write("compare.json", content)
    columns, notes = table_columns(content), table_notes(content, plan, cells)
    (out / "compare.md").write_text(_markdown(columns, notes), encoding="utf-8")
    page = template("comparison.html.j2").render(
        labels=labels,
        columns=columns,
        notes=notes,
        figures=comparison_figures(by_label, target),
        measures=measures,
        cells=content["cells"],
    )
    (out / "compare.html").write_text(page, encoding="utf-8")
    return content


def table_columns(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """The table over arms as text: heading, then a cell per arm."""
    arms, target = content["arms"], content["target"]
    columns = {"arm": [arm["label"] for arm in arms], "seeds": [str(arm["n"]) for arm in arms]}
    for measure in _measures(content):
        columns[measure.title] = [spread_text(arm[measure.key]) for arm in arms]
        columns[f"{measure.title} - first"] = [difference_text(arm[measure.key]) for arm in arms]
    columns["down"] = [_size(arm["bytes_down"]) for arm in arms]
    columns["up"] = [_size(arm["bytes_up"]) for arm in arms]
    if target is not None:
        columns[f"rounds to {target:g}"] = [_reached(arm) for arm in arms]
        columns[f"bytes to {target:g}"] = [_size(arm.get("bytes_to_target")) for arm in arms]
    columns |= _simulated_columns(arms, target)
    columns["slots per client"] = [_slots(arm["slots"]) for arm in arms]
    if any("aggregation_error" in arm for arm in arms):
        errors = [arm.get("aggregation_error") for arm in arms]
        columns["aggregation error"] = ["-" if error is None else f"{error:.3g}" for error in errors]
    return columns


def _simulated_columns(arms: Sequence[Mapping[str, Any]], target: float | None) -> dict[str, list[str]]:
    """Time and energy on simulated devices, where any arm has them."""
    if not any("simulated_s" in arm for arm in arms):
        return {}

    def column(key: str, shown: Callable[[float], str]) -> list[str]:
        return ["-" if arm.get(key) is None else shown(arm[key]) for arm in arms]

    columns = {
        "simulated time": column("simulated_s", duration),
        "waiting a round": column("waiting_s", duration),
        "energy": column("energy_j", energy),
    }
    if target is not None:
        columns[f"time to {target:g}"] = column("simulated_s_to_target", duration)
        columns[f"energy to {target:g}"] = column("energy_j_to_target", energy)
    return columns


def _measures(content: Mapping[str, Any]) -> Measures:
    found = measures_of(content["arms"][0], "")
    assert found is not None
    return found


def spread_text(numbers: Mapping[str, float | None]) -> str:
    """Mean and standard deviation, e.g. ``0.581 ± 0.012``."""
    if numbers["mean"] is None:
        return "-"
    return f"{numbers['mean']:.3f}" + ("" if numbers["sd"] is None else f" ± {numbers['sd']:.3f}")


def difference_text(numbers: Mapping[str, float | None]) -> str:
    """Paired difference and interval, e.g. ``+0.012 [-0.003, +0.027]``."""
    if numbers["difference"] is None:
        return "-"
    interval = "-" if numbers["low"] is None else f"[{numbers['low']:+.3f}, {numbers['high']:+.3f}]"
    return f"{numbers['difference']:+.3f} {interval}"


def _size(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e6:.2f} MB"


def _slots(slots: Mapping[str, float | None]) -> str:
    if slots["mean"] is None:
        return "-"
    span = "" if slots["min"] == slots["max"] else f" ({slots['min']} to {slots['max']})"
    return f"{slots['mean']:.4g}{span}"


def _reached(arm: Mapping[str, Any]) -> str:
    if not arm.get("reached"):
        return "never" if arm["n"] else "-"
    some = "" if arm["reached"] == arm["n"] else f" ({arm['reached']} of {arm['n']} seeds)"
    return f"{arm['rounds_to_target']:.3g}{some}"


def table_notes(content: Mapping[str, Any], plan: Mapping[str, Any], cells: Sequence[Cell]) -> dict[str, str]:
    """What the reader of the table must know, by name."""
    lead, _ = judged(cells[0].row)
    notes = {
        "reading": '± is the standard deviation over seeds; "- first" is the mean paired difference to '
        "the first arm with its 95 % Student t interval; bytes are means per run; slots are counted "
        "over all modules",
        "seeds": f"{', '.join(map(str, content['seeds']))}; a seed draws the partition and the client order",
        "target": "none" if content["target"] is None else f"test {lead.title} {content['target']:g}",
    }
    majority = [cell.row["majority_rate"] for cell in cells if "majority_rate" in cell.row]
    if majority:
        notes["majority class"] = f"{statistics.fmean(majority):.3f}"
    if content["unpaired"]:
        notes["not paired"] = "; ".join(content["unpaired"])
    if content["unfinished"]:
        notes["not finished"] = ", ".join(content["unfinished"]) + "; left out of every number"
    sources = [RunFolder(cell.path).read("versions.json") for cell in cells]
    notes["polyrank"] = "; ".join(
        sorted({f"{s['packages']['polyrank']}, commit {s['commit'] or 'unknown'}" for s in sources})
    )
    return notes | config_differences(plan)


def config_differences(plan: Mapping[str, Any]) -> dict[str, str]:
    """What all arms set apart from the defaults, and for each arm the keys in which the arms differ."""
    defaults = dotted(Config().model_dump(mode="json", exclude={"seed"}))
    configs = {arm["label"]: dotted(arm["config"]) for arm in plan["arms"]}
    first = next(iter(configs.values()))
    shared = {k for k in first if all(k in c and c[k] == first[k] for c in configs.values())}
    set_by_all = [f"{k} = {first[k]}" for k in first if k in shared and defaults.get(k) != first[k]]
    notes = {"all arms": ", ".join(set_by_all) or "the defaults"}
    for label, config in configs.items():
        own = [f"{key} = {value}" for key, value in config.items() if key not in shared]
        notes[f"arm {label}"] = ", ".join(own) or "nothing of its own"
    return notes


def result_lines(content: Mapping[str, Any]) -> list[str]:
    """One line per arm for the command line."""
    width = max(len(arm["label"]) for arm in content["arms"])
    lead, second = _measures(content)
    return [
        f"{arm['label']:<{width}}  {lead.title} {spread_text(arm[lead.key])}, "
        f"{second.title} {spread_text(arm[second.key])}, "
        f"{lead.title} - first {difference_text(arm[lead.key])}"
        for arm in content["arms"]
    ]


def _markdown(columns: Mapping[str, Sequence[str]], notes: Mapping[str, str]) -> str:
    lines = [
        "# Comparison",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(cells)} |" for cells in zip(*columns.values(), strict=True)),
        "",
        *(f"- **{name}**: {' '.join(text.split())}" for name, text in notes.items()),
    ]
    return "\n".join(lines) + "\n"
