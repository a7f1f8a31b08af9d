"""norm_weighted: zero padding, with weights that follow the norm of each client's update.

Source: HetLoRA (Cho et al., arXiv 2401.06432), sparsity-weighted aggregation. Its other half, self-pruning,
is done by the client: ``training.prune_keep`` and ``training.prune_penalty``.

    w_k = |Delta W_k| / sum_i |Delta W_i|     X = sum_k w_k [X_k ; 0]     |.| Frobenius, over all modules

Fails: dilution as in zero padding, weaker where the high ranks have the larger norms.
Differs: a slot that nobody trained keeps its value; heads are averaged by examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from polyrank.aggregation.base import Aggregated, HeadSums, SlotSums, product_norm, sums_of
from polyrank.messages import ClientUpdate
from polyrank.schema import Schema
from polyrank.state import ServerState


class NormWeighted(Schema):
    """The mean of zero-padded factors, weighted by the norm of the product."""

    kind: Literal["norm_weighted"] = "norm_weighted"

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Aggregate one cohort."""
        slots, head = SlotSums(state.adapter), HeadSums(state.head)
        for update in updates:
            slots.add(update, update_norm(update))
            head.add(update.head, update.num_examples)
        if slots.whole == 0:  # nobody has a product yet, as in the first round
            slots, _ = sums_of(state, updates, "uniform")
        return Aggregated(slots.mean_with_zeros(), head.mean())


def update_norm(update: ClientUpdate) -> float:
    """Frobenius norm of the products of all modules together."""
    return math.hypot(*(product_norm(factors) for factors in update.adapter.modules.values()))
