"""Which clients take part in a round."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from polyrank.messages import ClientId
from polyrank.schema import Schema
from polyrank.seed import seed_for


class SampleCount(Schema):
    """A fixed number of clients, drawn without replacement."""

    kind: Literal["count"] = "count"
    count: Annotated[int, Field(ge=1)] = 4

    def sample(self, clients: Sequence[ClientId], seed: int, round_: int) -> list[ClientId]:
        return _draw(clients, self.count, seed, round_)


class SampleShare(Schema):
    """A fixed share of the population, at least one client."""

    kind: Literal["share"] = "share"
    share: Annotated[float, Field(gt=0, le=1)] = 0.1

    def sample(self, clients: Sequence[ClientId], seed: int, round_: int) -> list[ClientId]:
        return _draw(clients, max(1, round(self.share * len(clients))), seed, round_)


class SampleAll(Schema):
    """The whole population."""

    kind: Literal["all"] = "all"

    def sample(self, clients: Sequence[ClientId], seed: int, round_: int) -> list[ClientId]:
        return list(clients)


Sampling = Annotated[SampleCount | SampleShare | SampleAll, Field(discriminator="kind")]


def _draw(clients: Sequence[ClientId], count: int, seed: int, round_: int) -> list[ClientId]:
    """``count`` clients in population order; the same draw for the same seed and round."""
    draw = random.Random(seed_for(seed, "sampling", round_))
    chosen = set(draw.sample(list(clients), min(count, len(clients))))
    return [client for client in clients if client in chosen]


def spare_clients(clients: Sequence[ClientId], seed: int, round_: int) -> list[ClientId]:
    """Everybody in the order in which they replace clients that fail in a round."""
    return random.Random(seed_for(seed, "spares", round_)).sample(list(clients), len(clients))
