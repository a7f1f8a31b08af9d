"""stacking: concatenate the clients' factors, fold them into the base, and start new adapters.

Source: FLoRA (Wang et al., arXiv 2409.05976).

    sum_k p_k s B_k A_k = s [B_1 | .. | B_K] [p_1 A_1 ; .. ; p_K A_K]      exact

The stack joins the frozen weights of the server and of every client; a client that skipped rounds gets
the stacks it missed with its next task, once. The bank restarts with a zero product.
Costs: the sum of ranks goes down, the base drifts with every round, and all updates are held at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from polyrank.adapter import Adapter, Draw, Factors, fresh_slots
from polyrank.aggregation.base import Aggregated, Weights, client_weights, mean_head
from polyrank.messages import ClientUpdate
from polyrank.schema import Schema
from polyrank.seed import seed_for
from polyrank.state import ServerState


class Stacking(Schema):
    """The exact mean of products, folded into the base."""

    kind: Literal["stacking"] = "stacking"
    weights: Weights = "examples"

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Aggregate one cohort."""
        updates = list(updates)
        weights = client_weights(updates, self.weights)
        pairs = list(zip(updates, weights, strict=True))
        modules = {}
        for name in state.adapter.modules:
            held = [(u.adapter.modules[name], p) for u, p in pairs if name in u.adapter.modules]
            if held:
                modules[name] = stacked(held)
        bank = fresh_slots(state.adapter, Draw(seed_for(state.seed, "stacking", state.round)))
        head = mean_head(updates, weights, state.head)
        return Aggregated(bank, head, fold=Adapter("lora", modules))


def stacked(held: Sequence[tuple[Factors, float]]) -> Factors:
    """The weighted sum of some products of one module: their factors side by side, weight and e in A."""
    rows = [p * (f.A if f.e is None else f.e[:, None] * f.A).float() for f, p in held]
    return Factors(torch.cat([f.B.float() for f, _ in held], dim=1), torch.cat(rows), held[0][0].scale)
