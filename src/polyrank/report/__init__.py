"""report.html: one self-contained page about a run, made from its folder alone."""

from __future__ import annotations

from collections import Counter
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from polyrank.durable import replace
from polyrank.ledger import RunFolder
from polyrank.report.devices import device_figures
from polyrank.report.figures import bars, curve, heat_map, label_histogram

REPORT = "report.html"


def write_report(folder: RunFolder) -> None:
    """Write ``report.html`` beside the files it is made from.

    Raises: InputError when the folder does not hold a finished run.
    """
    rows = folder.read_rows("rounds.jsonl")
    summary, partition = folder.read("summary.json"), folder.read("partition.json")
    figures = _run_figures(rows, summary, partition)
    if "epsilon" in rows[0]:
        name, spent = f"Epsilon spent (delta {rows[0]['delta']:g})", [row["epsilon"] for row in rows]
        figures[name] = curve("round", {"epsilon": ([row["round"] + 1 for row in rows], spent)})
    slots = folder.read_rows("slots.jsonl")
    if slots:
        figures |= _slot_figures(rows, slots, summary["active_slots"])
    if "simulated_s" in rows[0]:
        figures |= device_figures(rows, folder.read_rows("clients.jsonl"))
    figures |= _failures(rows) | _client_scores(folder.read_rows("client_scores.jsonl"))
    page = template("report.html.j2").render(
        summary=summary,
        headline=_headline(summary),
        figures=figures,
        config=dotted(folder.read("config.json")),
        versions=dotted(folder.read("versions.json")),
        num_clients=len(partition["clients"]),
        died=dead_modules(slots),
        reasons=summary["reasons"],
    )
    replace(folder.path / REPORT, page.encode())


def _run_figures(
    rows: list[dict[str, Any]], summary: dict[str, Any], partition: dict[str, Any]
) -> dict[str, Any]:
    """What every run has: scores, loss, traffic, labels."""
    scored = [row for row in rows if "test_accuracy" in row]
    rounds = [row["round"] + 1 for row in rows]
    scored_rounds = [row["round"] + 1 for row in scored]
    return {
        "Test accuracy and macro-F1": curve(
            "round",
            {
                "accuracy": (scored_rounds, [row["test_accuracy"] for row in scored]),
                "macro-F1": (scored_rounds, [row["test_macro_f1"] for row in scored]),
            },
            level=("majority class", summary["majority_rate"]),
        ),
        "Loss": _loss_figure(rows),
        "Megabytes per round": bars(
            "round",
            rounds,
            {
                "down": [row["bytes_down"] / 1e6 for row in rows],
                "up": [row["bytes_up"] / 1e6 for row in rows],
            },
        ),
    } | _labels_figure(partition)


def _labels_figure(partition: dict[str, Any]) -> dict[str, Any]:
    """Labels on each client, where the server knows them: real sites do not tell."""
    told = [client for client in partition["clients"] if client["label_counts"] is not None]
    if not told:
        return {}
    names, counts = [client["client"] for client in told], [client["label_counts"] for client in told]
    return {"Labels on each client": label_histogram(names, partition["labels"], counts)}


def _loss_figure(rows: list[dict[str, Any]]) -> Any:
    """Train and test loss by round; a private run keeps no train loss."""
    lines = {}
    for name in ("train", "test"):
        told = [row for row in rows if f"{name}_loss" in row]
        if told:
            lines[name] = [row["round"] + 1 for row in told], [row[f"{name}_loss"] for row in told]
    return curve("round", lines)


def _slot_figures(rows: list[dict[str, Any]], slots: list[dict[str, Any]], last: int) -> dict[str, Any]:
    """How voting shrank the active set: total against plan, module by module, and the time of a step."""
    rounds = [row["round"] + 1 for row in rows]
    modules = list(slots[0]["slots"])
    after = [*(row["active_slots"] for row in rows[1:]), last]
    return {
        "Active slots after each round": curve(
            "round",
            {
                "planned": (rounds, [row["planned_slots"] for row in rows]),
                "realised": (rounds, after),
            },
        ),
        "Milliseconds per local step": curve(
            "round", {"step": (rounds, [1e3 * row["client_wall_s"] / row["steps"] for row in rows])}
        ),
        "Active slots of each module": heat_map(
            "round", _short(modules), [list(row["slots"].values()) for row in slots]
        ),
    }


def _client_scores(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """The final accuracy on each client, where it was asked for."""
    if not scores:
        return {}
    accuracies = sorted(row["accuracy"] for row in scores)
    places = list(range(1, len(accuracies) + 1))
    figure = bars("client", places, {"accuracy": accuracies})
    return {"Accuracy on each client's own texts, from the least": figure}


def _failures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many clients failed, were silent or were refused in each round, by reason."""
    totals = sum((Counter(row["reasons"]) for row in rows), Counter[str]())
    counts = {name: [row["reasons"].get(name, 0) for row in rows] for name, _ in totals.most_common()}
    if not counts:
        return {}
    figure = bars("round", [row["round"] + 1 for row in rows], counts)
    return {"Clients without a usable update": figure}


def dead_modules(slots: list[dict[str, Any]]) -> dict[str, int]:
    """The first round, from 1, that each detached module did without, by module."""
    died: dict[str, int] = {}
    for row in slots:
        for name, count in row["slots"].items():
            if count == 0:
                died.setdefault(name, row["round"] + 1)
    return died


def _short(modules: list[str]) -> list[str]:
    """Module names without the words that all begin with."""
    words = [name.split(".") for name in modules]
    shared = sum(1 for same in zip(*words, strict=False) if len(set(same)) == 1)
    return [".".join(parts[min(shared, len(parts) - 1) :]) for parts in words]


def _headline(summary: dict[str, Any]) -> dict[str, str]:
    megabytes = (summary["bytes_down"] + summary["bytes_up"]) / 1e6
    return {
        "test accuracy": f"{summary['test_accuracy']:.1%}",
        "macro-F1": f"{summary['test_macro_f1']:.3f}",
        "majority class": f"{summary['majority_rate']:.1%}",
        "rounds": str(summary["rounds"]),
        "traffic": f"{megabytes:.1f} MB",
        "wall time": f"{summary['wall_s']:.0f} s",
    } | (
        {}
        if "simulated_s" not in summary
        else {
            "simulated time": f"{summary['simulated_s'] / 3600:.2f} h",
            "simulated energy": f"{summary['energy_j'] / 1e3:.2f} kJ",
        }
    )


def dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested tables as dotted keys."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = "" if value is None else str(value)
    return flat


def template(name: str) -> Any:
    """One of the page templates of this package, by file name."""
    source = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
