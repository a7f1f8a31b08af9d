"""report.html: one self-contained page about a run, made from its folder alone."""

from __future__ import annotations

from collections import Counter
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from polyrank.durable import replace
from polyrank.ledger import RunFolder
from polyrank.measures import judged, measures_of
from polyrank.report.devices import device_figures, duration, energy
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
        samples=_samples(folder),
    )
    replace(folder.path / REPORT, page.encode())


def _samples(folder: RunFolder) -> list[dict[str, str]]:
    """What the model said to some test prompts before and after, where it was asked."""
    if not (folder.path / "samples.json").exists():
        return []
    return list(folder.read("samples.json"))[:5]


def _run_figures(
    rows: list[dict[str, Any]], summary: dict[str, Any], partition: dict[str, Any]
) -> dict[str, Any]:
    """What every run has: scores, loss, traffic, labels."""
    lead, second = judged(summary)
    scored = [row for row in rows if lead.on_test in row]
    rounds = [row["round"] + 1 for row in rows]
    scored_rounds = [row["round"] + 1 for row in scored]
    lines = {m.title: (scored_rounds, [row[m.on_test] for row in scored]) for m in (lead, second)}
    majority = summary.get("majority_rate")
    level = None if majority is None else ("majority class", majority)
    together = {f"Test {lead.title} and {second.title}": lines}
    apart = {f"Test {name}": {name: line} for name, line in lines.items()}
    return {
        **{t: curve("round", drawn, level) for t, drawn in (together if lead.rises else apart).items()},
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
    title = "Labels on each client" if len(partition["labels"]) > 1 else "Texts of each client"
    return {title: label_histogram(names, partition["labels"], counts)}


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
    """The final scores on each client, where they were asked for."""
    found = measures_of(scores[0], "") if scores else None
    if found is None:
        return {}
    lead, _ = found
    values = sorted(row[lead.key] for row in scores)
    figure = bars("client", list(range(1, len(values) + 1)), {lead.title: values})
    return {f"{lead.title.capitalize()} on each client's own texts, from the least": figure}


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
    (lead, second), majority = judged(summary), summary.get("majority_rate")
    return {
        f"test {lead.title}": f"{summary[lead.on_test]:{lead.spec}}",
        second.title: f"{summary[second.on_test]:{second.spec}}",
        **({"majority class": f"{majority:.1%}"} if majority is not None else {}),
        "rounds": str(summary["rounds"]),
        "traffic": f"{megabytes:.1f} MB",
        "wall time": f"{summary['wall_s']:.0f} s",
    } | (
        {}
        if "simulated_s" not in summary
        else {
            "simulated time": duration(summary["simulated_s"]),
            "simulated energy": energy(summary["energy_j"]),
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
