"""random_slots: every client of a cohort trains slots drawn at random.

Source: FSLoRA (arXiv 2501.19389), sketches of slots; use it with ``aggregation.kind = "random_slots"``.

Each client draws ``rank`` of the active slots anew each round, the same slots in every module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from polyrank.adapter import RankMask
from polyrank.messages import ClientId
from polyrank.schema import Schema
from polyrank.seed import seed_for
from polyrank.state import ServerState


class RandomSlotChoice(Schema):
    """``rank`` random slots per client and round."""

    kind: Literal["random_slots"] = "random_slots"
    rank: Annotated[int, Field(ge=1)] = 4

    @property
    def max_rank(self) -> int:
        """The largest rank that is handed out."""
        return self.rank

    def allocate(self, state: ServerState, cohort: Sequence[ClientId]) -> Mapping[ClientId, RankMask]:
        """A draw per client that depends on seed, round and client alone."""
        return {client: self._draw(state, client) for client in cohort}

    def _draw(self, state: ServerState, client: ClientId) -> RankMask:
        seed = seed_for(state.seed, "random_slots", state.round, client)
        rank = max(factors.rank for factors in state.adapter.modules.values())
        order = torch.randperm(rank, generator=torch.Generator().manual_seed(seed))
        mask = {}
        for name, active in state.active.items():
            mask[name] = torch.zeros_like(active)
            usable = [int(slot) for slot in order if slot < active.numel() and active[slot]]
            mask[name][usable[: self.rank]] = True
        return mask
