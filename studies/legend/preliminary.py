"""What LEGEND starts from: where adapters pay, which shape of ranks pays, and what depth costs.

SST-2, 20 equal devices, IID. Adapters of rank 4 in two blocks (shallow, middle, deep) or in all; ranks flat,
rising, falling and humped at one budget over all blocks; depth 1 to 6 from the output and its simulated cost.

    python -m studies.legend.preliminary --data DATA --out OUT [--seeds 3]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from studies.cells import arguments, mean_sd

BLOCKS = 6
ARMS: dict[str, Sequence[int]] = {
    "shallow": (4, 4, 0, 0, 0, 0),
    "middle": (0, 0, 4, 4, 0, 0),
    "deep": (0, 0, 0, 0, 4, 4),
    "all": (4, 4, 4, 4, 4, 4),
    "rising": (1, 2, 3, 5, 6, 7),
    "falling": (7, 6, 5, 3, 2, 1),
    "humped": (2, 4, 6, 6, 4, 2),
    **{f"depth {depth}": (0,) * (BLOCKS - depth) + (4,) * depth for depth in range(1, BLOCKS)},
}


def run_arm(folder: Path, data: Path, ranks: Sequence[int], seed: int) -> dict[str, Any]:
    """One run whose active slots are so many in each block; done once."""
    from polyrank.adapter import block_numbers
    from polyrank.assemble import prepare
    from polyrank.config import make_config
    from polyrank.experiment import conduct, open_folder

    if (folder / "summary.json").exists():
        found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        return found
    config = {
        "seed": seed,
        "rounds": 12,
        "engine": {"workers": 1},
        "model": {"base_dtype": "bf16", "max_length": 48},
        "data": {"source": str(data / "sst2"), "max_train": 4_000},
        "partition": {"kind": "iid", "clients": 20},
        "sampling": {"kind": "count", "count": 6},
        "training": {"learning_rate": 3e-3, "schedule": "linear", "local_steps": 6, "batch_size": 8},
        "evaluation": {"every": 12, "batch_size": 64},
        "fleet": {"name": "uniform"},
    }
    experiment = prepare(make_config(config))
    active = experiment.start.active
    blocks = block_numbers(active)
    held = {name: slots & (slots.cumsum(0) <= ranks[blocks[name]]) for name, slots in active.items()}
    experiment = replace(experiment, start=replace(experiment.start, active=held))
    *_, summary = conduct(experiment, open_folder(experiment, folder))
    return summary


def main() -> None:
    given = arguments(__doc__ or "")
    seeds = range(given.seeds or 3)
    lines = [
        "| adapters | ranks | accuracy (sd) | simulated s | kJ | MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, ranks in ARMS.items():
        cells = [
            run_arm(given.out / f"{name.replace(' ', '_')}-{seed}", given.data, ranks, seed) for seed in seeds
        ]
        accuracy = mean_sd([cell["test_accuracy"] for cell in cells])
        spent, joules = (mean(cell[key] for cell in cells) for key in ("simulated_s", "energy_j"))
        megabytes = mean((cell["bytes_down"] + cell["bytes_up"]) / 1e6 for cell in cells)
        shape = " ".join(map(str, ranks))
        lines.append(
            f"| {name} | {shape} | {accuracy} | {spent:.1f} | {joules / 1e3:.2f} | {megabytes:.1f} |"
        )
    (given.out / "preliminary.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
