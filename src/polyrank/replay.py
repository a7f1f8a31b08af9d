"""What a finished run would have taken on a fleet of devices, from its folder alone.

The rows of the run say how many slots each client trained and how many bytes travelled; its config says on
which texts. So energy and time by kind of device can be told of runs that simulated none, or others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from polyrank.adapter import Adapter, RankMask, num_slots
from polyrank.aggregation import FOLDING
from polyrank.allocation import ProgressiveDepth, Tiers, Uniform
from polyrank.assemble import prepare
from polyrank.clock import FleetTable
from polyrank.config import make_config
from polyrank.errors import InputError
from polyrank.ledger import RunFolder, simulated_row
from polyrank.round import Federation, make_task
from polyrank.state import ServerState

Row = dict[str, Any]


def replay(run: Path, fleet: FleetTable) -> list[Row]:
    """A row per client and round: the client, the bytes, and the table ``simulated`` as a run writes it.

    Raises:
        InputError: no finished run, a policy whose slots cannot be told from the rows, or an unknown fleet.
    """
    folder = RunFolder(run)
    given = folder.read("config.json")
    if given["engine"]["kind"] == "flare":
        raise InputError("RUN", str(run), "ran over a network: its texts are at the sites")
    table = fleet.model_copy(update={"ignore_memory": True})  # it ran, after all
    changes = {"fleet": table.model_dump(), "engine": {**given["engine"], "workers": 1}}
    config = make_config({**given, **changes})
    policy = config.allocation
    voted_on = config.voting is not None and not (isinstance(policy, Uniform) and policy.rank is None)
    if voted_on or not isinstance(policy, Uniform | Tiers | ProgressiveDepth):
        allowed = f"cannot be replayed: allocation.kind = {policy.kind!r} depends on more than its rows tell"
        raise InputError("RUN", str(run), allowed)
    experiment = prepare(config)
    return list(_priced(experiment.federation, experiment.start, folder))


def _priced(fed: Federation, state: ServerState, folder: RunFolder) -> Iterator[Row]:
    clock, records = fed.clock, dict(state.clients)
    assert clock is not None
    actives = {row["round"]: row["slots"] for row in folder.read_rows("slots.jsonl")}
    folds = state.folds
    for round_, here in groupby(folder.read_rows("clients.jsonl"), key=lambda row: row["round"]):
        rows = list(here)
        active = _active(state, actives.get(round_))
        now = replace(state, round=round_, active=active, clients=records, folds=folds)
        masks = fed.allocation.allocate(now, [row["client"] for row in rows])
        priced = []
        for row in rows:
            client, mask = row["client"], masks[row["client"]]
            known = records[client]
            task = make_task(fed, now, mask, client)
            if num_slots(task.mask) != row["slots"]:
                allowed = f"cannot be replayed: {client} held {row['slots']} slots in round {round_}"
                raise InputError("RUN", str(folder.path), allowed)
            priced.append(clock.price(task, known, row["bytes_down"], row["bytes_up"]))
            stored = priced[-1].stored or known.stored
            records[client] = replace(known, stored=stored, folds=len(folds))
        if isinstance(fed.aggregation, FOLDING):  # what it was does not matter: any spoils a stored prefix
            folds = [*folds, Adapter("lora", {})]
        end = clock.end_of(priced)
        for row, one in zip(rows, priced, strict=True):
            shared = {key: row[key] for key in ("round", "client", "bytes_down", "bytes_up")}
            yield shared | {"simulated": simulated_row(one, end)}


def _active(state: ServerState, counts: Mapping[str, int] | None) -> RankMask:
    """A set of active slots of these sizes: which ones they were costs the same."""
    if counts is None:
        return state.active
    return {name: torch.arange(held.numel()) < counts[name] for name, held in state.active.items()}


def by_device(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Means per session of each kind of device, and its joules over the whole run."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["simulated"]["device"], []).append(row["simulated"])
    return {
        device: {
            "sessions": len(sessions),
            "energy_j": sum(one["energy_j"] for one in sessions),
            **{
                key: mean(one[key] for one in sessions)
                for key in ("total_s", "compute_s", "waiting_s", "depth")
            },
            "peak_memory_bytes": max(one["memory_bytes"] for one in sessions),
        }
        for device, sessions in sorted(found.items())
    }
