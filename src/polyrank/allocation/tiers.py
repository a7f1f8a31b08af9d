"""tiers: groups of devices, each with its own rank.

Source: the setting of HetLoRA (arXiv 2401.06432), FLoRA (2409.05976) and FlexLoRA (2402.11505).

A tier names its clients, the kind of device that it takes where a fleet is simulated, or the share of the
population that is drawn for it at random (once per run).
Clients that no tier takes hold all R slots.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from polyrank.adapter import RankMask
from polyrank.errors import InputError, choices
from polyrank.messages import ClientId
from polyrank.schema import Schema
from polyrank.seed import seed_for
from polyrank.state import ServerState
from polyrank.voting import best_slots


class Tier(Schema):
    """Devices of one rank: a share of the population, one kind of device, or clients by name."""

    rank: Annotated[int, Field(ge=1)]
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    clients: tuple[ClientId, ...] | None = None
    device: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(way is not None for way in (self.share, self.clients, self.device)) != 1:
            raise ValueError("a tier needs share, clients or device, and one of them alone")
        return self


class Tiers(Schema):
    """The first ``rank`` slots of every module, by tier."""

    kind: Literal["tiers"] = "tiers"
    tiers: Annotated[tuple[Tier, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _at_most_everybody(self) -> Self:
        if sum(tier.share or 0 for tier in self.tiers) > 1 + 1e-9:
            raise ValueError("the shares of all tiers may add up to 1 at most")
        return self

    @property
    def max_rank(self) -> int:
        """The largest rank that is handed out."""
        return max(tier.rank for tier in self.tiers)

    def allocate(self, state: ServerState, cohort: Sequence[ClientId]) -> Mapping[ClientId, RankMask]:
        """Raises: InputError when a tier names a client that does not exist."""
        devices = {client: record.device for client, record in state.clients.items()}
        ranks = self.ranks(list(devices), state.seed, devices)
        return {
            client: best_slots(state, ranks[client]) if client in ranks else state.active for client in cohort
        }

    def ranks(
        self, population: Sequence[ClientId], seed: int, devices: Mapping[ClientId, str | None]
    ) -> Mapping[ClientId, int]:
        """The rank of every client that a tier takes; shares are cut from one random order.

        Raises: InputError when a tier names a client or a device that does not exist.
        """
        ranks: dict[ClientId, int] = {}
        for tier in self.tiers:
            for client in tier.clients or ():
                if client not in population:
                    raise InputError("allocation.tiers.clients", client, choices(client, population))
                ranks[client] = tier.rank
            if tier.device is not None:
                there = sorted({device for device in devices.values() if device is not None})
                if tier.device not in there:
                    allowed = choices(tier.device, there) if there else "needs a [fleet] of devices"
                    raise InputError("allocation.tiers.device", tier.device, allowed)
                ranks |= {c: tier.rank for c in population if devices[c] == tier.device and c not in ranks}
        free = [client for client in population if client not in ranks]
        random.Random(seed_for(seed, "tiers")).shuffle(free)
        taken = 0.0
        for tier in self.tiers:
            if tier.share is not None:
                first, taken = round(taken * len(population)), taken + tier.share
                for client in free[first : round(taken * len(population))]:
                    ranks[client] = tier.rank
        return ranks
