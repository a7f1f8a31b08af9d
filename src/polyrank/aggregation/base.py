"""What every aggregation rule shares: client weights, and means over clients."""

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
    """What a rule hands back: the next bank and the next head."""

    adapter: Adapter
    head: Head


def client_weights(updates: Sequence[ClientUpdate], by: Weights) -> list[float]:
    """p_k of each update: its share of the examples, or 1 / K. They sum to 1."""
    counts = [update.num_examples if by == "examples" else 1 for update in updates]
    return [count / sum(counts) for count in counts]


def mean_head(updates: Sequence[ClientUpdate], weights: Sequence[float], like: Head) -> Head:
    """Weighted mean of the heads, tensor by tensor."""
    return {name: sum_scaled([update.head[name] for update in updates], weights) for name in like}


def slot_mean(like: Adapter, updates: Sequence[ClientUpdate], weights: Sequence[float]) -> Adapter:
    """Per slot and factor, the mean over the clients that hold the slot; a slot nobody holds stays.

    Args:
        like: the bank; its values stand where nobody holds a slot.
        weights: p_k by update; renormalised over the holders of each slot.
    """
    modules = {}
    for name, bank in like.modules.items():
        held = [
            (update.mask[name], update.adapter.modules[name], weight)
            for update, weight in zip(updates, weights, strict=True)
            if name in update.adapter.modules
        ]
        modules[name] = _module_mean(bank, held) if held else bank
    return Adapter(like.form, modules)


def _module_mean(bank: Factors, held: Sequence[tuple[Tensor, Factors, float]]) -> Factors:
    mass = torch.zeros(bank.rank, dtype=torch.float64)
    sums = {name: torch.zeros_like(tensor) for name, tensor in bank.tensors().items()}
    for mask, factors, weight in held:
        mass[mask] += weight
        for name, tensor in factors.tensors().items():
            _slots_first(sums[name], name)[mask] += weight * _slots_first(tensor, name)
    covered = mass > 0
    means = {}
    for name, tensor in bank.tensors().items():
        mean = tensor.clone()
        rows = _slots_first(sums[name], name)[covered]
        divisor = mass[covered].to(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))
        _slots_first(mean, name)[covered] = rows / divisor
        means[name] = mean
    return bank.with_tensors(means)


def _slots_first(tensor: Tensor, name: str) -> Tensor:
    """A view with the slot axis in front: B is [O, R], A is [R, I], e is [R]."""
    return tensor.T if name == "B" else tensor


def sum_scaled(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_k weights_k * tensors_k, all of one shape."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total
