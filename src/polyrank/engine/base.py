"""The one interface every engine has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from polyrank.messages import ClientId


@dataclass(frozen=True, slots=True)
class Client:
    """A client that can be asked for work."""

    id: ClientId
    num_examples: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back from one client: a payload, or the reason why there is none.

    Args:
        wall_s: measured seconds from the request to the answer.
        error: one line; None when there is a payload.
    """

    client: ClientId
    payload: bytes | None
    wall_s: float
    error: str | None = None


class Engine(Protocol):
    """Carries requests to clients and answers back.

    ``fuse`` is how many requests in a row are answered together, so that the last bits of one answer depend
    on the others; 1 where each stands for itself. ``pause_s`` is how long failed clients are given, from one
    wave of requests to the next, and twice as long each time; 0 where waiting mends nothing.
    """

    @property
    def fuse(self) -> int: ...

    @property
    def pause_s(self) -> float: ...

    def clients(self) -> Sequence[Client]:
        """The population, in a fixed order."""
        ...

    def exchange(self, requests: Iterable[tuple[ClientId, bytes]]) -> Iterator[Answer]:
        """One answer per request, in any order. A failed client is an answer, never an exception.

        Requests are taken as they can be worked on, so that those of a large cohort never exist at once.
        """
        ...

    def close(self) -> None:
        """Let go of processes and connections."""
        ...
