"""One federated round, state in and state out. READ THIS FIRST.

    sample a cohort -> decide who holds which slots -> send them down -> train on the devices
    -> collect the updates -> aggregate -> next state

A round does no input or output of its own: the engine carries bytes, `collect.py` asks until enough answers
are good, and the caller writes records.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from polyrank.adapter import (
    Adapter,
    Draw,
    ModuleName,
    RankMask,
    fresh_slots,
    mask_and,
    num_slots,
    prefix_mask,
    restrict,
)
from polyrank.aggregation import Aggregated, Rule
from polyrank.aggregation.error import aggregation_error
from polyrank.aggregation.product import rebalanced
from polyrank.allocation import Allocation, Legend, LossBased
from polyrank.clock import Clock
from polyrank.collect import Failures, Learned, Reply, collect, collect_quorum
from polyrank.engine.base import Engine
from polyrank.errors import RunError
from polyrank.gate import decode_scores
from polyrank.messages import (
    MISSING_FOLDS,
    ClientId,
    ClientScores,
    ClientUpdate,
    EvaluateTask,
    Folds,
    Training,
    TrainTask,
    training_at,
)
from polyrank.received import Received, Updates
from polyrank.sampling import Sampling, SecretSampling, spare_clients, with_work
from polyrank.seed import seed_for
from polyrank.state import ClientRecord, ServerState, version
from polyrank.voting import RankShares, Voting, last_known, vote_shares
from polyrank.wire import (
    ALL_PARTS,
    WireError,
    encode_task,
    trained_parts,
)

Untrained = Literal["absent", "frozen"]


@dataclass(frozen=True)
class Federation:
    """What stays the same over all rounds: who takes part, and the rules of the run.

    Args:
        untrained: whether a client also holds, frozen, the active slots that it does not train.
        voting: how clients and server shrink the set of active slots; None keeps all.
        failures: what a round does about clients that fail.
        private: whether what clients say of their data stays out of every record, and a round may be empty.
        validate: loss of one client's model on texts the server keeps, for loss-based allocation.
        clock: what every session would take on the client's device; None simulates no devices.
    """

    engine: Engine
    sampling: Sampling | SecretSampling
    allocation: Allocation
    aggregation: Rule
    training: Training
    rounds: int
    untrained: Untrained = "absent"
    voting: Voting | None = None
    failures: Failures = field(default_factory=Failures)
    private: bool = False
    validate: Callable[[ServerState, ClientUpdate], float] | None = None
    clock: Clock | None = None


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What one round cost and brought.

    Args:
        active: slots of each module that were in use when the round began.
        budget: slots that voting may keep once it is over; None without voting.
        simulated_s: when the server went on, on simulated devices.
        notes: what the aggregation rule has to say besides.
        private: whether no row may hold what clients said of their data.
    """

    round: int
    learning_rate: float
    aggregation_error: float = 0.0
    replies: Sequence[Reply] = field(default_factory=tuple)
    active: Mapping[ModuleName, int] = field(default_factory=dict)
    budget: int | None = None
    simulated_s: float | None = None
    notes: Mapping[str, float] = field(default_factory=dict)
    private: bool = False

    @property
    def learned(self) -> list[Learned]:
        """What was noted of the updates that were aggregated."""
        return [r.learned for r in self.replies if r.learned is not None and r.counts]

    @property
    def train_loss(self) -> float:
        """Mean training loss over the cohort, weighted by examples."""
        total = sum(one.num_examples for one in self.learned)
        return sum(one.metrics["loss"] * one.num_examples for one in self.learned) / total


@dataclass(frozen=True, slots=True)
class ClientEvaluation:
    """Every client's scores, and the bytes that asking for them took."""

    scores: Sequence[ClientScores]
    bytes_down: int
    bytes_up: int


