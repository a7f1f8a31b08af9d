"""What one aggregation does to a high-quality client: its own model before, the aggregated one after.

The cohort is one near-balanced client of rank 20 and nine skewed ones of rank 5; all train from the same
start, and the same ten updates go through every rule.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from studies.cells import mean_sd

RULES = ("zero_padding", "norm_weighted", "replication_padding", "svd_redistribution", "anchored")


def first_round(data: Path, out: Path, seeds: list[int]) -> list[str]:
    """A Markdown table of test accuracies, mean and sd over seeds; kept in OUT/first_round.json."""
    path = out / "first_round.json"
    if path.exists():
        found = json.loads(path.read_text())
    else:
        found = {name: [measure(data / name, seed) for seed in seeds] for name in ("ag_news", "dbpedia14")}
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
    lines = ["| model | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for row in ("local", *RULES):
        cells = [mean_sd([seed[row] for seed in rows]) for rows in found.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def measure(folder: Path, seed: int) -> dict[str, float]:
    """Test accuracy of the high-quality client's local model, and of its slots after each rule."""
    from pydantic import TypeAdapter

    from polyrank.adapter import prefix_mask, restrict
    from polyrank.aggregation import Aggregation
    from polyrank.assemble import prepare
    from polyrank.collect import collect
    from polyrank.config import make_config
    from polyrank.evaluation import evaluate
    from polyrank.received import Received, Updates
    from polyrank.round import make_task
    from studies.replication_padding import run as study

    given = study.config(folder, seed, {"adapter": {"rank": study.HIGH}})
    given["data"] |= {"max_train": 12_000, "max_test": 500}
    given["model"]["max_length"] = 40
    given["training"] = {"learning_rate": 5e-3, "local_epochs": 3}
    experiment = prepare(make_config(given))
    fed, state = experiment.federation, experiment.start
    high, *low = [study.NEAR_BALANCED[seed], *[f"client-{10 + 9 * seed + i:02d}" for i in range(9)]]
    ranks = {high: study.HIGH} | dict.fromkeys(low, study.LOW)
    masks = {client: prefix_mask(state.adapter, rank) for client, rank in ranks.items()}
    received = Received(lambda client: make_task(fed, state, masks[client], client))
    with contextlib.closing(received):
        collect(fed.engine, list(masks), received)
        updates = list(Updates(received, list(masks)))

    def accuracy(adapter: Any, head: Any) -> float:
        held = restrict(adapter, masks[high])
        return evaluate(experiment.model, held, head, experiment.test, 64)["accuracy"]

    found = {"local": accuracy(updates[0].adapter, updates[0].head)}
    for kind in RULES:
        rule: Any = TypeAdapter(Aggregation).validate_python({"kind": kind})
        merged = rule.aggregate(state, updates)
        found[kind] = accuracy(merged.adapter, merged.head)
    print(folder.name, seed, {name: round(value, 3) for name, value in found.items()}, flush=True)
    return found
