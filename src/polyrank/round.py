"""One federated round, state in and state out. READ THIS FIRST.

    sample a cohort -> decide who holds which slots -> send them down -> train on the devices
    -> collect the updates -> aggregate -> next state

A round does no input or output of its own: the engine carries bytes, and the caller writes records.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from polyrank.adapter import (
    Adapter,
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
from polyrank.allocation import Allocation, LossBased
from polyrank.engine.base import Answer, Engine
from polyrank.errors import RunError
from polyrank.messages import (
    MISSING_FOLDS,
    ClientId,
    ClientScores,
    ClientUpdate,
    EvaluateTask,
    Folds,
    Training,
    TrainTask,
)
from polyrank.received import Received, Updates
from polyrank.sampling import Sampling, SecretSampling
from polyrank.seed import seed_for
from polyrank.state import ClientRecord, ServerState
from polyrank.voting import RankShares, Voting, vote_shares
from polyrank.wire import (
    ALL_PARTS,
    WireError,
    decode_scores,
    decode_update,
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
        private: whether what clients say of their data stays out of every record, and a round may be empty.
        validate: loss of one client's model on texts the server keeps, for loss-based allocation.
    """

    engine: Engine
    sampling: Sampling | SecretSampling
    allocation: Allocation
    aggregation: Rule
    training: Training
    rounds: int
    untrained: Untrained = "absent"
    voting: Voting | None = None
    private: bool = False
    validate: Callable[[ServerState, ClientUpdate], float] | None = None


@dataclass(frozen=True, slots=True)
class Learned:
    """What the server notes of an update besides its numbers: slots kept, examples, metrics, votes."""

    mask: RankMask
    num_examples: int
    metrics: Mapping[str, float]
    votes: RankMask | None


@dataclass(frozen=True, slots=True)
class Reply:
    """One client's part in one round, with the bytes that really travelled.

    Args:
        learned: None where there is no usable update; then ``error`` says why.
        counts: whether its update is aggregated; False when it trained only to be scored.
    """

    client: ClientId
    slots: int
    bytes_down: int
    bytes_up: int
    wall_s: float
    learned: Learned | None
    error: str | None
    counts: bool = True


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What one round cost and brought.

    Args:
        active: slots of each module that were in use when the round began.
        budget: slots that voting may keep once it is over; None without voting.
        notes: what the aggregation rule has to say besides.
        private: whether no row may hold what clients said of their data.
    """

    round: int
    learning_rate: float
    aggregation_error: float = 0.0
    replies: Sequence[Reply] = field(default_factory=tuple)
    active: Mapping[ModuleName, int] = field(default_factory=dict)
    budget: int | None = None
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


def federated_round(fed: Federation, state: ServerState) -> tuple[ServerState, RoundRecord]:
    """Run one round.

    Raises: RunError when no client of the cohort gave a usable update.
    """
    population = [client.id for client in fed.engine.clients()]
    cohort = fed.sampling.sample(population, state.seed, state.round)
    everybody = isinstance(fed.allocation, LossBased) and fed.allocation.scores_in(state.round)
    asked = population if everybody else cohort
    plan = fed.allocation.allocate(state, asked)
    drawn = fed.training.factors == "B" and _is_drawn(state)
    received = Received(lambda client: make_task(fed, state, plan[client], client, drawn))
    with contextlib.closing(received):
        replies = collect(fed.engine, asked, received)
        replies = [replace(reply, counts=reply.client in set(cohort)) for reply in replies]
        usable = [reply.client for reply in replies if reply.learned is not None and reply.counts]
        if not usable and not fed.private:
            reasons = "; ".join(f"{reply.client}: {reply.error}" for reply in replies[:3])
            raise RunError(f"round {state.round}: no client gave a usable update ({reasons})")
        training = training_at(fed.training, state.round, fed.rounds)
        merged, error = merge(fed, state, Updates(received, usable), training)
        after = advance(fed, state, merged, replies, received)
    active = {name: int(held.sum()) for name, held in state.active.items()}
    budget = None if fed.voting is None else fed.voting.budget(state.adapter, state.round, fed.rounds)
    return after, RoundRecord(
        state.round, training.learning_rate, error, replies, active, budget, merged.notes, fed.private
    )


def merge(
    fed: Federation, state: ServerState, updates: Sequence[ClientUpdate], training: Training
) -> tuple[Aggregated, float]:
    """The next bank and head, and how far the served update is from the clients' mean."""
    merged = fed.aggregation.aggregate(state, updates)
    adapter = _with_parts(state.adapter, merged.adapter, trained_parts(training))
    merged = replace(merged, adapter=adapter)
    if fed.private:
        return merged, 0.0
    return merged, aggregation_error(state.adapter, merged, updates, fed.untrained == "frozen")