def federated_round(
    fed: Federation, state: ServerState, journal: Path | None = None
) -> tuple[ServerState, RoundRecord]:
    """Run one round.

    Args:
        journal: where updates are kept as they come; a round that is run again goes on with them.

    Raises: RunError when too few clients of the cohort gave a usable update.
    """
    population = [client.id for client in fed.engine.clients()]
    cohort = fed.sampling.sample(population, state.seed, state.round)
    everybody = isinstance(fed.allocation, LossBased) and fed.allocation.scores_in(state.round)
    first_wave = population if everybody else cohort
    spares = spare_clients(population, state.seed, state.round)
    plan = dict(fed.allocation.allocate(state, first_wave))

    def slots(client: ClientId) -> RankMask:
        if client not in plan:  # it replaces another
            plan.update(fed.allocation.allocate(state, [client]))
        return plan[client]

    def works(client: ClientId) -> bool:
        return bool(state.head) or num_slots(slots(client)) > 0

    drawn, base = drawn_as(fed, state), version(state)

    def task(client: ClientId) -> TrainTask:
        asked = replace(make_task(fed, state, slots(client), client, drawn), base=base)
        if received.attempts.get(client, 0) > 0:  # it may have failed because it lost its folds
            asked = replace(asked, folds=Folds(0, state.folds))
        return asked

    with contextlib.closing(Received(task, journal)) as received:
        try:
            if fed.voting is not None and not everybody:  # votes may have left a client nothing to train
                if not state.head:  # all at once: LEGEND plans for the whole population anyway
                    plan |= fed.allocation.allocate(state, [one for one in spares if one not in plan])
                first_wave = cohort = with_work(cohort, spares, works)
                spares = [client for client in spares if works(client)]
            if fed.private:  # a cohort is who was drawn: to replace one that failed would tell of the data
                replies = collect(fed.engine, cohort, received)
            else:
                replies = collect_quorum(fed.engine, fed.failures, first_wave, cohort, spares, received)
        except RunError as error:
            raise RunError(f"round {state.round}: {error}") from error
        replies, simulated_s = timed(fed, state, replies, received)
        usable = [reply.client for reply in replies if reply.learned is not None and reply.counts]
        training = training_at(fed.training, state.round, fed.rounds)
        merged, apart = merge(fed, state, Updates(received, usable), training)
        after = advance(fed, state, merged, replies, received)
    active = {name: int(held.sum()) for name, held in state.active.items()}
    budget = None if fed.voting is None else fed.voting.budget(state.adapter, state.round, fed.rounds)
    rate, notes = training.learning_rate, merged.notes
    return after, RoundRecord(
        state.round, rate, apart, replies, active, budget, simulated_s, notes, fed.private
    )


def merge(
    fed: Federation, state: ServerState, updates: Sequence[ClientUpdate], training: Training
) -> tuple[Aggregated, float]:
    """The next bank and head, and how far the served update is from the clients' mean."""
    merged = fed.aggregation.aggregate(state, updates)
    adapter = _with_parts(state.adapter, merged.adapter, trained_parts(training))
    if state.round + 1 == fed.training.sparse_rounds:
        adapter = rebalanced(adapter)
    merged = replace(merged, adapter=adapter)
    if fed.private:
        return merged, 0.0
    frozen = fed.untrained == "frozen"
    return merged, aggregation_error(state.adapter, state.active, merged, updates, frozen)


def make_task(
    fed: Federation, state: ServerState, mask: RankMask, client: ClientId, drawn: Draw | None = None
) -> TrainTask:
    """What goes down to one client: its slots, the head, the settings, the folds it has missed.

    Args:
        drawn: what A can be drawn from again, so that this travels in its place.
    """
    known = state.clients.get(client, ClientRecord())
    if known.rank_limit is not None:
        mask = mask_and(mask, prefix_mask(state.adapter, known.rank_limit))
    held = state.active if fed.untrained == "frozen" else mask
    return TrainTask(
        state.round,
        client,
        seed_for(state.seed, "train", state.round, client),
        held,
        mask,
        restrict(state.adapter, held),
        state.head,
        training_at(fed.training, state.round, fed.rounds),
        _missed(state, client),
        drawn,
        None if fed.voting is None else fed.voting.ballot(state, mask, fed.rounds),
    )


def drawn_as(fed: Federation, state: ServerState) -> Draw | None:
    """What all A can still be drawn from, where this round trains B alone."""
    training = fed.training
    if training_at(training, state.round, fed.rounds).factors != "B" or training.factors == "alternate":
        return None
    draw = Draw(state.seed, columns=training.sparse_rounds > 0)
    drawn = fresh_slots(state.adapter, draw).modules
    same = all(torch.equal(f.A, drawn[name].A) for name, f in state.adapter.modules.items())
    return draw if same else None


def _with_parts(old: Adapter, new: Adapter, parts: frozenset[str]) -> Adapter:
    """The new bank, with the old values of the factors that nobody trained: a mean may not move them."""
    if parts == ALL_PARTS:
        return new
    modules = {}
    for name, factors in new.modules.items():
        kept = {part: t for part, t in old.modules[name].tensors().items() if part not in parts}
        modules[name] = factors.with_tensors({**factors.tensors(), **kept})
    return Adapter(new.form, modules)


def _missed(state: ServerState, client: ClientId) -> Folds:
    """The folds that a client has not received yet."""
    first = state.clients.get(client, ClientRecord()).folds
    return Folds(first, state.folds[first:])


def timed(
    fed: Federation, state: ServerState, replies: Sequence[Reply], received: Received
) -> tuple[list[Reply], float | None]:
    """The replies with what they cost on simulated devices, and when the server went on without the late.

    Raises: RunError when all came late.
    """
    if fed.clock is None:
        return list(replies), None
    clock, found = fed.clock, list(replies)
    for place, reply in enumerate(replies):
        if reply.client in received.attempts:
            task, known = received.task(reply.client), state.clients.get(reply.client, ClientRecord())
            priced = clock.price(task, known, reply.bytes_down, reply.bytes_up)
            found[place] = replace(reply, priced=priced)
    end = clock.end_of([reply.priced for reply in found if reply.priced is not None])
    for place, reply in enumerate(found):
        if reply.priced is not None and reply.priced.cost.total_s > end:
            found[place] = replace(reply, counts=False, error=reply.error or "late")
    if not any(reply.learned is not None and reply.counts for reply in found):
        raise RunError(f"round {state.round}: no update came within {end:.1f} simulated seconds")
    return found, end


