"""What does it cost when 10, 30 or 50 % of the clients drop out in every round?

AG News, 50 clients, Dirichlet 0.5, 10 per round, rank 8 in the top block. A client that drops out has trained
and its answer is lost; a round goes on with half of its cohort and asks others below that. Every arm has the
same partition and the same cohorts.

    python -m studies.dropout.run --data DATA --out OUT
"""

from __future__ import annotations

import argparse
from typing import Any

from studies.cells import arguments, mean_sd, paired, rounds_of, run_cells

ROUNDS, COHORT = 30, 10
SHARES = (0.0, 0.1, 0.3, 0.5)


def config(data: str, share: float, seed: int) -> dict[str, Any]:
    """The config of one cell; the arms differ in nothing but who is lost."""
    return {
        "seed": seed,
        "rounds": ROUNDS,
        "engine": {"workers": 1},
        "model": {"base_dtype": "bf16", "max_length": 32},
        "data": {"source": data, "max_train": 6_000, "max_test": 2_000},
        "adapter": {"rank": 8},
        "allocation": {"kind": "uniform", "depth": 1},
        "partition": {"kind": "dirichlet", "clients": 50, "alpha": 0.5},
        "sampling": {"kind": "count", "count": COHORT},
        "training": {"learning_rate": 5e-3, "schedule": "linear", "local_steps": 5},
        "failures": {"dropout": share, "quorum": 0.5, "retries": 8},
        "evaluation": {"every": ROUNDS},
    }


def table(given: argparse.Namespace) -> list[str]:
    """Run what is missing, and the lines of the table."""
    seeds = range(given.seeds or 5)
    names = {(share, seed): f"{share:g}-{seed}" for seed in seeds for share in SHARES}
    data = str(given.data / "ag_news")
    cells = {name: config(data, *key) for key, name in names.items()}
    summaries = run_cells(cells, given.out, given.workers)
    accuracy = {share: [summaries[names[share, seed]]["test_accuracy"] for seed in seeds] for share in SHARES}
    titles = ("drop out", "rounds", "lost a round", "accuracy, mean (sd)", "points against none")
    lines = [f"| {' | '.join(titles)} |", "|---|---|---|---|---|"]
    for share, values in accuracy.items():
        rows = [list(rounds_of(given.out / names[share, seed])) for seed in seeds]
        lost = sum(row["failed"] for run in rows for row in run) / sum(map(len, rows))
        apart = paired(values, accuracy[0.0]) if share and len(values) > 1 else ""
        done = f"{min(map(len, rows))} of {ROUNDS}"
        lines.append(f"| {share:.0%} | {done} | {lost:.1f} | {mean_sd(values)} | {apart} |")
    return lines


def main() -> None:
    print("\n".join(table(arguments(__doc__ or ""))))


if __name__ == "__main__":
    main()
