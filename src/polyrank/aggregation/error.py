"""How far the served update is from the mean of what the clients learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyrank.adapter import Adapter, Factors, embed
from polyrank.aggregation.base import Aggregated, client_weights
from polyrank.messages import ClientUpdate


def aggregation_error(
    bank: Adapter, merged: Aggregated, updates: Sequence[ClientUpdate], frozen: bool
) -> float:
    """|served - mean| / |mean| over all modules, in the Frobenius norm of the products.

    ``mean`` is the mean of the clients' products, weighted by examples; ``served`` is the product
    of the next bank, with what was folded into the frozen weights this round. Nothing dense is built:
    |L R|^2 = sum of (L' L) * (R R').

    Args:
        frozen: whether the clients' models also held the bank's other slots.
    """
    weights = client_weights(updates, "examples")
    far = near = 0.0
    for name in bank.modules:
        mean: list[tuple[Tensor, Tensor]] = []
        for update, weight in zip(updates, weights, strict=True):
            if frozen:
                own = embed(update.adapter, update.mask, bank).modules[name]
                mean.append(_product(own, weight))
            elif name in update.adapter.modules:
                mean.append(_product(update.adapter.modules[name], weight))
        served = [_product(merged.adapter.modules[name], -1.0)]
        if merged.fold is not None and name in merged.fold.modules:
            served.append(_product(merged.fold.modules[name], -1.0))
        near += _squared_norm(mean)
        far += _squared_norm([*mean, *served])
    return (far / near) ** 0.5 if near > 0 else 0.0


def _product(factors: Factors, weight: float) -> tuple[Tensor, Tensor]:
    e = factors.e
    left = factors.B.double() * (weight * factors.scale)
    return (left if e is None else left * e.double()), factors.A.double()


def _squared_norm(products: Sequence[tuple[Tensor, Tensor]]) -> float:
    if not products:
        return 0.0
    left = torch.cat([L for L, _ in products], dim=1)
    right = torch.cat([R for _, R in products], dim=0)
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))