def advance(
    fed: Federation, state: ServerState, merged: Aggregated, replies: Sequence[Reply], received: Received
) -> ServerState:
    """The state of the next round, with what was learned about each client that answered."""
    clients = dict(state.clients)
    for reply in replies:
        known = clients.get(reply.client, ClientRecord())
        if reply.learned is None:
            if reply.error is not None and reply.error.startswith(MISSING_FOLDS):
                clients[reply.client] = replace(known, folds=0)  # send them all again
            continue
        clients[reply.client] = known = replace(_observed(fed, known, reply), folds=len(state.folds))
        if reply.error is not None:
            continue  # late: what it learned is lost
        loss = _score(fed, state, received, reply, known.loss)
        limit = _rank_limit(fed, received, reply, known.rank_limit)
        clients[reply.client] = replace(known, rank_limit=limit, loss=loss)
    folds = [*state.folds, merged.fold] if merged.fold is not None else state.folds
    active, shares = _vote(fed, state, merged.adapter, replies)
    return replace(
        state,
        round=state.round + 1,
        active=active,
        shares=shares,
        adapter=merged.adapter,
        head=merged.head,
        clients=clients,
        folds=folds,
    )


def _observed(fed: Federation, known: ClientRecord, reply: Reply) -> ClientRecord:
    """What a session's simulated seconds tell of the device, and what it stored."""
    if reply.priced is None:
        return known
    capacity, spent = known.capacity, reply.priced.cost
    if isinstance(fed.allocation, Legend) and capacity is not None:
        compute_s, link_s = spent.forward_s + spent.backward_s, spent.down_s + spent.up_s
        assert reply.learned is not None
        trained = num_slots(reply.learned.mask)  # a client may hold others besides
        capacity = fed.allocation.learn(capacity, reply.priced.depth, trained, compute_s, link_s)
    return replace(known, capacity=capacity, stored=reply.priced.stored or known.stored)


def _vote(
    fed: Federation, state: ServerState, bank: Adapter, replies: Sequence[Reply]
) -> tuple[RankMask, RankShares]:
    """The slots that stay active after this round's votes, and the share of votes of each."""
    learned = [
        r.learned for r in replies if r.learned is not None and r.learned.votes is not None and r.counts
    ]
    if fed.voting is None or not learned:
        return state.active, state.shares
    votes = [one.votes for one in learned if one.votes is not None]
    weights = [float(one.num_examples) for one in learned]
    now = vote_shares(state.active, [one.mask for one in learned], votes, weights)
    shares = last_known(now, state.shares)
    return fed.voting.arbitrate(bank, state.active, shares, state.round, fed.rounds), shares


def _rank_limit(fed: Federation, received: Received, reply: Reply, known: int | None) -> int | None:
    """The most slots of a module that a client keeps, once it has pruned some of those it trained."""
    if fed.training.prune_keep is None or reply.learned is None:
        return known
    if num_slots(reply.learned.mask) == num_slots(received.task(reply.client).trained):
        return known
    return max((int(held.sum()) for held in reply.learned.mask.values()), default=0)


def _score(
    fed: Federation, state: ServerState, received: Received, reply: Reply, known: float | None
) -> float | None:
    """The loss that loss-based allocation goes by; other policies look at none."""
    if not isinstance(fed.allocation, LossBased) or not fed.allocation.scores_in(state.round):
        return known
    if fed.allocation.score == "client":
        assert reply.learned is not None
        return reply.learned.metrics["loss"]
    assert fed.validate is not None, "server-side scores need texts the server keeps"
    return fed.validate(state, received.read(reply.client))


def evaluate_clients(
    fed: Federation, state: ServerState, batch_size: int, names: Set[str]
) -> ClientEvaluation:
    """Score the global model on every client's held-out examples; clients that fail are left out.

    Args:
        names: of the scores that every client has to give.
    """
    adapter = restrict(state.adapter, state.active)
    down: list[int] = []

    def task(client: ClientId) -> EvaluateTask:
        folds = _missed(state, client)
        return EvaluateTask(state.round, client, state.active, adapter, state.head, batch_size, folds)

    def requests() -> Iterator[tuple[ClientId, bytes]]:
        for client in fed.engine.clients():
            request = encode_task(task(client.id))
            down.append(len(request))
            yield client.id, request

    scores, bytes_up = {}, 0
    for answer in fed.engine.exchange(requests()):
        bytes_up += len(answer.payload or b"")
        if answer.payload is not None:
            with contextlib.suppress(WireError):
                scores[answer.client] = decode_scores(answer.payload, task(answer.client), names)
    ordered = [scores[client.id] for client in fed.engine.clients() if client.id in scores]
    return ClientEvaluation(ordered, sum(down), bytes_up)
