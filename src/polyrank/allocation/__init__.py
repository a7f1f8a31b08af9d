"""Allocation policies: which rank slots each client of a cohort holds. One file per policy.

A policy is a frozen table told apart by ``kind`` with one method,

    allocate(state: ServerState, cohort: Sequence[ClientId]) -> Mapping[ClientId, RankMask]

and this union is the registry: a policy is available once it stands here.
"""

from __future__ import annotations

from polyrank.allocation.uniform import Uniform

Allocation = Uniform

__all__ = ["Allocation", "Uniform"]
