"""Asking a cohort: waves of requests until enough good updates are there.

A round goes on with what it has when a ``quorum`` of its cohort gave a good update. Below that, each client
that failed is replaced by one that was not asked yet, or asked again when none is left; ``retries`` times.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from polyrank.adapter import RankMask, num_slots
from polyrank.clock import Priced
from polyrank.engine.base import Answer, Engine
from polyrank.errors import RunError, printable
from polyrank.gate import change, decode_update, outliers
from polyrank.messages import ClientId, Reason, TrainTask
from polyrank.received import Note, Received
from polyrank.schema import Schema
from polyrank.wire import WireError, encode_task

_MAX_ERROR = 300


class Failures(Schema):
    """What a round does about clients that fail or send what cannot be used."""

    quorum: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the cohort whose updates a round needs, at least one."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Further waves of a round below its quorum: failed clients are replaced, or asked again."""
    norm_bound: Annotated[float, Field(ge=0)] = 25.0
    """An update that changed more than so many times the cohort's median is refused; 0 for no bound."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Simulated: the share of answers that get lost."""

    def needed(self, cohort: int) -> int:
        """Updates that a round of so many clients needs."""
        return max(1, math.ceil(self.quorum * cohort - 1e-9))


@dataclass(frozen=True, slots=True)
class Learned:
    """What the server notes of an update besides its numbers: slots kept, examples, metrics, votes.

    Args:
        change: root mean square of what training changed.
    """

    mask: RankMask
    num_examples: int
    metrics: Mapping[str, float]
    votes: RankMask | None
    change: float = 0.0


@dataclass(frozen=True, slots=True)
class Reply:
    """One client's part in one round, with the bytes that really travelled.

    Args:
        learned: None where there is no usable update; then ``reason`` and ``error`` say why.
        counts: whether its update is aggregated; False when it trained only to be scored, or came late.
        attempt: how often it was asked before in this round.
        priced: what the session costs on its simulated device, where there is one.
    """

    client: ClientId
    slots: int
    bytes_down: int
    bytes_up: int
    wall_s: float
    learned: Learned | None
    error: str | None
    counts: bool = True
    reason: Reason | None = None
    attempt: int = 0
    priced: Priced | None = None


def collect_quorum(
    engine: Engine,
    failures: Failures,
    asked: Sequence[ClientId],
    cohort: Sequence[ClientId],
    spares: Sequence[ClientId],
    received: Received,
) -> list[Reply]:
    """Ask in waves until a quorum of the cohort has given good updates, or the retries are used up.

    Args:
        asked: the first wave: the cohort, or everybody where all are scored.
        spares: who may replace a failed client, in this order.

    Returns: all replies, client by client in the order in which they may be asked first.

    Raises: RunError when the round stays below its quorum.
    """
    wave, replies, counting = list(asked), list[Reply](), set(cohort)
    needed = failures.needed(len(cohort))
    for number in range(failures.retries + 1):
        started = time.monotonic()
        answers = collect(engine, wave, received)
        replies += [replace(reply, counts=reply.counts and reply.client in counting) for reply in answers]
        replies = refuse_outliers(replies, failures.norm_bound)
        good = {reply.client for reply in replies if reply.learned is not None and reply.counts}
        if len(good) >= needed:
            return _in_order(replies, [*asked, *spares])
        failed = [client for client in received.attempts if client in counting and client not in good]
        failed.sort(key=lambda client: received.attempts[client])  # the one that was asked least, first
        fresh = [client for client in spares if client not in received.attempts]
        wave = [*fresh, *failed][: len(cohort) - len(good)]
        counting |= set(wave)
        if number < failures.retries:  # what failed at once may be a link that is back in some seconds
            time.sleep(max(0.0, started + engine.pause_s * 2**number - time.monotonic()))
    errors = {r.client: f"{r.client}: {r.error}" for r in replies if r.learned is None and r.counts}
    count, reasons = f"{len(good)} of {len(cohort)} clients" if good else "no client", list(errors.values())
    raise RunError(f"{count} gave a usable update ({needed} are needed; {'; '.join(reasons[:3])})")


