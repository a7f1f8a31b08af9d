"""Real sites over a real network: NVIDIA FLARE carries the bytes, as calls of its Collab API.

A site is a Collab proxy: ``site(timeout=...).answer(request)`` waits for what the site's `client.handle` made
of the request. Whatever goes wrong on the way (no link, no answer in time, nonsense) is an answer with an
error; the round decides what to do about it. A reply that comes after its deadline has no one who waits for
it, and if it came as an answer to something else, the gate would know by its round, attempt and base.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from typing import Protocol

from polyrank.engine.base import Answer, Client
from polyrank.errors import first_line
from polyrank.messages import ClientId

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
    """

    population: Sequence[Client]
    sites: Mapping[ClientId, Site]
    deadline_s: float
    aborted: type[Exception]
    fuse: int = 1
    pause_s: float = 5.0

    def clients(self) -> Sequence[Client]:
        """The population, in a fixed order."""
        return self.population

    def exchange(self, requests: Iterable[tuple[ClientId, bytes]]) -> Iterator[Answer]:
        """One answer per request, as they come."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            waiting: set[Future[Answer]] = set()
            for client, request in requests:
                waiting.add(pool.submit(self._ask, client, request))
                if len(waiting) >= AT_ONCE:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in as_completed(waiting))

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
