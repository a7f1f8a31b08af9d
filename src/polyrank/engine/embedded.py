"""All clients on this machine, in this process, around one resident base model."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from polyrank.client import answer_together
from polyrank.engine.base import Answer, Client
from polyrank.errors import first_line
from polyrank.messages import ClientId
from polyrank.session import ClientEnv

Request = tuple[ClientId, bytes]


@dataclass(frozen=True)
class EmbeddedEngine:
    """Simulated devices that share this process.

    Args:
        fuse: how many clients at most go through the base model in one pass.
    """

    environments: Mapping[ClientId, ClientEnv]
    fuse: int = 1
    pause_s: float = 0.0

    def clients(self) -> Sequence[Client]:
        """The population, in a fixed order."""
        return [Client(id_, len(env.train)) for id_, env in self.environments.items()]

    def exchange(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """One answer per request, in the order of the requests."""
        for together in groups(requests, self.fuse):
            yield from self._answer(together)

    def _answer(self, requests: Sequence[Request]) -> Iterator[Answer]:
        start = time.perf_counter()
        environments = [self.environments[client] for client, _ in requests]
        results: Sequence[bytes | Exception]
        try:
            results = answer_together([request for _, request in requests], environments)
        except torch.OutOfMemoryError as failure:
            results = [torch.OutOfMemoryError(str(failure))]  # the one caught holds on to the memory
        if len(results) < len(requests):  # too many at once: one after the other
            yield from itertools.chain.from_iterable(self._answer([request]) for request in requests)
            return
        wall_s = (time.perf_counter() - start) / len(requests)
        for (client, _), result in zip(requests, results, strict=True):
            if isinstance(result, Exception):
                yield Answer(client, None, wall_s, f"{type(result).__name__}: {first_line(result)}")
            else:
                yield Answer(client, result, wall_s)

    def close(self) -> None:
        """Nothing to let go of."""


def groups(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    """The requests in their order, so many at a time: who shares a pass depends on nothing else."""
    rest = iter(requests)
    while together := list(itertools.islice(rest, size)):
        yield together
