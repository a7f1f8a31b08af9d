"""Which clients take part in a round."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Annotated, Literal

from pydantic import Field

from polyrank.errors import RunError
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


class SamplePoisson(Schema):
    """Every client with the same chance, whatever becomes of the others; a cohort may be empty.

    For privacy: a client gains from not being drawn only where its draw is independent.
    """

    kind: Literal["poisson"] = "poisson"
    rate: Annotated[float, Field(gt=0, le=1)] = 0.1

    def sample(self, clients: Sequence[ClientId], seed: int, round_: int) -> list[ClientId]:
        draw = random.Random(seed_for(seed, "sampling", round_))
        return [client for client in clients if draw.random() < self.rate]


Sampling = Annotated[SampleCount | SampleShare | SampleAll | SamplePoisson, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class SecretSampling:
    """Cohorts drawn from a secret instead of the run's seed, which stands in its config for all to read."""

    sampling: Sampling
    secret: int

    def sample(self, clients: Sequence[ClientId], seed: int, round_: int) -> list[ClientId]:
        return self.sampling.sample(clients, self.secret, round_)


def expected_share(sampling: Sampling, num_clients: int) -> float:
    """The share of a population that a cohort has, on average."""
    if isinstance(sampling, SamplePoisson):
        return sampling.rate
    population = [str(number) for number in range(num_clients)]
    return len(sampling.sample(population, 0, 0)) / num_clients


def _draw(clients: Sequence[ClientId], count: int, seed: int, round_: int) -> list[ClientId]:
    """``count`` clients in population order; the same draw for the same seed and round."""
    draw = random.Random(seed_for(seed, "sampling", round_))
    chosen = set(draw.sample(list(clients), min(count, len(clients))))
    return [client for client in clients if client in chosen]


def spare_clients(clients: Sequence[ClientId], seed: int, round_: int) -> list[ClientId]:
    """Everybody in the order in which they replace clients that fail in a round."""
    return random.Random(seed_for(seed, "spares", round_)).sample(list(clients), len(clients))


def with_work(
    cohort: Sequence[ClientId], spares: Sequence[ClientId], works: Callable[[ClientId], bool]
) -> list[ClientId]:
    """The cohort, with others in the place of clients that have nothing to train.

    Raises: RunError when nobody has.
    """
    others = (client for client in spares if client not in cohort)
    found = list(islice(filter(works, chain(cohort, others)), len(cohort)))
    if not found:
        raise RunError("no client holds a slot that is still active")
    return found
