"""How far federated LoRA stays behind central training with the same code and as many steps.

AG News, 20 clients, Dirichlet 0.5, 10 per round, rank 8, against one client that holds all texts and
takes as many local steps as the whole cohort together. Each arm at both learning rates; every
accuracy is on the whole test set.

    python -m studies.central_gap.run --data DATA --out OUT
"""

from __future__ import annotations

from typing import Any

from studies.cells import arguments, mean_sd, paired, run_cells

ROUNDS, COHORT, STEPS = 20, 10, 5
RATES = (2e-3, 5e-3)


def config(data: str, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """The config of one cell; the arms differ in who holds the texts and in nothing else."""
    federated = arm == "federated"
    return {
        "seed": seed,
        "rounds": ROUNDS,
        "model": {"base_dtype": "bf16"},
        "data": {"source": data},
        "adapter": {"rank": 8},
        "evaluation": {"every": ROUNDS},
        "training": {
            "learning_rate": rate,
            "schedule": "linear",
            "local_steps": STEPS if federated else STEPS * COHORT,
        },
        "partition": {"kind": "dirichlet", "clients": 20, "alpha": 0.5}
        if federated
        else {"kind": "iid", "clients": 1},
        "sampling": {"kind": "count", "count": COHORT} if federated else {"kind": "all"},
    }


def main() -> None:
    given = arguments(__doc__ or "")
    seeds = range(given.seeds or 3)
    data = str(given.data / "ag_news")
    names = {(a, r, s): f"{a}-{r:g}-{s}" for s in seeds for a in ("federated", "central") for r in RATES}
    cells = {name: config(data, *key) for key, name in names.items()}
    summaries = run_cells(cells, given.out, given.workers)

    def accuracies(arm: str, rate: float) -> list[float]:
        return [summaries[names[arm, rate, seed]]["test_accuracy"] for seed in seeds]

    best = {a: max(RATES, key=lambda r: sum(accuracies(a, r))) for a in ("federated", "central")}
    print("| arm | learning rate | accuracy, mean (sd) |\n|---|---|---|")
    for arm in best:
        for rate in RATES:
            print(f"| {arm} | {rate:g} | {mean_sd(accuracies(arm, rate))} |")
    gap = paired(accuracies("federated", best["federated"]), accuracies("central", best["central"]))
    print(f"federated minus central in points, each at its better rate: {gap}")


if __name__ == "__main__":
    main()
