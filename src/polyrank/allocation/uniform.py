"""uniform: every client holds the same slots.

Source: FedIT (Zhang et al., arXiv 2305.05644), and every federated LoRA that gives all devices one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from polyrank.adapter import RankMask
from polyrank.messages import ClientId
from polyrank.schema import Schema
from polyrank.state import ServerState
from polyrank.voting import best_slots


class Uniform(Schema):
    """The first ``rank`` slots of every module for everybody; without ``rank``, all slots."""

    kind: Literal["uniform"] = "uniform"
    rank: Annotated[int, Field(ge=1)] | None = None

    @property
    def max_rank(self) -> int | None:
        """The largest rank that is handed out."""
        return self.rank

    def allocate(self, state: ServerState, cohort: Sequence[ClientId]) -> Mapping[ClientId, RankMask]:
        mask = state.active if self.rank is None else best_slots(state, self.rank)
        return dict.fromkeys(cohort, mask)
