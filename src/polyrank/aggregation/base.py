"""What every aggregation rule shares: client weights, and means over clients in factor space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyrank.adapter import Adapter, Factors, Head
from polyrank.messages import ClientUpdate

Weights = Literal["examples", "uniform"]


@dataclass(frozen=True, slots=True)
class Aggregated:
    """What a rule hands back: the next bank, the next head, and what joins the frozen weights."""

    adapter: Adapter
    head: Head
    fold: Adapter | None = None


def client_weights(updates: Sequence[ClientUpdate], by: Weights) -> list[float]:
    """p_k of each update: its share of the examples, or 1 / K. They sum to 1."""
    counts = [update.num_examples if by == "examples" else 1 for update in updates]
    return [count / sum(counts) for count in counts]


def mean_head(updates: Sequence[ClientUpdate], weights: Sequence[float], like: Head) -> Head:
    """Weighted mean of the heads, tensor by tensor."""
    return {name: _sum_scaled([update.head[name] for update in updates], weights) for name in like}


def slot_mean(
    like: Adapter,
    updates: Sequence[ClientUpdate],
    weights: Sequence[float],
    *,
    over_holders: bool = True,
) -> Adapter:
    """Per slot and factor, sum_k p_k X_k over the clients that trained the slot.

    A slot that nobody trained keeps its value. One update is read at a time, so memory does not
    grow with their number; values narrower than float32 are widened on the way in.

    Args:
        like: the bank.
        weights: p_k by update.
        over_holders: divide by P_j, the weight of the slot's holders; otherwise the others count as 0.
    """
    sums = SlotSums(like)
    for update, weight in zip(updates, weights, strict=True):
        sums.add(update, weight)
    return sums.mean() if over_holders else sums.total()


class SlotSums:
    """Running sums of one cohort: sum_k p_k X_kj and P_j = sum_k p_k, over the holders of each slot."""

    def __init__(self, like: Adapter) -> None:
        self.like = like
        self.mass = {n: torch.zeros(f.rank, dtype=torch.float64) for n, f in like.modules.items()}
        self.sums = {
            name: {part: torch.zeros_like(t) for part, t in factors.tensors().items()}
            for name, factors in like.modules.items()
        }

    def add(self, update: ClientUpdate, weight: float) -> None:
        """Count one update in."""
        for name, factors in update.adapter.modules.items():
            mask = update.mask[name]
            self.mass[name][mask] += weight
            for part, tensor in factors.tensors().items():
                total = slots_first(self.sums[name][part], part)
                new = slots_first(tensor, part).to(total.dtype)
                if bool(mask.all()):
                    total.add_(new, alpha=weight)
                else:
                    total.index_add_(0, mask.nonzero().squeeze(1), new, alpha=weight)

    def total(self) -> Adapter:
        """The sums where a slot has a holder, the old values elsewhere."""
        return self._over({name: torch.ones_like(mass) for name, mass in self.mass.items()})

    def mean(self) -> Adapter:
        """The sums over P_j where a slot has a holder, the old values elsewhere."""
        return self._over(self.mass)

    def _over(self, divisors: dict[str, Tensor]) -> Adapter:
        modules = {}
        for name, bank in self.like.modules.items():
            covered = self.mass[name] > 0
            values = {}
            for part, old in bank.tensors().items():
                value = old.clone()
                rows = slots_first(self.sums[name][part], part)[covered]
                divisor = divisors[name][covered].to(rows.dtype)
                slots_first(value, part)[covered] = rows / divisor.view(-1, *[1] * (rows.ndim - 1))
                values[part] = value
            modules[name] = bank.with_tensors(values)
        return Adapter(self.like.form, modules)


def slots_first(tensor: Tensor, part: str) -> Tensor:
    """A view with the slot axis in front: B is [O, R], A is [R, I], e is [R]."""
    return tensor.T if part == "B" else tensor


def product_norm(factors: Factors) -> float:
    """Frobenius norm of scale * B diag(e) A, without building it."""
    B = factors.B if factors.e is None else factors.B * factors.e
    squared = ((B.T.double() @ B.double()) * (factors.A.double() @ factors.A.T.double())).sum()
    return factors.scale * float(squared.clamp(min=0).sqrt())


def _sum_scaled(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total
