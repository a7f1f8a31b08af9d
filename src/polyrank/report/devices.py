"""Figures about simulated devices: who waits for whom, accuracy over hours and joules, who got what."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from statistics import mean
from typing import Any

from markupsafe import Markup

from polyrank.measures import judged
from polyrank.report.figures import bars, curve, spans

Row = dict[str, Any]
_MOST_SPANS = 60


def device_figures(rounds: Sequence[Row], clients: Sequence[Row]) -> dict[str, Markup]:
    """The figures of a run on simulated devices.

    Args:
        rounds, clients: the rows of rounds.jsonl and clients.jsonl.
    """
    numbers = [row["round"] + 1 for row in rounds]
    hours = list(accumulate(row["simulated_s"] / 3600 for row in rounds))
    kilojoules = list(accumulate(row["energy_j"] / 1e3 for row in rounds))
    clients = [row for row in clients if "simulated" in row]  # a stray answer has no session
    lead, _ = judged(rounds[-1])
    scored = [index for index, row in enumerate(rounds) if lead.on_test in row]
    values, title = [rounds[index][lead.on_test] for index in scored], lead.title.capitalize()
    last = [row for row in clients if row["round"] == rounds[-1]["round"]]
    return {
        f"Simulated: who waits for whom in round {numbers[-1]}": gantt(last),
        "Simulated: mean waiting by round, seconds": bars(
            "round", numbers, {"waiting": [row["waiting_s"] for row in rounds]}
        ),
        "Simulated: energy of all devices by round, joules": bars(
            "round", numbers, {"energy": [row["energy_j"] for row in rounds]}
        ),
        "Simulated: most memory of one device by round, megabytes": bars(
            "round", numbers, {"memory": [row["peak_memory_bytes"] / 1e6 for row in rounds]}
        ),
        f"{title} over simulated hours": curve(
            "simulated hours", {lead.title: ([hours[i] for i in scored], values)}, whole=False
        ),
        f"{title} over simulated energy": curve(
            "kilojoules of all devices",
            {lead.title: ([kilojoules[i] for i in scored], values)},
            whole=False,
        ),
        "Depth by kind of device": curve("round", _by_device(clients)),
        "Slots of a module by block and kind of device": curve("block", _ranks_by_device(clients)),
    }


def duration(seconds: float) -> str:
    """Simulated time for people: ``40 s``, ``1.50 h``."""
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.3g} s"


def energy(joules: float) -> str:
    """Energy for people: ``87 J``, ``1.5 kJ``."""
    return f"{joules / 1e3:.3g} kJ" if joules >= 1e3 else f"{joules:.3g} J"


def gantt(rows: Sequence[Row]) -> Markup:
    """The sessions of one round, the slowest first."""
    ordered = sorted(rows, key=lambda row: -float(row["simulated"]["total_s"]))[:_MOST_SPANS]
    names = [
        f"{row['client']} {row['simulated']['device']}{' (late)' if row['simulated']['late'] else ''}"
        for row in ordered
    ]
    keys = {"down": "down_s", "compute": "compute_s", "up": "up_s", "waiting": "waiting_s"}
    stacks = {name: [row["simulated"][key] for row in ordered] for name, key in keys.items()}
    return spans("simulated seconds", names, stacks)


def _by_device(clients: Sequence[Row]) -> dict[str, tuple[list[float], list[float]]]:
    """Mean depth of each kind of device in the rounds it took part in."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for device in _devices(clients):
        found: dict[int, list[int]] = {}
        for row in clients:
            if row["simulated"]["device"] == device:
                found.setdefault(row["round"] + 1, []).append(row["simulated"]["depth"])
        lines[device] = [float(number) for number in found], [mean(depths) for depths in found.values()]
    return lines


def _ranks_by_device(clients: Sequence[Row]) -> dict[str, tuple[list[float], list[float]]]:
    """Mean slots of a module in each block, over all sessions of a kind of device."""
    lines = {}
    for device in _devices(clients):
        ranks = [row["simulated"]["ranks"] for row in clients if row["simulated"]["device"] == device]
        means = [float(mean(column)) for column in zip(*ranks, strict=True)]
        lines[device] = [float(block + 1) for block in range(len(means))], means
    return lines


def _devices(clients: Sequence[Row]) -> list[str]:
    return sorted({row["simulated"]["device"] for row in clients})
