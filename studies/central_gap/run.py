"""How far federated LoRA stays behind central training with the same code and as many steps.

AG News, 20 clients, Dirichlet 0.5, 10 per round, rank 8, against one client that holds all texts and
takes as many local steps as the whole cohort together.

    python studies/central_gap/run.py --data FOLDER_WITH_TRAIN_AND_TEST_PARQUET --out results
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from polyrank import run
from polyrank.config import make_config

ROUNDS, COHORT, STEPS = 30, 10, 5


def config(data: Path, arm: str, seed: int) -> dict[str, Any]:
    """The config of one cell; the arms differ in who holds the texts and nothing else."""
    shared = {
        "seed": seed,
        "rounds": ROUNDS,
        "data": {"source": str(data)},
        "adapter": {"rank": 8},
        "evaluation": {"every": ROUNDS},
        "training": {"learning_rate": 2e-3, "schedule": "linear", "batch_size": 8},
    }
    if arm == "federated":
        shared["partition"] = {"kind": "dirichlet", "clients": 20, "alpha": 0.5}
        shared["sampling"] = {"kind": "count", "count": COHORT}
        shared["training"]["local_steps"] = STEPS  # type: ignore[index]
    else:
        shared["partition"] = {"kind": "iid", "clients": 1}
        shared["sampling"] = {"kind": "all"}
        shared["training"]["local_steps"] = STEPS * COHORT  # type: ignore[index]
    return shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        for arm in ("federated", "central"):
            result = run(make_config(config(arguments.data, arm, seed)), arguments.out / f"{arm}-{seed}")
            rows.append({"arm": arm, **result.summary})
            print(arm, seed, f"{result.summary['test_accuracy']:.4f}", flush=True)
    accuracy = {
        arm: [row["test_accuracy"] for row in rows if row["arm"] == arm] for arm in ("federated", "central")
    }
    gaps = [c - f for c, f in zip(accuracy["central"], accuracy["federated"], strict=True)]
    for arm, values in accuracy.items():
        print(f"{arm:10} {statistics.mean(values):.4f} (sd {statistics.stdev(values):.4f})")
    print(f"gap in points: {100 * statistics.mean(gaps):.2f}, by seed {[round(100 * g, 2) for g in gaps]}")
    (arguments.out / "rows.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
