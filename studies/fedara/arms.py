"""What the FedARA study compares, and on what: arms, data sets, partitions, and the config of one cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANK = 12
RATES = (1e-3, 3e-3, 8e-3, 2e-2, 5e-2)
SVD_RATES = (*RATES, 0.12)
"""Of methods in the SVD form, which were best at the edge of the other grid."""
TUNED_ON = ("banking77", "dirichlet-0.1")
Given = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """How one data set is used; tokens are what costs time."""

    rounds: int
    local_steps: int
    max_length: int
    seeds: int
    partitions: tuple[str, ...]
    batch_size: int = 8


PARTITIONS: dict[str, dict[str, Any]] = {
    "dirichlet-0.1": {"kind": "dirichlet", "alpha": 0.1, "min_examples": 8, "clients": 100},
    "dirichlet-0.5": {"kind": "dirichlet", "alpha": 0.5, "min_examples": 8, "clients": 100},
    "dirichlet-1": {"kind": "dirichlet", "alpha": 1.0, "min_examples": 8, "clients": 100},
    "pathological": {"kind": "pathological", "clients": 100},
}
LABELS = {"banking77": 5, "huffpost41": 4, "ag_news": 1, "newsgroups20": 2}
"""Labels of each client under the pathological partition."""

USUAL = ("dirichlet-0.1", "dirichlet-1", "pathological")
FEW = ("dirichlet-0.5", "dirichlet-1", "pathological")
"""With four labels, 0.1 leaves some of 100 clients without a text, however often it is drawn."""

SMALL = {
    "banking77": Setting(20, 3, 32, 5, USUAL),
    "ag_news": Setting(10, 3, 32, 3, FEW),
    "huffpost41": Setting(20, 3, 24, 3, USUAL),
    "newsgroups20": Setting(12, 3, 64, 3, ("dirichlet-0.1",)),
}
"""What two quiet cores do in about two and a half hours."""

FULL = {name: Setting(100, 12, 128, 5, FEW if name == "ag_news" else USUAL, 16) for name in SMALL}
"""The size that a GPU is for."""


def arms(rounds: int) -> dict[str, dict[str, Any]]:
    """FedARA at two targets and the baselines; all start from 12 slots on every linear map."""
    adapter = {"rank": RANK, "targets": "all-linear"}
    depth = {"kind": "progressive_depth", "every": max(1, rounds // 6)}
    same: dict[str, dict[str, Any]] = {
        "fedit": {"method": "fedit"},
        "ffa": {"method": "ffa"},
        "fedsvd": {"method": "fedsvd"},
        "fedadalora": {"method": "fedadalora", "voting": {"target_rank": 4.0}},
        "federa": {"method": "federa"},
        "slora": {"method": "slora", "training": {"sparse_rounds": max(1, rounds // 5)}},
        "fedadapter": {"method": "fedadapter", "allocation": depth},
        "fedara-4": {"method": "fedara", "voting": {"target_rank": 4.0}},
        "fedara-2": {"method": "fedara", "voting": {"target_rank": 2.0}},
    }
    return {name: {**arm, "adapter": adapter} for name, arm in same.items()}


def rates_of(arm: str) -> tuple[float, ...]:
    """The learning rates that are tried for one of the arms."""
    return SVD_RATES if arm in ("fedsvd", "fedadalora", "fedara-4", "fedara-2") else RATES


def switches() -> dict[str, dict[str, Any]]:
    """FedARA at target 4 with one switch turned: which of our reconstructions moves the result."""
    adapter = {"rank": RANK, "targets": "all-linear"}
    votes: dict[str, dict[str, Any]] = {
        "arbitration-top": {"arbitration": "top"},
        "importance-magnitude": {"importance": "magnitude"},
        "importance-gradient": {"importance": "gradient"},
        "schedule-linear": {"schedule": "linear"},
        "threshold-0.3": {"threshold": 0.3},
    }
    arm = {"method": "fedara", "adapter": adapter}
    found = {name: {**arm, "voting": {"target_rank": 4.0, **one}} for name, one in votes.items()}
    found["orthogonality-0.1"] = {**arm, "training": {"orthogonality": 0.1}}
    found["without-SVD-form"] = {
        **arm,
        "voting": {"target_rank": 4.0},
        "adapter": {**adapter, "form": "lora"},
    }
    return found


def config(
    source: Path, data: str, partition: str, seed: int, arm: Given, rate: float, setting: Setting
) -> dict[str, Any]:
    """The config of one cell; every arm sees the same clients and the same cohorts."""
    shared = dict(PARTITIONS[partition])
    if shared["kind"] == "pathological":
        shared["labels_per_client"] = LABELS[data]
    steps = {"local_steps": setting.local_steps, "batch_size": setting.batch_size, "schedule": "linear"}
    training = {"learning_rate": rate, **steps, **arm.get("training", {})}
    return {
        **arm,
        "seed": seed,
        "rounds": setting.rounds,
        "engine": {"workers": 1},
        "model": {"base_dtype": "bf16", "max_length": setting.max_length},
        "data": {"source": str(source), "max_test": 500},
        "partition": shared,
        "sampling": {"kind": "count", "count": 10},
        "training": training,
        "evaluation": {"every": max(3, setting.rounds // 5), "batch_size": 64},
    }
