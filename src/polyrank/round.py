"""One federated round, state in and state out. READ THIS FIRST.

    sample a cohort -> decide who holds which slots -> send them down -> train on the devices
    -> collect the updates -> aggregate -> next state

A round does no input or output of its own: the engine carries bytes, and the caller writes records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from polyrank.adapter import RankMask, num_slots, restrict
from polyrank.aggregation import Aggregated, Aggregation
from polyrank.allocation import Allocation
from polyrank.engine.base import Answer, Engine
from polyrank.errors import RunError
from polyrank.messages import (
    ClientId,
    ClientScores,
    ClientUpdate,
    EvaluateTask,
    Training,
    TrainTask,
)
from polyrank.sampling import Sampling
from polyrank.seed import seed_for
from polyrank.state import ServerState
from polyrank.wire import WireError, decode_scores, decode_update, encode_task


@dataclass(frozen=True)
class Federation:
    """What stays the same over all rounds: who takes part, and the rules of the run."""

    engine: Engine
    sampling: Sampling
    allocation: Allocation
    aggregation: Aggregation
    training: Training
    rounds: int


@dataclass(frozen=True, slots=True)
class Reply:
    """One client's part in one round, with the bytes that really travelled."""

    client: ClientId
    slots: int
    bytes_down: int
    bytes_up: int
    wall_s: float
    update: ClientUpdate | None
    error: str | None


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What one round cost and brought."""

    round: int
    learning_rate: float
    replies: Sequence[Reply] = field(default_factory=tuple)

    @property
    def updates(self) -> list[ClientUpdate]:
        return [reply.update for reply in self.replies if reply.update is not None]

    @property
    def train_loss(self) -> float:
        """Mean training loss over the cohort, weighted by examples."""
        total = sum(update.num_examples for update in self.updates)
        return sum(u.metrics["loss"] * u.num_examples for u in self.updates) / total


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
    plan = fed.allocation.allocate(state, cohort)
    training = training_at(fed.training, state.round, fed.rounds)
    tasks = [make_task(state, plan[client], client, training) for client in cohort]
    record = RoundRecord(state.round, training.learning_rate, run_tasks(fed.engine, tasks))
    if not record.updates:
        reasons = "; ".join(f"{reply.client}: {reply.error}" for reply in record.replies[:3])
        raise RunError(f"round {state.round}: no client gave a usable update ({reasons})")
    merged = fed.aggregation.aggregate(state, record.updates)
    return advance(state, merged), record


def make_task(state: ServerState, mask: RankMask, client: ClientId, training: Training) -> TrainTask:
    """What goes down to one client: its slots, the head, the settings, its seed of this round."""
    seed = seed_for(state.seed, "train", state.round, client)
    adapter = restrict(state.adapter, mask)
    return TrainTask(state.round, client, seed, mask, adapter, state.head, training)


def run_tasks(engine: Engine, tasks: Sequence[TrainTask]) -> list[Reply]:
    """Send every task, check every answer; replies stand in the order of the tasks."""
    requests = {task.client: encode_task(task) for task in tasks}
    answers = {answer.client: answer for answer in engine.exchange(requests)}
    return [_reply(task, len(requests[task.client]), answers.get(task.client)) for task in tasks]


def _reply(task: TrainTask, bytes_down: int, answer: Answer | None) -> Reply:
    slots = num_slots(task.mask)
    if answer is None:
        return Reply(task.client, slots, bytes_down, 0, 0.0, None, "no answer")
    bytes_up, update, error = len(answer.payload or b""), None, answer.error
    if answer.payload is not None:
        try:
            update = decode_update(answer.payload, task)
        except WireError as refusal:
            error = f"refused: {refusal}"
    return Reply(task.client, slots, bytes_down, bytes_up, answer.wall_s, update, error)


def advance(state: ServerState, merged: Aggregated) -> ServerState:
    """The state of the next round."""
    return replace(state, round=state.round + 1, adapter=merged.adapter, head=merged.head)


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
    return training.model_copy(update={"learning_rate": training.learning_rate * factor})


def evaluate_clients(fed: Federation, state: ServerState, batch_size: int) -> ClientEvaluation:
    """Score the global model on every client's held-out examples; clients that fail are left out."""
    adapter = restrict(state.adapter, state.active)
    tasks = {
        client.id: EvaluateTask(state.round, client.id, state.active, adapter, state.head, batch_size)
        for client in fed.engine.clients()
    }
    requests = {client: encode_task(task) for client, task in tasks.items()}
    payloads = {a.client: a.payload for a in fed.engine.exchange(requests) if a.payload is not None}
    return ClientEvaluation(
        [decode_scores(payload, tasks[client]) for client, payload in payloads.items()],
        sum(map(len, requests.values())),
        sum(map(len, payloads.values())),
    )
