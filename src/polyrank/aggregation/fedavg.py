"""fedavg: the weighted mean of B, of e and of A, each on its own.

Source: FedIT (Zhang et al., arXiv 2305.05644), on FedAvg (McMahan et al., arXiv 1602.05629).

    B = sum_k p_k B_k        A = sum_k p_k A_k        p_k = n_k / sum n, or 1 / K

Needs: all clients hold the same slots; unequal ranks are refused, other rules are made for them.
Exactness: mean(B) mean(A) is not mean(B A); the two agree only when all clients share B or A.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

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
        slots, head = sums_of(state, _of_equal_masks(updates), self.weights)
        return Aggregated(slots.mean(), head.mean())


def _of_equal_masks(updates: Sequence[ClientUpdate]) -> Iterator[ClientUpdate]:
    first = None
    for update in updates:
        first = first or update.mask
        if not all(torch.equal(update.mask[name], held) for name, held in first.items()):
            raise InputError("aggregation.kind", "fedavg", "needs equal ranks on all clients")
        yield update
