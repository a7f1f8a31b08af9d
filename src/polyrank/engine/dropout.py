"""Clients that drop out, simulated: some answers of another engine get lost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from polyrank.engine.base import Answer, Client, Engine
from polyrank.messages import ClientId
from polyrank.seed import seed_for


@dataclass(frozen=True)
class Dropout:
    """An engine that loses answers, the same ones whenever it is asked the same.

    The work is done and its answer lost, as on a device that leaves before it sends; so who trains together
    does not depend on who is lost.

    Args:
        share: of the answers that get lost, 0 to 1.
    """

    engine: Engine
    share: float
    seed: int

    @property
    def fuse(self) -> int:
        return self.engine.fuse

    @property
    def pause_s(self) -> float:
        return self.engine.pause_s

    def clients(self) -> Sequence[Client]:
        """The population, in a fixed order."""
        return self.engine.clients()

    def exchange(self, requests: Iterable[tuple[ClientId, bytes]]) -> Iterator[Answer]:
        """One answer per request; a lost one says so."""
        lost: set[ClientId] = set()

        def watched() -> Iterator[tuple[ClientId, bytes]]:
            for client, request in requests:
                name = hashlib.sha256(request).hexdigest()
                if seed_for(self.seed, "dropout", client, name) < self.share * 2**63:
                    lost.add(client)
                yield client, request

        for answer in self.engine.exchange(watched()):
            if answer.client in lost:
                yield Answer(answer.client, None, answer.wall_s, "dropped out (simulated)")
            else:
                yield answer

    def close(self) -> None:
        """Let go of the engine behind it."""
        self.engine.close()
