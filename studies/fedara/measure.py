"""Step time and memory of one client, measured, at the ranks that a finished FedARA run had in each round.

    python -m studies.fedara.measure RUN

RUN is a run folder with slots.jsonl. Every row is a session of its own in a forked process: the same texts
and steps, with the slots of that round held and the others gone. "All slots" is what the session costs where
slots are masked and nothing is detached. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch

from polyrank.adapter import RankMask, block_numbers, full_mask, num_slots
from polyrank.assemble import Experiment, prepare
from polyrank.config import make_config
from polyrank.round import make_task
from polyrank.session import ClientEnv, train

STEPS, REPEATS = 10, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    given = parser.parse_args()
    config = json.loads((given.run / "config.json").read_text())
    config["training"] |= {"local_steps": STEPS, "local_epochs": None}
    experiment = prepare(make_config(config))
    environment = ClientEnv(experiment.model, environment_tokens(experiment), prefix=experiment.prefix)
    rows = [json.loads(line) for line in (given.run / "slots.jsonl").read_text().splitlines()]
    plans = {f"{row['round'] + 1}": first_slots(experiment, row["slots"]) for row in rows}
    plans = {"all slots": full_mask(experiment.start.adapter), **plans}
    print("| round | slots | modules | lowest block | ms per step | MB above the idle process |")
    print("|---|---|---|---|---|---|")
    for title, mask in plans.items():
        spent = [measured(experiment, environment, mask) for _ in range(REPEATS)]
        held = [name for name, slots in mask.items() if bool(slots.any())]
        lowest = min(block_numbers(held).values())
        step, memory = (median(values) for values in zip(*spent, strict=True))
        print(
            f"| {title} | {num_slots(mask)} | {len(held)} | {lowest} | {step:.1f} | {memory:.1f} |",
            flush=True,
        )


def environment_tokens(experiment: Experiment):  # type: ignore[no-untyped-def]
    """The texts of the client with the most of them."""
    engine = experiment.federation.engine
    name = max(engine.clients(), key=lambda client: client.num_examples).id
    return engine.environments[name].train  # type: ignore[attr-defined]


def first_slots(experiment: Experiment, counts: Mapping[str, int]) -> RankMask:
    """So many slots of each module; which of them does not change what they cost."""
    bank = experiment.start.adapter
    return {name: torch.arange(f.rank) < counts[name] for name, f in bank.modules.items()}


def measured(experiment: Experiment, environment: ClientEnv, mask: RankMask) -> tuple[float, float]:
    """CPU milliseconds of a step and the megabytes that a session adds, in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=session, args=(theirs, experiment, environment, mask)
    )
    process.start()
    found: tuple[float, float] = ours.recv()
    process.join()
    return found


def session(pipe: Connection, experiment: Experiment, environment: ClientEnv, mask: RankMask) -> None:
    """One session, after the same one has filled the prefix cache and warmed up."""
    task = make_task(experiment.federation, experiment.start, mask, "client-00")
    train(task, environment)
    Path("/proc/self/clear_refs").write_text("5")  # forget the most memory so far
    idle, start = peak_megabytes(), time.process_time()
    train(task, environment)
    pipe.send((1e3 * (time.process_time() - start) / STEPS, peak_megabytes() - idle))


def peak_megabytes() -> float:
    """The most memory that this process held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
