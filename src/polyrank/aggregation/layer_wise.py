"""layer_wise: average each block's factors over the devices that hold the block.

Source: LEGEND (Liu et al., IEEE TMC 2025, arXiv 2412.20004).

    X_l = sum_{k in N_l} p_k X_k,l / sum_{k in N_l} p_k        N_l = devices whose depth reaches block l

LEGEND's devices of one block have one rank. Where ranks within a block differ as well, the mean is per slot
(our choice), which is replication padding with cascade fill. A block nobody holds keeps its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from polyrank.aggregation.base import Aggregated, Weights, sums_of
from polyrank.messages import ClientUpdate
from polyrank.schema import Schema
from polyrank.state import ServerState


class LayerWise(Schema):
    """The mean over the holders of each block."""

    kind: Literal["layer_wise"] = "layer_wise"
    weights: Weights = "examples"

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Aggregate one cohort."""
        slots, head = sums_of(state, updates, self.weights)
        return Aggregated(slots.mean(), head.mean())
