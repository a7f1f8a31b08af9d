"""Is a predicted training step a measured one? Time and memory over depth, rank and the stored prefix.

    python -m benchmarks.devices [--out DATED.json] [--passes 4]

The machine is calibrated on 13 kinds of step (`polyrank.calibrate.CALIBRATION`) and predicts the others:
depth 1 to 6 with ranks 2, 8 and 32, and the top 1, 2, 3 and 6 blocks with the prefix below them stored. All
kinds are measured in turn, pass after pass, and the least CPU time of each counts. One thread, MiniLM.
Memory is what tensors take: the weights once, and the most that lived at one time in a session.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.peers import machine
from polyrank.calibrate import CALIBRATION, Step, demand_of, fit, seconds, session_of, workload_of
from polyrank.cost import memory_bytes
from polyrank.ledger import versions
from polyrank.models.load import BaseModel, load_base
from polyrank.models.prefix import PrefixCache, can_skip
from polyrank.models.shape import shape_of
from polyrank.session import train

STEPS = 4
GRID = tuple(Step(depth, rank) for depth in range(1, 7) for rank in (2, 8, 32))
STORED = tuple(Step(depth, 8, stored=True) for depth in (1, 2, 3, 6))


class Living(TorchDispatchMode):
    """The most bytes of tensors that lived at one time, of those made under this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {tensor.untyped_storage()._cdata for tensor in dense((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in dense(found)):
            if storage._cdata not in inputs:
                self.known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.known = {key: entry for key, entry in self.known.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.known.values()))
        return found


def dense(values: Any) -> list[torch.Tensor]:
    """The tensors with a storage of their own: weights that oneDNN packed have none."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [tensor for tensor in tensors if tensor.layout == torch.strided]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--passes", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = load_base("minilm", ["no", "yes"], 0, torch.device("cpu"))
    model = replace(model, skips=can_skip(model))
    kinds = list(dict.fromkeys([*CALIBRATION, *GRID, *STORED]))
    memory = {step: None if step.stored else memory_of(model, step) for step in kinds}
    with tempfile.TemporaryDirectory() as folder:
        least = measured(model, PrefixCache(Path(folder), 10**9), kinds, given.passes)
    rows = [{"step": asdict(step), "measured_s": least[step], "memory": memory[step]} for step in kinds]
    content = table(model, rows)
    if given.out is not None:
        facts = {"date": str(datetime.date.today()), "versions": versions(), "machine": machine()}
        given.out.write_text(json.dumps({**facts, **content}, indent=2) + "\n")


def measured(model: BaseModel, cache: PrefixCache, kinds: list[Step], passes: int) -> dict[Step, float]:
    """The least seconds of a step of every kind."""
    sessions = {step: session_of(model, step, cache, STEPS) for step in kinds}
    for session in sessions.values():
        train(*session)
    least = dict.fromkeys(kinds, float("inf"))
    for _ in range(passes):
        for step, session in sessions.items():
            least[step] = min(least[step], seconds(*session) / STEPS)
    return least


def memory_of(model: BaseModel, step: Step) -> int:
    """Bytes of the weights and of all that lives beside them at the worst moment of a session."""
    task, env = session_of(model, step, None, 2)
    living = Living()
    with living:
        train(task, env)
    return living.peak + sum(p.numel() * p.element_size() for p in model.network.parameters())


def table(model: BaseModel, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Print predictions beside measurements; the rates are fitted to the calibration steps alone."""
    shape = shape_of(model)
    works = [workload_of(model, shape, Step(**row["step"])) for row in rows]
    demands = [demand_of(work) for work in works]
    fitted = [index for index, row in enumerate(rows) if Step(**row["step"]) in CALIBRATION]
    rates = fit([demands[i] for i in fitted], [rows[i]["measured_s"] for i in fitted])
    print("| depth | rank | batch x length | stored | fitted | ms | predicted | off | MB | predicted | off |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for index, (row, work, demand) in enumerate(zip(rows, works, demands, strict=True)):
        step = Step(**row["step"])
        row["fitted"] = index in fitted
        row["predicted_s"] = (
            demand.flop / rates[0] + demand.moved_bytes / rates[1] + demand.operations * rates[2]
        )
        row["off"] = row["predicted_s"] / row["measured_s"] - 1
        told = "| | | |"
        if row["memory"] is not None:
            row["predicted_bytes"] = memory_bytes(work)
            row["memory_off"] = row["predicted_bytes"] / row["memory"] - 1
            size, guess = row["memory"] / 1e6, row["predicted_bytes"] / 1e6
            told = f"| {size:.0f} | {guess:.0f} | {row['memory_off']:+.1%} |"
        print(
            f"| {step.depth} | {step.rank} | {step.batch} x {step.length} | {'yes' if step.stored else ''} "
            f"| {'yes' if row['fitted'] else ''} | {1e3 * row['measured_s']:.1f} "
            f"| {1e3 * row['predicted_s']:.1f} | {row['off']:+.1%} {told}"
        )
    others = [abs(row["off"]) for row in rows if not row["fitted"]]
    sizes = [abs(row["memory_off"]) for row in rows if row["memory"] is not None]
    print(f"time: worst {max(others):.1%} over {len(others)} kinds it was not fitted to")
    print(f"memory: worst {max(sizes):.1%}")
    return {"rates": dict(zip(("flop_per_s", "bytes_per_s", "launch_s"), rates, strict=True)), "rows": rows}


if __name__ == "__main__":
    main()
