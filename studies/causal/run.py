"""Fine-tuning a small language model on GSM8K: five federated methods against central training, same texts.

20 clients (iid), 10 per round, devices of three classes. Central training is one client that holds all texts
and sees as many of them: ``central`` takes as many steps as a whole cohort together, ``central, wide`` as
many as each client, with the batches of all of them in one. Response perplexity on the test questions.

    python -m studies.causal.pretrain --data DATA --out MODEL --minutes 8
    python -m studies.causal.run --data DATA --out OUT --model MODEL

Finished cells are recorded beside this file and not run again; writes tables.md into OUT.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from studies.cells import mean_sd
from studies.records import Record, recorded

ROUNDS, COHORT, STEPS, BATCH, RANK = 10, 10, 4, 4, 8
TIERS = [
    {"rank": rank, "device": device} for rank, device in ((2, "raspberry-pi-5"), (4, "jetson-orin-nano"))
]
MIXED = {"kind": "tiers", "tiers": [*TIERS, {"rank": RANK, "device": "jetson-agx-orin"}]}
SVD = {"form": "svd", "rank": RANK, "targets": "all-linear"}
RATES = {"lora": 1e-2, "svd": 2e-2}
"""The best of some tried with one more seed and 8 rounds; many steps of few texts want a smaller one."""
CENTRAL_RATE = 3e-3
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
    rate = CENTRAL_RATE if arm == "central" else RATES[ARMS[arm].get("adapter", {}).get("form", "lora")]
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
            "learning_rate": rate,
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
    records = recorded(cells, given.out, given.workers, Path(__file__).with_name("records.jsonl"))
    lines = table({key: records[name] for key, name in names.items()}, seeds)
    (given.out / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def table(found: Mapping[tuple[str, int], Record], seeds: range) -> list[str]:
    """What each arm reached, beside central training from the same seed, and what it took."""
    lines = [
        "| arm | perplexity (sd) | over wide central, % | token accuracy (sd) | MB | simulated min | slots |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        rows = [found[arm, seed] for seed in seeds]
        reached = [one.perplexity or float("nan") for one in rows]
        base = [found["central, wide", seed].perplexity or float("nan") for seed in seeds]
        over = [100 * (one / other - 1) for one, other in zip(reached, base, strict=True)]
        spent = [one.spent for one in rows]
        cells = [
            mean_sd(reached),
            f"{mean(over):+.1f} ({min(over):+.1f} to {max(over):+.1f})",
            mean_sd([one.accuracy for one in rows]),
            f"{mean(one.megabytes for one in spent):.1f}",
            f"{mean(one.simulated_s for one in spent) / 60:.2f}",
            f"{mean(one.slots for one in rows):.0f}",
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
