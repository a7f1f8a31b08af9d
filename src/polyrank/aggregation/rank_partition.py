"""rank_partition: per rank interval, the mean product over the clients that reach it; then SVD.

Source: raFLoRA (arXiv 2602.13486).

    Delta W = sum_j sum_{k holds j} (p_k / P_j) s B_k[:, j] A_k[j, :] = U S V'     P_j = weight of j's holders

Slots between two neighbouring client ranks have the same holders, so the sum over slots is the paper's sum
over rank intervals. No dilution while all levels take part. Fails: what only absent levels held is lost.
Costs: all updates are held at once; one SVD per module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from polyrank.aggregation.base import Aggregated, Weights, client_weights, mean_head
from polyrank.aggregation.product import Part, holders, refactor_adapter, slot_mass
from polyrank.messages import ClientUpdate
from polyrank.schema import Schema
from polyrank.state import ServerState


class RankPartition(Schema):
    """The SVD of the owners-only mean product."""

    kind: Literal["rank_partition"] = "rank_partition"
    weights: Weights = "examples"

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Aggregate one cohort."""
        updates = list(updates)
        weights = client_weights(updates, self.weights)

        def parts(name: str) -> list[Part]:
            held = holders(updates, weights, name)
            mass = slot_mass(held, name, state.adapter.modules[name].rank)
            return [(u.adapter.modules[name], p / mass[u.mask[name]]) for u, p in held]

        adapter = refactor_adapter(state.adapter, parts)
        return Aggregated(adapter, mean_head(updates, weights, state.head))
