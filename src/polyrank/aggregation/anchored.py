"""anchored: every slot moves toward its owners' mean as far as its owners carry weight, and keeps the rest.

Source: ours (no paper). Product space:

    L = [s B_1 diag(eta w_1) | .. | s B_K diag(eta w_K) | s B diag(1 - eta)]      Rg = [A_1 ; .. ; A_K ; A]
    eta_j = P_j^kappa        w_kj = p_k / P_j on the slots that k trained          Delta W = L Rg = U S V'

P_j is the weight of the participants that trained slot j; a slot nobody trained has eta = 0 and stays.
kappa = 1 is the unbiased mean of changes, 0 the owners' mean with memory, 0.5 the default.
``space = "factor"`` moves B, e and A the same way, apart from each other: linear, and slots keep their
coordinates, so it works with FedARA's masks. With ``adapter.untrained = "frozen"`` a client sees all slots
and trains its own.

A round in which nobody learns anything changes nothing, at any participation. In product space all updates
are held at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from polyrank.adapter import Adapter
from polyrank.aggregation.base import Aggregated, Weights, blend, client_weights, mean_head, sums_of
from polyrank.aggregation.product import Part, holders, refactor_adapter, slot_mass
from polyrank.messages import ClientUpdate
from polyrank.schema import Schema
from polyrank.state import ServerState


class Anchored(Schema):
    """Owners' mean, anchored at the previous value."""

    kind: Literal["anchored"] = "anchored"
    kappa: Annotated[float, Field(ge=0, le=1)] = 0.5
    space: Literal["product", "factor"] = "product"
    weights: Weights = "examples"

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Aggregate one cohort."""
        if self.space == "product":
            updates = list(updates)
            weights = client_weights(updates, self.weights)
            head = mean_head(updates, weights, state.head)
            return Aggregated(self._in_products(state.adapter, updates, weights), head)
        slots, heads = sums_of(state, updates, self.weights)
        eta = {name: self._eta(mass) for name, mass in slots.shares().items()}
        return Aggregated(blend(state.adapter, slots.mean(), eta), heads.mean())

    def _eta(self, mass: Tensor) -> Tensor:
        return torch.where(mass > 0, mass**self.kappa, 0.0)

    def _in_products(
        self, bank: Adapter, updates: Sequence[ClientUpdate], weights: Sequence[float]
    ) -> Adapter:
        def parts(name: str) -> list[Part]:
            held, old = holders(updates, weights, name), bank.modules[name]
            mass = slot_mass(held, name, old.rank)
            eta = self._eta(mass)
            own = [(u.adapter.modules[name], (eta * p / mass)[u.mask[name]]) for u, p in held]
            return [*own, (old, 1 - eta)]

        return refactor_adapter(bank, parts)
