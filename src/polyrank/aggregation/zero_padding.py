"""zero_padding: pad every client to R slots with zeros, then take the weighted mean.

Source: the baseline of HetLoRA (Cho et al., arXiv 2401.06432) and of replication padding (Byun & Lee,
arXiv 2406.17477).

    X = sum_k p_k [X_k ; 0]            X = B columns, e, A rows

Fails: a slot shrinks by P_j, the weight of its holders, and its product by P_j^2.
Differs: a slot that nobody in the cohort trained keeps its value; written out, the formula would set both
factors to 0, from which no gradient leads back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from polyrank.aggregation.base import Aggregated, Weights, sums_of
from polyrank.messages import ClientUpdate
from polyrank.schema import Schema
from polyrank.state import ServerState


class ZeroPadding(Schema):
    """The mean of zero-padded factors."""

    kind: Literal["zero_padding"] = "zero_padding"
    weights: Weights = "examples"

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Aggregate one cohort."""
        slots, head = sums_of(state, updates, self.weights)
        return Aggregated(slots.mean_with_zeros(), head.mean())
