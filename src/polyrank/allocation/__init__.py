"""Allocation policies: which rank slots each client of a cohort trains. One file per policy.

A policy is a frozen table told apart by ``kind`` with one method and one property,

    allocate(state: ServerState, cohort: Sequence[ClientId]) -> Mapping[ClientId, RankMask]
    max_rank: int | None          the largest rank it hands out, None where it follows the bank

and this union is the registry: a policy is available once it stands here.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from polyrank.allocation.legend import Legend
from polyrank.allocation.loss_based import LossBased
from polyrank.allocation.progressive_depth import ProgressiveDepth
from polyrank.allocation.random_slots import RandomSlotChoice
from polyrank.allocation.tiers import Tiers
from polyrank.allocation.uniform import Uniform

Allocation = Annotated[
    Uniform | Tiers | LossBased | RandomSlotChoice | ProgressiveDepth | Legend, Field(discriminator="kind")
]

__all__ = ["Allocation", "Legend", "LossBased", "ProgressiveDepth", "RandomSlotChoice", "Tiers", "Uniform"]
