"""Simulated time: what each session would have taken on the client's device, and when a round is over.

Rounds are synchronous. The server waits until all of the cohort, or the share of it that it waits for, have
answered, or until the deadline. Who comes later is dropped: the update is lost, its bytes and joules are not.
Measured seconds (``wall_s``) never enter here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from polyrank.adapter import Adapter, block_numbers
from polyrank.cost import WORD, Cost, Workload, cost, link_seconds, lowest_block, memory_bytes
from polyrank.data.tokens import TextSizes
from polyrank.device import Roster, deal
from polyrank.messages import ClientId, Training, TrainTask
from polyrank.models.shape import ModelShape
from polyrank.schema import Schema
from polyrank.state import Capacity, ClientRecord

_MESSAGE_BYTES, _MODULE_BYTES = 400, 60  # what a message takes besides its numbers (`wire.py`)


class FleetTable(Schema):
    """Which devices the clients are, and how long a round waits for them."""

    name: str = "jetson80"
    """A packaged fleet, or a TOML file."""
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    """Simulated seconds after which late updates are dropped."""
    wait_for: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the cohort that the server waits for: sample more clients than needed and drop the last."""
    ignore_memory: bool = False
    """Run plans that do not fit into a device's memory, e.g. to show what a limit costs."""


@dataclass(frozen=True, slots=True)
class Priced:
    """One simulated session.

    Args:
        depth: blocks that hold a training slot or lie above one, counted from the output.
        ranks: most slots that train in a module of each block, first block first.
        stored: blocks that were taken from a stored prefix.
        limit_bytes: memory that a session may take on this device.
    """

    device: str
    mode: str
    depth: int
    ranks: Sequence[int]
    stored: int
    cost: Cost
    limit_bytes: int

    @property
    def fits(self) -> bool:
        return self.cost.memory_bytes <= self.limit_bytes


@dataclass(frozen=True)
class Clock:
    """Prices sessions.

    Args:
        texts: how much train text each client has.
        stores: whether devices keep what enters their lowest adapted block.
    """

    roster: Roster
    shape: ModelShape
    texts: Mapping[ClientId, TextSizes]
    stores: bool
    deadline_s: float | None = None
    wait_for: float = 1.0

    def price(
        self, task: TrainTask, known: ClientRecord, bytes_down: int, bytes_up: int, steady: bool = False
    ) -> Priced:
        """Simulate the session that a task asks for.

        Args:
            known: what the client has stored.
            steady: leave out what is computed once and stored.
        """
        ranks = {name: int(held.sum()) for name, held in task.trained.items()}
        frozen = {name: int(held.sum()) - ranks[name] for name, held in task.mask.items()}
        work = self._workload(task.client, task.training, ranks, frozen, (bytes_down, bytes_up))
        if not steady and work.skipped and (known.stored != work.skipped or task.folds.adapters):
            work = replace(work, stored_tokens=float(self.texts[task.client].tokens))
        setup = self.roster.setup(task.client, task.round)
        depth = self.shape.blocks - min(lowest_block(work), self.shape.blocks)
        widest = [0] * self.shape.blocks
        for one in self.shape.maps:
            widest[one.block] = max(widest[one.block], ranks.get(one.name, 0))
        spent = cost(work, setup)
        return Priced(setup.device, setup.mode, depth, widest, work.skipped, spent, setup.usable_bytes)

    def register(self, client: ClientId, bank: Adapter, training: Training, frozen: bool = False) -> Capacity:
        """What a device says of itself before the first round: two probes, at one block and at all.

        Args:
            frozen: whether adapters that it does not train travel to it all the same, and run there.
        """
        setup = self.roster.setup(client, 0)
        blocks = block_numbers(bank.modules)
        order = sorted(set(blocks.values()))

        def probe(depth: int) -> Workload:
            held = set(order[len(order) - depth :])
            ranks = {name: f.rank for name, f in bank.modules.items() if blocks[name] in held}
            others = {name: f.rank for name, f in bank.modules.items() if name not in ranks}
            return self._workload(client, training, ranks, others if frozen else {}, (0, 0))

        works = [probe(depth) for depth in range(1, len(order) + 1)]
        spent = [cost(work, setup) for work in (works[0], works[-1])]
        first, last = (one.compute_s for one in spent)
        block_s = (last - first) / (len(works) - 1) if len(works) > 1 else 0.0
        slots = sum(factors.rank for factors in bank.modules.values())
        plain = WORD * self.shape.head_parameters + _MESSAGE_BYTES + _MODULE_BYTES * len(bank.modules)
        fixed_s = sum(link_seconds(plain, plain - _MODULE_BYTES * len(bank.modules), setup))
        bits = 8 * WORD * bank.num_parameters() / slots
        down_s, up_s = bits / setup.down_bit_per_s, bits / setup.up_bit_per_s
        if frozen:
            fixed_s, down_s = fixed_s + slots * down_s, 0.0
        fits = [memory_bytes(work) <= setup.usable_bytes for work in works]
        return Capacity(first - block_s, block_s, fixed_s, down_s + up_s, sum(fits))

    def end_of(self, priced: Sequence[Priced]) -> float:
        """Seconds after which the server goes on with what it has."""
        return round_end([one.cost.total_s for one in priced], self.wait_for, self.deadline_s)

    def _workload(
        self,
        client: ClientId,
        training: Training,
        ranks: Mapping[str, int],
        frozen: Mapping[str, int],
        sizes: tuple[int, int],
    ) -> Workload:
        work = workload(self.shape, self.texts[client], training, ranks, frozen, self.stores)
        return replace(work, bytes_down=sizes[0], bytes_up=sizes[1])


