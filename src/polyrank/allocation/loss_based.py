"""loss_based: who learns well gets the high rank.

Source: Byun & Lee, NAACL 2025, arXiv 2406.17477: everybody trains at the low rank first, the server ranks the
clients by the validation loss of their models, and the best get the high rank.

    round 0: rank low for all; from round 1: the ``high_share`` of clients with the least loss hold rank high

Differs (our reconstruction): in round 0 all clients train and are scored, though only the sampled cohort is
aggregated, so that nobody is ranked unseen; their bytes count. ``score = "server"`` measures on texts the
server keeps, ``"client"`` takes the mean training loss of its session, which the client reports. Fixed
afterwards, unless ``reallocate_every`` asks for a new scoring every so many rounds. A slot that is new to a
client has A random and B = 0 in the bank, so that its function does not jump.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from polyrank.adapter import RankMask
from polyrank.messages import ClientId
from polyrank.schema import Schema
from polyrank.state import ServerState
from polyrank.voting import best_slots

Rank = Annotated[int, Field(ge=1)]


class LossBased(Schema):
    """Two ranks, given out by loss."""

    kind: Literal["loss_based"] = "loss_based"
    low_rank: Rank = 5
    high_rank: Rank = 20
    high_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    score: Literal["server", "client"] = "server"
    reallocate_every: Annotated[int, Field(ge=0)] = 0

    @property
    def max_rank(self) -> int:
        """The largest rank that is handed out."""
        return max(self.low_rank, self.high_rank)

    def scores_in(self, round_: int) -> bool:
        """Whether all clients train in this round to be scored."""
        again = self.reallocate_every > 0 and round_ % self.reallocate_every == 0
        return round_ == 0 or again

    def allocate(self, state: ServerState, cohort: Sequence[ClientId]) -> Mapping[ClientId, RankMask]:
        """The low rank for all in round 0, two ranks from then on."""
        best = set() if state.round == 0 else self.best(state)
        low, high = (best_slots(state, rank) for rank in (self.low_rank, self.high_rank))
        return {client: high if client in best else low for client in cohort}

    def best(self, state: ServerState) -> set[ClientId]:
        """The share of the population with the least loss; ties go to the first by name."""
        scored = [(r.loss, name) for name, r in state.clients.items() if r.loss is not None]
        count = math.ceil(self.high_share * len(state.clients) - 1e-9)
        return {name for _, name in sorted(scored)[:count]}
