"""residual: average the factors, and fold what the mean of the factors misses of the mean of the products.

Source: FedEx-LoRA (Singhal et al., arXiv 2410.09432).

    B = sum_k p_k B_k      A = sum_k p_k A_k      base += sum_k p_k s B_k A_k - s B A      exact

The residual joins the frozen weights of the server and of every client, as factors of rank (K + 1) r; a
client that skipped rounds gets those it missed with its next task, once. The bank goes on.
Needs: all clients hold the same slots. Costs: K + 1 adapters go down, and all updates are held at once.
Differs: with the SVD form e is averaged as well, and B and A are multiplied with it between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from polyrank.adapter import Adapter, restrict
from polyrank.aggregation.base import Aggregated, Weights, client_weights
from polyrank.aggregation.fedavg import mean_of_equals
from polyrank.aggregation.stacking import stacked
from polyrank.messages import ClientUpdate
from polyrank.schema import Schema
from polyrank.state import ServerState


class Residual(Schema):
    """The mean of the factors, made exact by a residual in the base."""

    kind: Literal["residual"] = "residual"
    weights: Weights = "examples"

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Raises: InputError when two clients hold different slots."""
        updates = list(updates)
        adapter, head = mean_of_equals(self.kind, state, updates, self.weights)
        pairs = list(zip(updates, client_weights(updates, self.weights), strict=True))
        modules = {}
        for name, mean in restrict(adapter, updates[0].mask).modules.items():
            modules[name] = stacked([*((u.adapter.modules[name], p) for u, p in pairs), (mean, -1.0)])
        return Aggregated(adapter, head, fold=Adapter("lora", modules))
