"""Peak memory of one round with few and with many clients: the cohort is the whole population.

    python benchmarks/memory.py --few 10 --many 1000 [--out DATED.json]

Every client takes one step on one short text with a rank-8 adapter on q, k, v of MiniLM, in one process. Each
size runs in a process of its own; its largest resident size is printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--few", type=int, default=10)
    parser.add_argument("--many", type=int, default=1_000)
    parser.add_argument("--only", type=int, default=None, help="run one size here and print its peak in MiB")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    if given.only is not None:
        print(peak_mib(given.only))
        return
    few, many = (measured(count) for count in (given.few, given.many))
    print(f"{given.few} clients: {few:.0f} MiB; {given.many} clients: {many:.0f} MiB; ratio {many / few:.3f}")
    if given.out is not None:
        ratios = {f"peak memory, {given.many} clients against {given.few}": many / few}
        rows = {"few_mib": few, "many_mib": many}
        content = {"date": str(datetime.date.today()), "ratios": ratios, **rows}
        given.out.write_text(json.dumps(content, indent=2) + "\n")


def measured(count: int) -> float:
    """The peak of a process of its own."""
    command = [sys.executable, __file__, "--only", str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_mib(count: int) -> float:
    """Largest resident size of this process after one round of ``count`` clients."""
    from polyrank.adapter import full_mask, new_adapter
    from polyrank.aggregation import ReplicationPadding
    from polyrank.allocation import Uniform
    from polyrank.data.tokens import Tokens
    from polyrank.engine.embedded import EmbeddedEngine
    from polyrank.messages import Training
    from polyrank.models.load import load_base, read_head
    from polyrank.models.targets import resolve_targets
    from polyrank.round import Federation, federated_round
    from polyrank.sampling import SampleAll
    from polyrank.session import ClientEnv
    from polyrank.state import ClientRecord, ServerState

    torch.set_num_threads(1)
    model = load_base("minilm", ["a", "b"], 0, torch.device("cpu"))
    shapes = resolve_targets(model.network, model.blocks, "attention")
    adapter = new_adapter(shapes, form="lora", rank=8, scale=2.0, seed=0)
    draw = np.random.default_rng(0)

    def client() -> ClientEnv:
        ids = draw.integers(1_000, 20_000, 8).astype(np.int32)
        return ClientEnv(model, Tokens(ids, None, np.array([0, 8]), draw.integers(0, 2, 1), 0))

    environments = {f"c{number}": client() for number in range(count)}
    fed = Federation(
        engine=EmbeddedEngine(environments, fuse=8),
        sampling=SampleAll(),
        allocation=Uniform(),
        aggregation=ReplicationPadding(),
        training=Training(local_steps=1),
        rounds=1,
    )
    records = {name: ClientRecord() for name in environments}
    federated_round(fed, ServerState(0, 0, adapter, full_mask(adapter), read_head(model), records))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
