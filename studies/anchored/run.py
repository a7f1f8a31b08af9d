"""Does anchoring carry over to language models? banking77, Dirichlet 0.1, 10 % participation, ranks 2/4/8/16.

    python -m studies.anchored.run --data DATA --out OUT

Every arm sees the same partition, the same cohorts and the same ranks per client. Writes tables.md into OUT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studies.cells import arguments, mean_sd, paired, rounds_of, run_cells

ROUNDS = 10
TIERS = {
    "kind": "tiers",
    "tiers": [{"rank": rank, "share": 0.25} for rank in (2, 4, 8, 16)],
}


def arms() -> dict[str, dict[str, Any]]:
    """Rule and what a client does with slots it does not train."""
    rules = {
        "rank_partition": {"kind": "rank_partition"},
        "svd_redistribution": {"kind": "svd_redistribution"},
        "replication_padding": {"kind": "replication_padding"},
    }
    found = {name: {"aggregation": rule, "adapter": {"rank": 16}} for name, rule in rules.items()}
    for kappa in (0.0, 0.5, 1.0):
        for fold, untrained in (("", "absent"), (" + fold", "frozen")):
            found[f"anchored {kappa:g}{fold}"] = {
                "aggregation": {"kind": "anchored", "kappa": kappa},
                "adapter": {"rank": 16, "untrained": untrained},
            }
    return found


def config(folder: Path, seed: int, arm: dict[str, Any]) -> dict[str, Any]:
    """The config of one cell."""
    return {
        "seed": seed,
        "rounds": ROUNDS,
        "engine": {"workers": 1},
        "model": {"base_dtype": "bf16", "max_length": 24},
        "data": {"source": str(folder), "max_test": 1_000},
        "partition": {"kind": "dirichlet", "clients": 100, "alpha": 0.1, "min_examples": 8},
        "sampling": {"kind": "share", "share": 0.1},
        "allocation": TIERS,
        "training": {"learning_rate": 1e-2, "local_steps": 8},
        "evaluation": {"every": 5, "batch_size": 64},
        **arm,
    }


def main() -> None:
    given = arguments(__doc__ or "")
    seeds = list(range(given.seeds or 5))
    names = {(arm, seed): f"{arm.replace(' ', '_')}-{seed}" for seed in seeds for arm in arms()}
    cells = {name: config(given.data / "banking77", seed, arms()[arm]) for (arm, seed), name in names.items()}
    summaries = run_cells(cells, given.out, given.workers)
    accuracy = {arm: [summaries[names[arm, seed]]["test_accuracy"] for seed in seeds] for arm in arms()}
    lines = [
        "| arm | accuracy (sd) | points over rank_partition [95 %] | aggregation error | MB down | MB up |",
        "|---|---|---|---|---|---|",
    ]
    for arm, values in accuracy.items():
        rows = [row for seed in seeds for row in rounds_of(given.out / names[arm, seed])]
        error = sum(row["aggregation_error"] for row in rows) / len(rows)
        down, up = (sum(row[way] for row in rows) / len(seeds) / 1e6 for way in ("bytes_down", "bytes_up"))
        gap = "" if arm == "rank_partition" else paired(values, accuracy["rank_partition"])
        lines.append(f"| {arm} | {mean_sd(values)} | {gap} | {error:.3f} | {down:.1f} | {up:.1f} |")
    (given.out / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
