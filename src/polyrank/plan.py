"""`polyrank plan`: what each class of devices would do in the first round, before anything is trained.

Bytes are those of really encoded messages, seconds and joules those of the links and modes drawn for the
first round, without what a device computes once and stores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from polyrank.adapter import RankMask, full_mask, restrict, within
from polyrank.allocation import Legend, Uniform
from polyrank.assemble import prepare
from polyrank.clock import Clock, Priced
from polyrank.config import Config
from polyrank.errors import InputError
from polyrank.messages import ClientId, ClientUpdate, TrainTask
from polyrank.round import Federation, drawn_as, make_task
from polyrank.state import ServerState
from polyrank.wire import encode_task, encode_update

_WHY = {
    "uniform": "the same for all",
    "tiers": "rank of its tier",
    "loss_based": "low rank until losses are known",
    "random_slots": "slots drawn at random",
    "progressive_depth": "depth of the first rounds, the same for all",
}
_BOUND = {
    "memory": "memory has no room for one block more",
    "deadline": "one block more would end after {:.2f} s",
    "nothing": "all blocks are done in time",
}


def make_plan(config: Config) -> dict[str, Any]:
    """The plan of the first round as plain numbers.

    Raises: InputError when no fleet is given, or the plan does not fit into a device's memory.
    """
    if config.fleet is None:
        raise InputError("fleet", None, "must be given for a plan, e.g. --set fleet.name=jetson80")
    experiment = prepare(config)
    fed, state = experiment.federation, experiment.start
    fed.engine.close()
    assert fed.clock is not None
    population = list(state.clients)
    masks = fed.allocation.allocate(state, population)
    here = predict(fed, fed.clock, state, masks)
    whole = replace(state, active=full_mask(state.adapter))  # also of slots that voting does not open with
    same = predict(fed, fed.clock, whole, Uniform().allocate(whole, population))
    why, end = reasons(fed, state), fed.clock.end_of([one for one, _, _ in here.values()])
    classes = {}
    for device in dict.fromkeys(map(fed.clock.roster.device_of, population)):
        members = [client for client in population if fed.clock.roster.device_of(client) == device]
        row = _class_row([here[client] for client in members], [why[client] for client in members])
        waits = [max(0.0, end - here[client][0].cost.total_s) for client in members]
        classes[device] = row | {"waiting_s": mean(waits)}
    return {
        "method": config.method,
        "fleet": config.fleet.name,
        "clients": len(population),
        "classes": classes,
        "round": _round_row(list(here.values()), fed.clock),
        "round_if_uniform": _round_row(list(same.values()), fed.clock),
    }


Predicted = tuple[Priced, int, int]
"""A priced session, and its bytes down and up."""


def predict(
    fed: Federation, clock: Clock, state: ServerState, masks: Mapping[ClientId, RankMask]
) -> dict[ClientId, Predicted]:
    """Price every client's first session."""
    found, drawn = {}, drawn_as(fed, state)
    for client, mask in masks.items():
        task = make_task(fed, state, mask, client, drawn)
        down, up = len(encode_task(task)), len(encode_update(_answer(task), task))
        found[client] = clock.price(task, state.clients[client], down, up, steady=True), down, up
    return found


def reasons(fed: Federation, state: ServerState) -> dict[ClientId, str]:
    """Why each client gets what it gets."""
    if not isinstance(fed.allocation, Legend):
        return dict.fromkeys(state.clients, _WHY.get(fed.allocation.kind, fed.allocation.kind))
    choice = fed.allocation.choose(state)
    told = [_BOUND[bound].format(choice.deadline_s) for bound in choice.bound]
    return dict(zip(state.clients, told, strict=True))


def plan_lines(content: Mapping[str, Any]) -> list[str]:
    """The plan for people."""
    lines = [f"{content['method']} on {content['fleet']}, {content['clients']} devices, first round"]
    for device, row in content["classes"].items():
        memory, limit = (f"{row[key] / 1e6:.0f} MB" for key in ("memory_bytes", "limit_bytes"))
        depth = " ".join(f"{count}x{depth}" for depth, count in row["depths"].items())
        lines += [
            "",
            f"{row['count']} x {device}",
            f"  blocks     {depth} (devices x blocks from the output)",
            *(f"  ranks      {' '.join(map(str, ranks))}" for ranks in row["ranks"]),
            f"  seconds    down {row['down_s']:.2f}, compute {row['compute_s']:.2f}, up {row['up_s']:.2f}; "
            f"waiting {row['waiting_s']:.2f} (means), slowest {row['slowest_s']:.2f}",
            f"  memory     {memory} of {limit}",
            f"  energy     {row['energy_j']:.1f} J",
            f"  bytes      {row['bytes_down'] / 1e3:.0f} kB down, {row['bytes_up'] / 1e3:.0f} kB up",
            *(f"  why        {count}: {text}" for text, count in row["why"].items()),
        ]
    return [*lines, "", *map(_round_line, ("round", "round_if_uniform"), (content,) * 2)]


def _round_line(key: str, content: Mapping[str, Any]) -> str:
    row, name = content[key], "this plan" if key == "round" else "all slots everywhere"
    return (
        f"{name:<21} {row['simulated_s']:8.2f} s a round, {row['waiting_s']:.2f} s waiting, "
        f"{row['energy_j']:.0f} J, {row['bytes'] / 1e6:.1f} MB, {row['over_memory']} over their memory"
    )


def _class_row(members: Sequence[Predicted], why: Sequence[str]) -> dict[str, Any]:
    priced = [one for one, _, _ in members]
    costs = [one.cost for one in priced]
    depths = Counter(one.depth for one in priced)
    return {
        "count": len(members),
        "depths": {str(depth): depths[depth] for depth in sorted(depths)},
        "ranks": [list(ranks) for ranks in sorted({tuple(one.ranks) for one in priced})],
        "down_s": mean(one.down_s for one in costs),
        "compute_s": mean(one.compute_s for one in costs),
        "up_s": mean(one.up_s for one in costs),
        "slowest_s": max(one.total_s for one in costs),
        "total_s": mean(one.total_s for one in costs),
        "memory_bytes": max(one.memory_bytes for one in costs),
        "limit_bytes": priced[0].limit_bytes,
        "energy_j": mean(one.energy_j for one in costs),
        "bytes_down": mean(down for _, down, _ in members),
        "bytes_up": mean(up for _, _, up in members),
        "why": dict(Counter(why)),
    }


def _round_row(everybody: Sequence[Predicted], clock: Clock) -> dict[str, Any]:
    """A round that the whole population takes part in."""
    priced = [one for one, _, _ in everybody]
    end = clock.end_of(priced)
    return {
        "simulated_s": end,
        "waiting_s": mean(max(0.0, end - one.cost.total_s) for one in priced),
        "energy_j": sum(one.cost.energy_j for one in priced),
        "bytes": sum(down + up for _, down, up in everybody),
        "over_memory": sum(not one.fits for one in priced),
    }


def _answer(task: TrainTask) -> ClientUpdate:
    """An update of the size that the client's will have."""
    metrics = {"loss": 1.0, "last_loss": 1.0, "steps": 1}
    adapter = restrict(task.adapter, within(task.trained, task.mask))
    votes = None if task.ballot is None or task.ballot.masks else task.trained
    return ClientUpdate(task.round, task.client, task.trained, adapter, task.head, 1, metrics, votes)