def _in_order(replies: Sequence[Reply], clients: Sequence[ClientId]) -> list[Reply]:
    """The replies client by client: sums go in this order, so that asking twice changes no bit of them."""
    place = {client: number for number, client in reversed([*enumerate(clients)])}
    return sorted(replies, key=lambda reply: place.get(reply.client, len(clients)))


def collect(engine: Engine, clients: Sequence[ClientId], received: Received) -> list[Reply]:
    """Send every client its task, check and keep every answer; replies stand in the order of the clients.

    What the journal holds is not asked for again; clients who share a pass are asked again together, because
    the last bits of one depend on the others.
    """
    received.ask(clients)
    registered = {client.id: client.num_examples for client in engine.clients()}
    found = _from_journal(clients, received, registered)
    groups = [clients[start : start + engine.fuse] for start in range(0, len(clients), engine.fuse)]
    missing = [client for group in groups if any(c not in found for c in group) for client in group]
    replies = {client: found[client] for client in clients if client not in missing}
    sizes: dict[ClientId, int] = {}
    surplus = []

    def requests() -> Iterator[tuple[ClientId, bytes]]:
        for client in missing:
            request = encode_task(received.task(client))
            sizes[client] = len(request)
            yield client, request

    for answer in engine.exchange(requests()):
        if answer.client not in sizes or answer.client in replies:
            surplus.append(_surplus(answer, "duplicate" if answer.client in sizes else "unasked"))
            continue
        reply = _check(received.task(answer.client), sizes[answer.client], answer, registered[answer.client])
        replies[answer.client] = reply
        if reply.learned is not None and answer.payload is not None:
            received.keep(Note(answer.client, reply.attempt, reply.bytes_down, answer.wall_s), answer.payload)
    silent = {c: _silent(received.task(c), sizes.get(c, 0)) for c in missing if c not in replies}
    return [*((replies | silent)[client] for client in clients), *surplus]


def refuse_outliers(replies: Sequence[Reply], bound: float) -> list[Reply]:
    """The replies; those whose update changed too much against the cohort's median are refused."""
    changes = {n: r.learned.change for n, r in enumerate(replies) if r.learned is not None and r.counts}
    far = outliers(changes, bound)
    return [
        replace(reply, learned=None, error=f"refused: {far[n]}", reason="norm") if n in far else reply
        for n, reply in enumerate(replies)
    ]


def _from_journal(
    clients: Sequence[ClientId], received: Received, registered: Mapping[ClientId, int]
) -> dict[ClientId, Reply]:
    """The replies that an earlier try at this round has left, where they answer the same tasks."""
    replies = {}
    for client in clients:
        task = received.task(client)
        if (kept := received.journalled(client, task.attempt)) is None:
            continue
        note, payload = kept
        reply = _check(task, note.bytes_down, Answer(client, payload, note.wall_s), registered[client])
        if reply.learned is not None:
            received.take(note)
            replies[client] = reply
    return replies


def _check(task: TrainTask, bytes_down: int, answer: Answer, num_examples: int) -> Reply:
    bytes_up, learned, error = len(answer.payload or b""), None, answer.error
    reason: Reason | None = "failed"
    if answer.payload is not None:
        try:
            update = decode_update(answer.payload, task, num_examples)
            moved = change(update, task)
            learned = Learned(update.mask, update.num_examples, update.metrics, update.votes, moved)
            reason = None
        except WireError as refusal:
            error, reason = f"refused: {refusal}", refusal.reason
    told = None if error is None else printable(error, _MAX_ERROR)
    size, attempt = num_slots(task.mask), task.attempt
    return Reply(task.client, size, bytes_down, bytes_up, answer.wall_s, learned, told, True, reason, attempt)


def _silent(task: TrainTask, bytes_down: int) -> Reply:
    size, attempt = num_slots(task.mask), task.attempt
    return Reply(task.client, size, bytes_down, 0, 0.0, None, "no answer", True, "no_answer", attempt)


def _surplus(answer: Answer, reason: Reason) -> Reply:
    """An answer that nobody waited for: the first one counts."""
    told = {"duplicate": "refused: a second answer", "unasked": "refused: it was not asked"}[reason]
    client, size = printable(answer.client, _MAX_ERROR), len(answer.payload or b"")
    return Reply(client, 0, 0, size, answer.wall_s, None, told, False, reason)
