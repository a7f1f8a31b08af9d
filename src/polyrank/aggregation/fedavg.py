"""fedavg: the weighted mean of B, of e and of A, each on its own.

Source: FedIT (Zhang et al., arXiv 2305.05644), on FedAvg (McMahan et al., arXiv 1602.05629).

    B = sum_k p_k B_k        A = sum_k p_k A_k        p_k = n_k / sum n, or 1 / K

Needs: all clients hold the same slots; unequal ranks are refused, other rules are made for them.
Exactness: mean(B) mean(A) is not mean(B A); the two agree only when all clients share B or A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from polyrank.adapter import Adapter, Head
from polyrank.aggregation.base import Aggregated, Weights, sums_of
from polyrank.errors import InputError
from polyrank.messages import ClientUpdate
from polyrank.schema import Schema
from polyrank.state import ServerState


class FedAvg(Schema):
    """Plain federated averaging of the factors."""

    kind: Literal["fedavg"] = "fedavg"
    weights: Weights = "examples"

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Raises: InputError when two clients hold different slots."""
        return Aggregated(*mean_of_equals(self.kind, state, updates, self.weights))


def mean_of_equals(
    kind: str, state: ServerState, updates: Sequence[ClientUpdate], weights: Weights
) -> tuple[Adapter, Head]:
    """The mean of each factor, and of the heads, over clients that hold the same slots.

    Args:
        kind: of the rule that asks.

    Raises: InputError when two clients hold different slots.
    """
    slots, head = sums_of(state, updates, weights)
    for share in slots.shares().values():  # exact: sums of whole numbers in float64
        if bool(((share > 0) & (share < 1)).any()):
            raise InputError("aggregation.kind", kind, "needs equal ranks on all clients")
    return slots.mean(), head.mean()
