"""legend: how deep each device adapts, and ranks that rise toward the output.

Source: LEGEND (Liu et al., IEEE TMC 2025, arXiv 2412.20004).

    seconds     t_i(k) = f_i + k mu_i + beta_i (slots of the top k blocks)
    ranks       r_l = max(1, round(r_1 + lam (l - 1))), in all close to ``rank_budget``, never falling
    depth       k_i = max{ k <= K_i : t_i(k) <= T }        K_i: what the memory of device i has room for
    choice      over lam and over T among all t_i(k): the least (estimated rounds x slowest t_i) with mean
                waiting <= max_waiting x the slowest and min_holders of every block; ties: more trained slots
    estimates   after each round: f_i and mu_i, and beta_i, move toward what the device took

Use it with ``aggregation.kind = "layer_wise"`` and a ``[fleet]``.

Differs (our reconstruction, for the paper's listing could not be read): the ratio of reported to expected
seconds moves f_i and mu_i together, with rho = 0.8 on the old value; a device reports a first estimate when
it registers; f_i holds all that no depth changes, beta_i counts both directions; rounds are taken to be
proportional to (bank slots / mean trained slots) ^ rounds_power, 0.5; waiting may be at most half of the
slowest; where no choice keeps to the waiting and the holders, both are let go.
With voting the active slots are the ranks: only depths are chosen, and the schedule chosen from what the
devices registered is the bank that voting starts from. ``per_device_ranks`` gives every device a schedule of
its own over its own blocks, with a budget in proportion to its depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from polyrank.adapter import RankMask, block_numbers
from polyrank.messages import ClientId
from polyrank.schema import Schema
from polyrank.state import Capacity, ServerState

Count = Annotated[int, Field(ge=1)]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Choice:
    """Depths and ranks for a population.

    Args:
        ranks: by depth, from 1: slots of a module in each block, first block first; 0 below the depth.
        depth: blocks of each device, counted from the output.
        bound: what keeps each device from one block more: memory, deadline, or nothing.
        deadline_s: T, what the depths were cut to.
        seconds: predicted for each device.
    """

    ranks: Sequence[Sequence[int]]
    depth: Sequence[int]
    bound: Sequence[str]
    deadline_s: float
    seconds: Sequence[float]


class Legend(Schema):
    """Depth by device, and ranks that rise toward the output."""

    kind: Literal["legend"] = "legend"
    rank_budget: Count | None = None
    """Sum of the ranks over the blocks; half of the bank without one."""
    slopes: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.5, 1.0, 2.0)
    """lam, the candidates for how much a block's rank exceeds that of the block below."""
    min_depth: Count = 1
    min_holders: Count = 1
    max_waiting: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Most mean waiting, as a share of the slowest device's time."""
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    """Most predicted seconds of a round, where the least depth of all devices allows it."""
    rounds_power: Annotated[float, Field(ge=0)] = 0.5
    rho: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """How much of an old estimate one round keeps."""
    per_device_ranks: bool = False

    @property
    def max_rank(self) -> None:
        """It follows the bank."""
        return

    def allocate(self, state: ServerState, cohort: Sequence[ClientId]) -> Mapping[ClientId, RankMask]:
        """The top blocks of each device, planned for the whole population."""
        choice = self.choose(state)
        depth = dict(zip(state.clients, choice.depth, strict=True))
        masks = {k: _mask(state, choice.ranks[k - 1]) for k in {depth[client] for client in cohort}}
        return {client: masks[depth[client]] for client in cohort}

    def choose(self, state: ServerState) -> Choice:
        """Ranks and depths for the population, from what the server knows of it.

        Raises: ValueError when a client has no known capacity.
        """
        known = [record.capacity for record in state.clients.values()]
        capacities = [one for one in known if one is not None]
        if len(capacities) < len(known):
            raise ValueError("legend needs the capacity of every client")
        options = [
            (self._score(option, held), option)
            for ranks, held in self._schedules(state)
            for option in options_of(ranks, held, capacities, self.min_depth)
        ]
        if self.deadline_s is not None:
            in_time = [pair for pair in options if pair[1].deadline_s <= self.deadline_s]
            options = in_time or [min(options, key=lambda pair: pair[1].deadline_s)]
        return min(options, key=lambda pair: pair[0])[1]

    def opening(self, state: ServerState) -> RankMask:
        """The slots that are active from the start where devices vote: the schedule over all blocks."""
        return _mask(state, self.choose(state).ranks[-1])

    def learn(self, known: Capacity, depth: int, slots: int, compute_s: float, link_s: float) -> Capacity:
        """What the server expects of a device after it took so long: a moving average of ratios.

        A session without any adapted block (depth 0) tells nothing of what a block takes.
        """
        expected = known.compute_fixed_s + depth * known.block_s
        linked = known.link_fixed_s + slots * known.slot_s
        slower = self.rho + (1 - self.rho) * compute_s / expected if depth else 1.0
        farther = self.rho + (1 - self.rho) * link_s / linked
        return replace(
            known,
            compute_fixed_s=known.compute_fixed_s * slower,
            block_s=known.block_s * slower,
            link_fixed_s=known.link_fixed_s * farther,
            slot_s=known.slot_s * farther,
        )

    def _schedules(self, state: ServerState) -> Iterator[tuple[list[list[int]], Ints]]:
        """Candidates: ranks by depth, and the slots that a device of each depth holds."""
        levels = _levels(state)
        modules = np.bincount(list(levels.values()))
        blocks, most = len(modules), min(factors.rank for factors in state.adapter.modules.values())
        if not all(bool(held.all()) for held in state.active.values()):  # devices vote: that is what there is
            slots = np.zeros(blocks, dtype=np.int64)
            np.add.at(slots, list(levels.values()), [int(held.sum()) for held in state.active.values()])
            yield [_above(blocks, k, [most] * k) for k in range(1, blocks + 1)], slots[::-1].cumsum()
            return
        budget = min(self.rank_budget or -(-blocks * most // 2), blocks * most)
        for slope in self.slopes:
            shared = schedule(blocks, budget, slope, most)
            own = [
                schedule(k, -(-budget * k // blocks), slope, most) if self.per_device_ranks else shared[-k:]
                for k in range(1, blocks + 1)
            ]
            ranks = [_above(blocks, k, each) for k, each in enumerate(own, 1)]
            yield ranks, np.array(ranks) @ modules

    def _score(self, option: Choice, held: Ints) -> tuple[bool, float, float]:
        """Less is better: within the limits, then the time to train, then more slots."""
        slowest, depth = max(option.seconds), np.array(option.depth)
        waiting = slowest - float(np.mean(option.seconds))
        full = len(option.ranks)
        least = int((depth == full).sum())  # the first block has the fewest holders
        trained = max(1.0, float(held[depth - 1].mean()))
        breaks = waiting > self.max_waiting * slowest or least < self.min_holders
        return breaks, float(f"{slowest * trained**-self.rounds_power:.9g}"), -trained


def schedule(blocks: int, budget: int, slope: float, most: int) -> list[int]:
    """Ranks that rise by ``slope`` from block to block, between 1 and ``most``, in all as close to the
    budget as the best first rank comes; of two as close, the smaller."""
    steps = slope * np.arange(blocks)

    def ranks(first: float) -> list[int]:
        return [min(most, max(1, int(np.floor(first + step + 0.5)))) for step in steps]

    firsts = np.arange(-slope * blocks, most + 0.5, 0.25)
    return min((ranks(first) for first in firsts), key=lambda found: (abs(sum(found) - budget), sum(found)))


def options_of(
    ranks: Sequence[Sequence[int]], held: Ints, capacities: Sequence[Capacity], min_depth: int
) -> Iterator[Choice]:
    """The depths at every deadline worth a look.

    Args:
        held: slots of a device of each depth, from 1.
    """
    full = len(ranks)
    times = np.array([[c.seconds(k, int(held[k - 1])) for k in range(1, full + 1)] for c in capacities])
    room = np.array([max(1, min(c.max_depth, full)) for c in capacities])
    least = np.minimum(min_depth, room)
    rows = np.arange(len(capacities))
    earliest = times[rows, least - 1].max()
    allowed = times[np.arange(1, full + 1)[None, :] <= room[:, None]]
    for deadline in np.unique(allowed[allowed >= earliest]):
        depth = deepest(times, room, float(deadline))
        bound = [
            "nothing" if k == full else "memory" if k == most else "deadline"
            for k, most in zip(depth.tolist(), room.tolist(), strict=True)
        ]
        seconds = times[rows, depth - 1].tolist()
        yield Choice(ranks, depth.tolist(), bound, float(deadline), seconds)


def deepest(times: Floats, room: Ints, deadline_s: float) -> Ints:
    """The deepest that each device can go by the deadline, 0 where it cannot.

    Args:
        times: seconds of each device at each depth, from 1.
        room: blocks that its memory holds.
    """
    depths = np.arange(1, times.shape[1] + 1)[None, :]
    possible = (times <= deadline_s) & (depths <= room[:, None])
    found: Ints = (possible * depths).max(axis=1)
    return found


def _levels(state: ServerState) -> dict[str, int]:
    """Place of each module's block among the adapted blocks, from 0."""
    blocks = block_numbers(state.adapter.modules)
    order = sorted(set(blocks.values()))
    return {name: order.index(block) for name, block in blocks.items()}


def _above(blocks: int, depth: int, ranks: Sequence[int]) -> list[int]:
    """Ranks of the top blocks, with 0 for those below."""
    return [0] * (blocks - depth) + list(ranks)


def _mask(state: ServerState, ranks: Sequence[int]) -> RankMask:
    """The first active slots of every module, as many as its block gets."""
    levels = _levels(state)
    return {
        name: held & (held.cumsum(0) <= ranks[levels[name]])
        if ranks[levels[name]]
        else torch.zeros_like(held)
        for name, held in state.active.items()
    }
