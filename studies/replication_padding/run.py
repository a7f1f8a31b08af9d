"""Replication padding (arXiv 2406.17477) against its baselines, on MiniLM instead of DistilBERT and ALBERT.

100 clients, the first 10 near-balanced and the others Dirichlet-skewed, 10 % per round, one local epoch,
ranks 5 and 20 on q, k, v. Part 1: what one aggregation does to a high-quality client. Part 2: whole runs.

    python -m studies.replication_padding.run --data DATA --out OUT

Writes tables.md and figure.svg into OUT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from studies.cells import arguments, mean_sd, paired, rounds_of, run_cells
from studies.replication_padding.first_round import first_round

ROUNDS = 6
LOW, HIGH = 5, 20
NEAR_BALANCED = [f"client-{index:02d}" for index in range(10)]
TIERS = {"kind": "tiers", "tiers": [{"rank": HIGH, "clients": NEAR_BALANCED}, {"rank": LOW, "share": 1.0}]}
RANDOM = {"kind": "tiers", "tiers": [{"rank": HIGH, "share": 0.1}, {"rank": LOW, "share": 0.9}]}


def loss_based(share: float) -> dict[str, Any]:
    """The paper's allocation with so many clients at the high rank."""
    return {"kind": "loss_based", "low_rank": LOW, "high_rank": HIGH, "high_share": share}


def arms(data: str) -> dict[str, dict[str, Any]]:
    """What is compared; the ablations of share and allocation run on AG News only."""
    mixed = {"adapter": {"rank": HIGH}, "allocation": TIERS}
    common: dict[str, dict[str, Any]] = {
        "homogeneous r=5": {"adapter": {"rank": 5}},
        "homogeneous r=7": {"adapter": {"rank": 7}},
        "homogeneous r=20": {"adapter": {"rank": 20}},
        "zero padding": {**mixed, "aggregation": {"kind": "zero_padding"}},
        "norm weights": {**mixed, "aggregation": {"kind": "norm_weighted"}},
        "replication": {
            **mixed,
            "aggregation": {"kind": "replication_padding"},
        },
    }
    if data != "ag_news":
        return common
    rule: dict[str, Any] = {"adapter": {"rank": HIGH}, "aggregation": {"kind": "replication_padding"}}
    return common | {
        "replication, by loss, 10 %": {**rule, "allocation": loss_based(0.1)},
        "replication, by loss, 20 %": {**rule, "allocation": loss_based(0.2)},
        "replication, by loss, 50 %": {**rule, "allocation": loss_based(0.5)},
        "replication, random 10 %": {**rule, "allocation": RANDOM},
    }


def config(folder: Path, seed: int, arm: dict[str, Any]) -> dict[str, Any]:
    """The config of one cell; every arm sees the same partition and the same cohorts."""
    return {
        "seed": seed,
        "rounds": ROUNDS,
        "engine": {"workers": 1},
        "model": {"base_dtype": "bf16", "max_length": 32},
        "data": {"source": str(folder), "max_train": 3_500, "max_test": 400},
        "partition": {
            "kind": "dirichlet",
            "clients": 100,
            "alpha": 0.3,
            "min_examples": 2,
            "iid_share": 0.1,
        },
        "sampling": {"kind": "share", "share": 0.1},
        "training": {"learning_rate": 5e-3, "local_epochs": 1},
        "evaluation": {"batch_size": 64, "validation_texts": 100},  # in every arm, for equal clients
        **arm,
    }


def main() -> None:
    given = arguments(__doc__ or "")
    seeds = list(range(given.seeds or 3))
    lines = ["# Replication padding: tables", ""]
    first = first_round(given.data, given.out, seeds)
    lines += ["## One aggregation, seen from a high-quality client", "", *first, ""]
    curves = {}
    for data in ("ag_news", "dbpedia14"):
        chosen = arms(data)
        names = {
            (arm, seed): f"{data}-{arm.replace(' ', '_').replace('%', 'pct')}-{seed}"
            for seed in seeds
            for arm in chosen
        }
        cells = {name: config(given.data / data, seed, chosen[arm]) for (arm, seed), name in names.items()}
        summaries = run_cells(cells, given.out, given.workers)
        rows = {key: list(rounds_of(given.out / name)) for key, name in names.items()}
        curves[data] = {arm: [rows[arm, seed] for seed in seeds] for arm in chosen}
        accuracy = {arm: [summaries[names[arm, s]]["test_accuracy"] for s in seeds] for arm in chosen}
        lines += [f"## {data}, {ROUNDS} rounds, {len(seeds)} seeds", "", *table(accuracy, curves[data])]
    (given.out / "tables.md").write_text("\n".join(lines) + "\n")
    draw(curves, given.out / "figure.svg")
    print("\n".join(lines))


def table(accuracy: dict[str, list[float]], curves: dict[str, list[list[dict[str, Any]]]]) -> list[str]:
    """Accuracy, paired difference to zero padding, rounds to the best homogeneous r=5 accuracy, megabytes."""
    target = sum(accuracy["homogeneous r=5"]) / len(accuracy["homogeneous r=5"])
    lines = [
        f"| arm | accuracy (sd) | points over zero padding [95 %] | rounds to {target:.3f} | MB in all |",
        "|---|---|---|---|---|",
    ]
    for arm, values in accuracy.items():
        reached = [
            next((r["round"] + 1 for r in rows if r["test_accuracy"] >= target), None) for rows in curves[arm]
        ]
        megabytes = sum(r["bytes_down"] + r["bytes_up"] for rows in curves[arm] for r in rows) / 1e6
        gap = "" if arm == "zero padding" else paired(values, accuracy["zero padding"])
        shown = ", ".join("never" if r is None else str(r) for r in reached)
        lines.append(f"| {arm} | {mean_sd(values)} | {gap} | {shown} | {megabytes / len(values):.1f} |")
    return [*lines, ""]


def draw(curves: dict[str, dict[str, list[list[dict[str, Any]]]]], path: Path) -> None:
    """Mean test accuracy over rounds, one panel per data set."""
    with matplotlib.rc_context({"svg.hashsalt": "polyrank", "font.size": 9}):
        figure = Figure(figsize=(10, 4))
        for number, (data, by_arm) in enumerate(curves.items(), 1):
            axes = figure.add_subplot(1, len(curves), number)
            for arm, seeds in by_arm.items():
                means = [
                    sum(r["test_accuracy"] for r in same) / len(same) for same in zip(*seeds, strict=True)
                ]
                axes.plot(range(1, len(means) + 1), means, label=arm, marker="o", markersize=2.5)
            axes.set(title=data, xlabel="round", ylabel="test accuracy")
            axes.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
