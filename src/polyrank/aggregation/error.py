"""How far the served update is from the mean of what the clients learned."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from polyrank.adapter import Adapter, Factors, RankMask
from polyrank.aggregation.base import Aggregated
from polyrank.messages import ClientUpdate


def aggregation_error(
    bank: Adapter, active: RankMask, merged: Aggregated, updates: Iterable[ClientUpdate], frozen: bool
) -> float:
    """|served - mean| / |mean| over all modules, in the Frobenius norm of the products.

    ``mean`` is the mean of the clients' products, weighted by examples; ``served`` is the product
    of the next bank, with what was folded into the frozen weights this round. Each update is read once.

    Args:
        active: the slots that are in use; those that were voted out are in nobody's model.
        frozen: whether the clients' models also held the bank's other slots.
    """
    sums = {name: ProductSum(f.B.shape[0], f.A.shape[1]) for name, f in bank.modules.items()}
    absent = {name: torch.zeros(factors.rank) for name, factors in bank.modules.items()}
    whole = 0
    for update in updates:
        whole += update.num_examples
        for name, factors in update.adapter.modules.items():
            sums[name].add(factors, update.num_examples)
        for name in bank.modules if frozen else ():
            absent[name] += update.num_examples * (active[name] & ~update.mask[name])
    far = near = 0.0
    for name in bank.modules:
        total = sums.pop(name)
        if frozen:
            total.add(bank.modules[name], absent[name])
        near += total.squared_norm()
        total.add(merged.adapter.modules[name], -whole * active[name])
        if merged.fold is not None and name in merged.fold.modules:
            total.add(merged.fold.modules[name], -whole)
        far += total.squared_norm()
    return (far / near) ** 0.5 if near > 0 else 0.0


class ProductSum:
    """A sum of weighted products sum_k B_k diag(w_k) A_k, as factors or dense, whichever is smaller.

    Few factors stay as they are: |L R|^2 = sum of (L' L) * (R R') in float64, and nothing dense is built.
    Once they hold as many numbers as the dense sum they become part of it, in float32, so that neither the
    memory nor the cost of the norm grows further.
    """

    def __init__(self, out: int, in_: int) -> None:
        self._size = (out, in_)
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._numbers = 0
        self._dense: Tensor | None = None

    def add(self, factors: Factors, weight: float | Tensor) -> None:
        """Count in one product; the weight may differ by slot, [r]."""
        scale = factors.scale * weight
        left = factors.B.float() * (scale if factors.e is None else scale * factors.e)
        self._factors.append((left, factors.A))
        self._numbers += left.numel() + factors.A.numel()
        if self._numbers >= math.prod(self._size):
            self._make_dense()

    def squared_norm(self) -> float:
        """The squared Frobenius norm of the sum."""
        if self._dense is not None or self._numbers > math.prod(self._size) / 2:  # quicker by then
            dense = self._make_dense().flatten()
            return float(dense.dot(dense))
        if not self._factors:
            return 0.0
        left, right = (side.double() for side in self._sides())
        return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))

    def _sides(self) -> tuple[Tensor, Tensor]:
        lefts, rights = zip(*self._factors, strict=True)
        return torch.cat(lefts, dim=1), torch.cat(rights).float()

    def _make_dense(self) -> Tensor:
        if self._dense is None:
            self._dense = torch.zeros(self._size)
        if self._factors:
            self._dense.addmm_(*self._sides())
        self._factors, self._numbers = [], 0
        return self._dense
