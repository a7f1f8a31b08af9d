"""svd_redistribution: the mean of the clients' products, cut back to R slots by SVD.

Source: FlexLoRA (Bai et al., arXiv 2402.11505).

    Delta W = sum_k p_k s B_k A_k = U S V'        a client of rank r gets the r strongest slots

Exact up to truncation. Fails: ranks that only some clients reach are diluted by the others' zeros.
Costs: all updates are held at once; one SVD per module.
Differs: computed from the factors (`product.py`), with the singular values split evenly between B and A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from polyrank.aggregation.base import Aggregated, Weights, client_weights, mean_head
from polyrank.aggregation.product import Part, holders, refactor_adapter
from polyrank.messages import ClientUpdate
from polyrank.schema import Schema
from polyrank.state import ServerState


class SvdRedistribution(Schema):
    """The SVD of the mean product."""

    kind: Literal["svd_redistribution"] = "svd_redistribution"
    weights: Weights = "examples"

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Aggregate one cohort."""
        updates = list(updates)
        weights = client_weights(updates, self.weights)

        def parts(name: str) -> list[Part]:
            held = [(u.adapter.modules[name], p) for u, p in holders(updates, weights, name)]
            return [(factors, torch.full((factors.rank,), p)) for factors, p in held]

        adapter = refactor_adapter(state.adapter, parts)
        return Aggregated(adapter, mean_head(updates, weights, state.head))