def workload(
    shape: ModelShape,
    texts: TextSizes,
    training: Training,
    ranks: Mapping[str, int],
    frozen: Mapping[str, int],
    stores: bool,
) -> Workload:
    """One session of a client with so much text; nothing is sent.

    Args:
        ranks: slots that train, by module.
        frozen: slots that take part without training, by module.
        stores: whether the device keeps what enters its lowest adapted block.
    """
    steps, seen = session_size(texts.texts, training)
    held = [one.block for one in shape.maps if ranks.get(one.name) or frozen.get(one.name)]
    lowest = min([*held, shape.head_block, shape.blocks - 1])
    skipped = lowest if stores and shape.skips and not training.base_dropout else 0
    return Workload(
        shape,
        ranks,
        steps,
        seen,
        seen * texts.tokens / texts.texts,
        frozen=frozen,
        skipped=skipped,
        optimizer_words=optimizer_words(training),
        factors="both" if training.factors == "alternate" else training.factors,  # resolved within a round
        asked=seen * texts.taught / texts.texts if shape.vocabulary else 0.0,
    )


def make_clock(
    table: FleetTable,
    shape: ModelShape,
    texts: Mapping[ClientId, TextSizes],
    seed: int,
    stores: bool,
) -> Clock:
    """The clock of a run; its arguments are those of `Clock`.

    Raises: InputError when the fleet, one of its devices or a link is unknown.
    """
    roster = deal(table.name, list(texts), seed)
    return Clock(roster, shape, texts, stores, table.deadline_s, table.wait_for)


def optimizer_words(training: Training) -> int:
    """Numbers per trained number besides its value: its gradient, and what the optimiser remembers."""
    return 3 if training.optimizer == "adamw" else 2 if training.momentum else 1


def session_size(texts: int, training: Training) -> tuple[int, int]:
    """Local steps of a client with so many texts, and how many texts pass in them (see `session.batches`)."""
    per_epoch = math.ceil(texts / training.batch_size)
    if training.local_steps is None:
        epochs = training.local_epochs or 1
        return per_epoch * epochs, texts * epochs
    whole, rest = divmod(training.local_steps, per_epoch)
    return training.local_steps, whole * texts + min(rest * training.batch_size, texts)


def round_end(totals: Sequence[float], wait_for: float = 1.0, deadline_s: float | None = None) -> float:
    """When a synchronous round is over: the last that is waited for, or the deadline."""
    wanted = max(1, math.ceil(wait_for * len(totals) - 1e-9))
    end = sorted(totals)[wanted - 1]
    return end if deadline_s is None else min(end, deadline_s)
