"""Fine-tuning a small language model on GSM8K: five federated methods against central training, same texts.

20 clients (iid), 10 per round, devices of three classes. Central training is one client that holds all texts
and sees as many of them: ``central`` takes as many steps as a whole cohort together, ``central, wide`` as
many as each client, with the batches of all of them in one. Response perplexity on the test questions.

    python -m studies.causal.pretrain --data DATA --out MODEL --minutes 5
    python -m studies.causal.run --data DATA --out OUT --model MODEL
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from studies.cells import mean_sd, run_cells

ROUNDS, COHORT, STEPS, BATCH, RANK = 20, 10, 4, 4, 8
TIERS = [
    {"rank": rank, "device": device} for rank, device in ((2, "raspberry-pi-5"), (4, "jetson-orin-nano"))
]
MIXED = {"kind": "tiers", "tiers": [*TIERS, {"rank": RANK, "device": "jetson-agx-orin"}]}
SVD = {"form": "svd", "rank": RANK, "targets": "all-linear"}
RATES = {"lora": 3e-3, "svd": 2e-2}
ARMS: dict[str, dict[str, Any]] = {
    "central": {"method": "fedit"},
    "central, wide": {"method": "fedit"},
    "fedit": {"method": "fedit"},
    "replication": {"method": "replication", "allocation": MIXED},
    "legend": {"method": "legend"},
    "fedara": {"method": "fedara", "adapter": SVD},
    "fedara, mixed": {
        "method": "fedara",
        "adapter": SVD,
        "allocation": MIXED,
        "aggregation": {"kind": "replication_padding"},
    },
}


def config(data: Path, model: Path, arm: str, seed: int) -> dict[str, Any]:
    """The config of one cell; the arms differ in method and in who holds the texts."""
    central, wide = arm.startswith("central"), arm == "central, wide"
    return {
        "task": "causal_lm",
        "seed": seed,
        "rounds": ROUNDS,
        "engine": {"workers": 1},
        "fleet": {"name": "edge3", "ignore_memory": True},
        "model": {"name": str(model), "max_length": 320},
        "data": {"source": str(data / "gsm8k"), "max_test": 200},
        "evaluation": {"every": ROUNDS // 4, "responses": 10, "max_new_tokens": 100},
        "training": {
            "learning_rate": RATES[ARMS[arm].get("adapter", {}).get("form", "lora")],
            "schedule": "linear",
            "local_steps": STEPS * COHORT if central and not wide else STEPS,
            "batch_size": BATCH * COHORT if wide else BATCH,
        },
        "partition": {"kind": "iid", "clients": 1 if central else 20},
        "sampling": {"kind": "all"} if central else {"kind": "count", "count": COHORT},
        **{"adapter": {"rank": RANK, "targets": "all-linear"}, **ARMS[arm]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("--data", "--out", "--model"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    seeds = range(1, 1 + given.seeds)
    names = {(arm, seed): f"{arm.replace(', ', '-')}-{seed}" for seed in seeds for arm in ARMS}
    cells = {name: config(given.data, given.model, *key) for key, name in names.items()}
    found = run_cells(cells, given.out, given.workers)
    base = {seed: found[names["central", seed]]["test_perplexity"] for seed in seeds}
    print(
        "| arm | perplexity, mean (sd) | over central, % | token accuracy | MB | simulated h |\n"
        + "|---" * 6
        + "|"
    )
    for arm in ARMS:
        rows = {seed: found[names[arm, seed]] for seed in seeds}
        over = [100 * (row["test_perplexity"] / base[seed] - 1) for seed, row in rows.items()]
        megabytes = [(row["bytes_down"] + row["bytes_up"]) / 1e6 for row in rows.values()]
        hours = [row["simulated_s"] / 3600 for row in rows.values()]
        cells_of = [
            mean_sd([row["test_perplexity"] for row in rows.values()]),
            mean_sd(over),
            mean_sd([row["test_token_accuracy"] for row in rows.values()]),
            f"{statistics.fmean(megabytes):.1f}",
            f"{statistics.fmean(hours):.2f}",
        ]
        print(f"| {arm} | {' | '.join(cells_of)} |")


if __name__ == "__main__":
    main()
