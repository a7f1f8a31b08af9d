"""norm_weighted: zero padding, with weights that follow the norm of each client's update.

Source: HetLoRA (Cho et al., arXiv 2401.06432), sparsity-weighted aggregation. Its other half, self-pruning,
is done by the client: ``training.prune_keep`` and ``training.prune_penalty``.

    w_k = |Delta W_k| / sum_i |Delta W_i|     X = sum_k w_k [X_k ; 0]     |.| Frobenius, over all modules

Fails: dilution as in zero padding, weaker where the high ranks have the larger norms.
Differs: a slot that nobody trained keeps its value; heads are averaged by examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from polyrank.aggregation.base import (
    Aggregated,
    client_weights,
    mean_head,
    product_norm,
    slot_mean,
)
from polyrank.messages import ClientUpdate
from polyrank.schema import Schema
from polyrank.state import ServerState


class NormWeighted(Schema):
    """The mean of zero-padded factors, weighted by the norm of the product."""

    kind: Literal["norm_weighted"] = "norm_weighted"

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Aggregate one cohort."""
        adapter = slot_mean(state.adapter, updates, norm_weights(updates), over_holders=False)
        by_examples = client_weights(updates, "examples")
        return Aggregated(adapter, mean_head(updates, by_examples, state.head))


def norm_weights(updates: Sequence[ClientUpdate]) -> list[float]:
    """Each update's share of the sum of product norms; equal shares when all are 0."""
    norms = [
        sum(product_norm(factors) ** 2 for factors in update.adapter.modules.values()) ** 0.5
        for update in updates
    ]
    total = sum(norms)
    return [norm / total for norm in norms] if total > 0 else client_weights(updates, "uniform")