def make_task(
    fed: Federation, state: ServerState, mask: RankMask, client: ClientId, drawn: bool = False
) -> TrainTask:
    """What goes down to one client: its slots, the head, the settings, the folds it has missed.

    Args:
        drawn: whether A is still what it was drawn as, so that its seed can travel in its place.
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
        state.seed if drawn else None,
        None
        if fed.voting is None
        else fed.voting.ballot(state.adapter, state.active, state.round, fed.rounds),
    )


def _is_drawn(state: ServerState) -> bool:
    drawn = fresh_slots(state.adapter, state.seed).modules
    return all(torch.equal(f.A, drawn[name].A) for name, f in state.adapter.modules.items())


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


def collect(engine: Engine, clients: Sequence[ClientId], received: Received) -> list[Reply]:
    """Send every client its task, check and keep every answer; replies stand in the order of the clients."""
    sizes: dict[ClientId, int] = {}

    def requests() -> Iterator[tuple[ClientId, bytes]]:
        for client in clients:
            request = encode_task(received.task(client))
            sizes[client] = len(request)
            yield client, request

    registered = {client.id: client.num_examples for client in engine.clients()}
    replies = {}
    for answer in engine.exchange(requests()):
        task = received.task(answer.client)
        replies[answer.client] = _check(task, sizes[answer.client], answer, registered[answer.client])
        if replies[answer.client].learned is not None and answer.payload is not None:
            received.keep(answer.client, answer.payload)
    return [replies.get(client) or _silent(received.task(client), sizes[client]) for client in clients]


def _check(task: TrainTask, bytes_down: int, answer: Answer, num_examples: int) -> Reply:
    bytes_up, learned, error = len(answer.payload or b""), None, answer.error
    if answer.payload is not None:
        try:
            update = decode_update(answer.payload, task, num_examples)
            learned = Learned(update.mask, update.num_examples, update.metrics, update.votes)
        except WireError as refusal:
            error = f"refused: {refusal}"
    return Reply(task.client, num_slots(task.mask), bytes_down, bytes_up, answer.wall_s, learned, error)


def _silent(task: TrainTask, bytes_down: int) -> Reply:
    return Reply(task.client, num_slots(task.mask), bytes_down, 0, 0.0, None, "no answer")


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
        kept = max((int(held.sum()) for held in reply.learned.mask.values()), default=0)
        pruned = num_slots(reply.learned.mask) < reply.slots
        clients[reply.client] = ClientRecord(
            folds=len(state.folds),
            rank_limit=kept if pruned else known.rank_limit,
            loss=_score(fed, state, received, reply, known.loss),
        )
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
    shares = vote_shares(state.active, [one.mask for one in learned], votes, weights)
    return fed.voting.arbitrate(bank, state.active, shares, state.round, fed.rounds), shares


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


def training_at(training: Training, round_: int, rounds: int) -> Training:
    """The training settings of one round: the learning rate follows its schedule over rounds.

    After ``warmup_rounds`` of linear rise, ``linear`` and ``cosine`` fall from the peak toward
    zero, which they would reach one round after the last.
    """
    warm = training.warmup_rounds
    if round_ < warm:
        factor = (round_ + 1) / (warm + 1)
    else:
        progress = (round_ - warm) / max(1, rounds - warm)
        factor = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }[training.schedule]
    changes: dict[str, object] = {"learning_rate": training.learning_rate * factor}
    if training.factors == "alternate":
        changes["factors"] = "B" if round_ % 2 == 0 else "A"
    return training.model_copy(update=changes)


def evaluate_clients(fed: Federation, state: ServerState, batch_size: int) -> ClientEvaluation:
    """Score the global model on every client's held-out examples; clients that fail are left out."""
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
                scores[answer.client] = decode_scores(answer.payload, task(answer.client))
    ordered = [scores[client.id] for client in fed.engine.clients() if client.id in scores]
    return ClientEvaluation(ordered, sum(down), bytes_up)
