"""random_slots: clients train random slots, and the server adds the mean of their changes.

Source: FSLoRA, federated sketching LoRA (arXiv 2501.19389); use it with ``allocation.kind = "random_slots"``.

    X_j <- X_j + sum_{k trained j} p_k (X_kj - X_j)           X = B columns, e, A rows

Linear, and a round that changes nothing leaves everything as it is.
Differs: FSLoRA multiplies a client's product by R / r so that the random sketch is unbiased; here ``scale``
belongs to the module (our choice), as for every other rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from polyrank.aggregation.anchored import Anchored
from polyrank.aggregation.base import Aggregated, Weights
from polyrank.messages import ClientUpdate
from polyrank.schema import Schema
from polyrank.state import ServerState


class RandomSlots(Schema):
    """The bank plus the weighted changes of whoever trained a slot."""

    kind: Literal["random_slots"] = "random_slots"
    weights: Weights = "examples"

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Aggregate one cohort; X + P_j (owners' mean - X) is `anchored` in factor space, kappa = 1."""
        anchored = Anchored(kappa=1.0, space="factor", weights=self.weights)
        return anchored.aggregate(state, updates)
