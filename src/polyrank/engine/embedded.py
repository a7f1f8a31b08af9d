"""All clients on this machine, one after the other, around one resident base model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from polyrank.client import ClientEnv, ClientError, handle
from polyrank.engine.base import Answer, Client
from polyrank.errors import first_line
from polyrank.messages import ClientId
from polyrank.wire import WireError


@dataclass(frozen=True)
class EmbeddedEngine:
    """Simulated devices that share this process."""

    environments: Mapping[ClientId, ClientEnv]

    def clients(self) -> Sequence[Client]:
        """The population, in a fixed order."""
        return [Client(id_, len(env.train)) for id_, env in self.environments.items()]

    def exchange(self, requests: Mapping[ClientId, bytes]) -> Iterator[Answer]:
        """One answer per request, in the order of the requests."""
        for client, request in requests.items():
            start = time.perf_counter()
            payload, error = None, None
            try:
                payload = handle(request, self.environments[client])
            except (ClientError, WireError, torch.OutOfMemoryError) as failure:
                error = f"{type(failure).__name__}: {first_line(failure)}"
            yield Answer(client, payload, time.perf_counter() - start, error)

    def close(self) -> None:
        """Nothing to let go of."""
