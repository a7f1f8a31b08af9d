"""A fifth of the clients attack: plain means against robust mode. AG News, ranks 2 / 4 / 8 on 20 clients.

    python -m studies.robust.run --data DATA --out OUT

Attackers are drawn at random, or are all clients of the highest rank. Every arm of a seed sees the same
partition, ranks and batches. Writes results.json and tables.md into OUT; finished cells are kept.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from polyrank.assemble import Experiment, prepare
from polyrank.config import make_config
from polyrank.experiment import evaluate_global
from polyrank.robust import Robust, RobustMean
from polyrank.round import federated_round
from polyrank.seed import seed_for
from studies.cells import arguments, mean_sd
from studies.robust.attacks import ATTACKS, Liars

CLIENTS, LIARS, ROUNDS = 20, 4, 20
TOP = [f"5.attention.self.{name}" for name in ("query", "key", "value")]
TIERS = [{"rank": 8, "share": 0.2}, {"rank": 4, "share": 0.4}, {"rank": 2, "share": 0.4}]
MODES = ("plain", "robust")


def config(folder: Path, seed: int) -> dict[str, Any]:
    """The config of one seed, without attack and without robust mode."""
    return {
        "seed": seed,
        "rounds": ROUNDS,
        "engine": {"workers": 1},
        "adapter": {"rank": 8, "targets": TOP},
        "model": {"max_length": 16},
        "data": {"source": str(folder), "max_train": 2_000, "max_test": 500},
        "partition": {"kind": "dirichlet", "clients": CLIENTS, "alpha": 1.0, "min_examples": 16},
        "sampling": {"kind": "all"},
        "allocation": {"kind": "tiers", "tiers": TIERS},
        "aggregation": {"kind": "replication_padding", "weights": "uniform"},
        "training": {"learning_rate": 1e-2, "schedule": "linear", "local_steps": 4},
        "evaluation": {"batch_size": 50},
    }


def attackers(ready: Experiment, who: str) -> list[str]:
    """A fifth of the clients: drawn at random, or those of the highest rank."""
    names = list(ready.environments)
    if who == "random":
        return random.Random(seed_for(ready.config.seed, "liars")).sample(names, LIARS)
    assert ready.config.allocation.kind == "tiers"
    ranks = ready.config.allocation.ranks(names, ready.config.seed, {})
    return [name for name in names if ranks[name] == 8]


def accuracy(ready: Experiment, mode: str, attack: str, liars: Collection[str]) -> float:
    """Test accuracy after all rounds."""
    fed = ready.federation
    if attack != "none":
        fed = dataclasses.replace(fed, engine=Liars(fed.engine, liars, attack))
    if mode == "robust":
        rule = RobustMean(Robust(attackers=LIARS), ready.config.aggregation)
        fed = dataclasses.replace(fed, aggregation=rule)
    state = ready.start
    for _ in range(ROUNDS):
        state, _ = federated_round(fed, state)
    return evaluate_global(ready, state)["accuracy"]


def run_seed(folder: Path, seed: int, out: Path) -> dict[str, float]:
    """Accuracy of every cell of one seed, by name."""
    path = out / f"seed-{seed}.json"
    done: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    cells = [("none", "nobody")] + [(a, who) for who in ("random", "high_rank") for a in ATTACKS]
    ready: Experiment | None = None
    for attack, who in cells:
        for mode in MODES:
            name = f"{mode}/{attack}/{who}"
            if name in done:
                continue
            ready = ready or prepare(make_config(config(folder, seed)))
            started = time.perf_counter()
            liars = attackers(ready, who) if attack != "none" else []
            done[name] = accuracy(ready, mode, attack, liars)
            path.write_text(json.dumps(done, indent=1) + "\n")
            print(
                f"seed {seed} {name}: {done[name]:.3f} in {time.perf_counter() - started:.0f} s", flush=True
            )
    if ready is not None:
        ready.federation.engine.close()
    return done


def main() -> None:
    given = arguments(__doc__ or "")
    given.out.mkdir(parents=True, exist_ok=True)
    seeds = [run_seed(given.data / "ag_news", seed, given.out) for seed in range(given.seeds or 3)]
    (given.out / "results.json").write_text(json.dumps(seeds, indent=1) + "\n")
    honest = [seed["plain/none/nobody"] for seed in seeds]
    lines = [
        "| attack | attackers | plain (sd) | points lost | robust (sd) | points lost |",
        "|---|---|---|---|---|---|",
    ]
    for cell in [name.removeprefix("plain/") for name in seeds[0] if name.startswith("plain/")]:
        attack, who = cell.split("/")
        row = [attack, who.replace("_", " ")]
        for mode in MODES:
            values = [seed[f"{mode}/{cell}"] for seed in seeds]
            lost = sum(h - v for h, v in zip(honest, values, strict=True)) / len(seeds)
            row += [mean_sd(values), f"{100 * lost:.1f}"]
        lines.append(f"| {' | '.join(row)} |")
    (given.out / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
