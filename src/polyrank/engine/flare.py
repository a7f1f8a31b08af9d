"""Real sites over a real network: NVIDIA FLARE carries the bytes, as calls of its Collab API.

A site is a Collab proxy: ``site(timeout=...).answer(request)`` waits for what the site's `client.handle` made
of the request. Whatever goes wrong on the way (no link, no answer in time, nonsense) is an answer with an
error; the round decides what to do about it. A reply that comes after its deadline has no one who waits for
it, and if it came as an answer to something else, the gate would know by its round, attempt and base.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Protocol, TypeVar

from polyrank.engine.base import Answer, Client
from polyrank.errors import first_line
from polyrank.messages import ClientId

Result = TypeVar("Result")
AT_ONCE = 32
"""Requests on their way at the same time, so that those of a large cohort never exist at once."""


class Calls(Protocol):
    """What a site answers; a Collab proxy with call options."""

    def answer(self, request: bytes) -> bytes | str:
        """The site's answer, or one line that says why there is none."""
        ...


class Site(Protocol):
    """A Collab proxy."""

    def __call__(self, *, timeout: float) -> Calls: ...


@dataclass(frozen=True)
class FlareEngine:
    """Sites that are reached through FLARE.

    Args:
        population: every site of the run, connected or not: a late one must not move the others' ranks.
        sites: those that can be asked now.
        deadline_s: how long a request may take, from sending it to holding the whole answer.
        aborted: the error by which FLARE says that the job ends; the only one that is not the site's.
        ending: whether the job ends: FLARE then tells of calls that are under way that they timed out, and a
            round must not go on with the answers of the others.
    """

    population: Sequence[Client]
    sites: Mapping[ClientId, Site]
    deadline_s: float
    aborted: type[Exception]
    ending: Callable[[], bool]
    fuse: int = 1
    pause_s: float = 5.0

    def clients(self) -> Sequence[Client]:
        """The population, in a fixed order."""
        return self.population

    def exchange(self, requests: Iterable[tuple[ClientId, bytes]]) -> Iterator[Answer]:
        """One answer per request, as they come; none is waited for after its deadline.

        Raises: what ``aborted`` says, when the job ends.
        """
        asked: list[ClientId] = []

        def calls() -> Iterator[Callable[[], Answer]]:
            for client, request in requests:
                asked.append(client)
                yield partial(self._ask, client, request)

        for number, outcome in side_by_side(calls(), self.deadline_s):
            if isinstance(outcome, Answer):
                if outcome.payload is None and self.ending():
                    raise self.aborted("the job ends")
                yield outcome
            elif isinstance(outcome, TimeoutError):
                yield Answer(asked[number], None, self.deadline_s, str(outcome))
            else:
                raise outcome

    def _ask(self, client: ClientId, request: bytes) -> Answer:
        start = time.perf_counter()
        if client not in self.sites:
            return Answer(client, None, 0.0, "the site is not connected")
        try:
            reply = self.sites[client](timeout=self.deadline_s).answer(request)
        except self.aborted:
            raise
        except Exception as failure:
            wall_s = time.perf_counter() - start
            return Answer(client, None, wall_s, f"{first_line(failure)} (after {wall_s:.0f} s)")
        wall_s = time.perf_counter() - start
        if isinstance(reply, bytes):
            return Answer(client, reply, wall_s)
        told = reply if isinstance(reply, str) else f"the site answered with {type(reply).__name__}"
        return Answer(client, None, wall_s, told)

    def close(self) -> None:
        """Nothing to let go of: FLARE ends its own job."""


def side_by_side(
    calls: Iterable[Callable[[], Result]], within_s: float
) -> Iterator[tuple[int, Result | Exception]]:
    """Make calls at the same time; yields the number of each, and what it returned or raised, as they end.

    FLARE's own timeout begins anew with every byte, so a site that sends one now and then is never late for
    it. Here a call that takes longer ends in a TimeoutError; its thread is left behind and dies with the job.

    Args:
        calls: taken one by one, while fewer than `AT_ONCE` are under way.
    """
    ended: SimpleQueue[tuple[int, Result | Exception]] = SimpleQueue()
    due: dict[int, float] = {}  # in the order in which they began, so that the first is due first

    def make(number: int, call: Callable[[], Result]) -> None:
        try:
            ended.put((number, call()))
        except Exception as failure:
            ended.put((number, failure))

    def one() -> Iterator[tuple[int, Result | Exception]]:
        first = next(iter(due))
        try:
            number, outcome = ended.get(timeout=max(0.0, due[first] - time.monotonic()))
        except Empty:
            number, outcome = first, TimeoutError(f"no answer within {within_s:g} s")
        if due.pop(number, None) is not None:  # else it was given up before
            yield number, outcome

    for number, call in enumerate(calls):
        due[number] = time.monotonic() + within_s
        Thread(target=make, args=(number, call), daemon=True).start()
        while len(due) >= AT_ONCE:
            yield from one()
    while due:
        yield from one()
