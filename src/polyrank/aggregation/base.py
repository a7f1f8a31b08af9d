"""What every aggregation rule shares: client weights, and means over clients in factor space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from polyrank.adapter import Adapter, Factors, Head
from polyrank.messages import ClientUpdate
from polyrank.state import ServerState

Weights = Literal["examples", "uniform"]
GROUP = 16
"""Updates that wait for each other, so that one pass over the large sums serves all of them."""
APART = 64
"""Numbers between two rows of a stack: rows a power of two apart would share the same lines of the cache."""


@dataclass(frozen=True, slots=True)
class Aggregated:
    """What a rule hands back: the next bank, the next head, and what joins the frozen weights.

    Args:
        notes: what else belongs into the round's row.
    """

    adapter: Adapter
    head: Head
    fold: Adapter | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


class Rule(Protocol):
    """Turns the updates of a cohort into the next model."""

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Aggregate one cohort."""
        ...


def client_weights(updates: Iterable[ClientUpdate], by: Weights) -> list[float]:
    """p_k of each update: its share of the examples, or 1 / K. They sum to 1."""
    counts = [count_of(update, by) for update in updates]
    return [count / sum(counts) for count in counts]


def count_of(update: ClientUpdate, by: Weights) -> int:
    """An update's weight before it is divided by the sum of all."""
    return update.num_examples if by == "examples" else 1


def mean_head(updates: Iterable[ClientUpdate], weights: Sequence[float], like: Head) -> Head:
    """Weighted mean of the heads, tensor by tensor."""
    sums = HeadSums(like)
    for update, weight in zip(updates, weights, strict=True):
        sums.add(update.head, weight)
    return sums.mean()


def sums_of(state: ServerState, updates: Iterable[ClientUpdate], by: Weights) -> tuple[SlotSums, HeadSums]:
    """The sums of slots and heads, in one pass that reads each update once."""
    slots, head = SlotSums(state.adapter), HeadSums(state.head)
    for update in updates:
        slots.add(update, count_of(update, by))
        head.add(update.head, count_of(update, by))
    return slots, head


class HeadSums:
    """Running sums over heads: sum_k w_k H_k and sum_k w_k."""

    def __init__(self, like: Head) -> None:
        self.whole = 0.0
        self._sums = {name: torch.zeros_like(tensor) for name, tensor in like.items()}

    def add(self, head: Head, weight: float) -> None:
        """Count one head in."""
        self.whole += weight
        for name, total in self._sums.items():
            total.add_(head[name].to(total.dtype), alpha=weight)

    def mean(self) -> Head:
        """The weighted mean."""
        return {name: total / self.whole for name, total in self._sums.items()}


class SlotSums:
    """Running sums of one cohort: sum_k w_k X_kj and the weight of the holders of each slot.

    Updates that hold the same slots wait until there are GROUP of them. Then, tensor by tensor, they are
    widened into one stack that the cache holds, and a matrix-vector product adds them up: the large sums
    are read and written once per group. Adding one by one takes two to three times as long. All that
    wait hold at most as many slots as GROUP banks, whatever the number of clients.

    Args:
        like: the bank; its slots that nobody holds keep their value.
    """

    def __init__(self, like: Adapter) -> None:
        self.like = like
        self.whole = 0.0
        self._waiting: dict[bytes, list[tuple[ClientUpdate, float]]] = {}
        self._room = GROUP * sum(factors.rank for factors in like.modules.values())
        self._mass = {n: torch.zeros(f.rank, dtype=torch.float64) for n, f in like.modules.items()}
        self._sums = {
            name: {part: torch.zeros_like(t) for part, t in factors.tensors().items()}
            for name, factors in like.modules.items()
        }
        tensors = [t for factors in like.modules.values() for t in factors.tensors().values()]
        self._stack = Stack(max(t.numel() for t in tensors), tensors[0].dtype)

    def add(self, update: ClientUpdate, weight: float) -> None:
        """Count one update in."""
        self.whole += weight
        mask = torch.cat([update.mask[name] for name in self.like.modules]).numpy().tobytes()
        alike = self._waiting.setdefault(mask, [])
        alike.append((update, weight))
        self._room -= mask.count(1)
        if len(alike) == GROUP:
            self._count(mask)
        while self._room < 0:
            self._count(max(self._waiting, key=lambda mask: len(self._waiting[mask])))

    def shares(self) -> dict[str, Tensor]:
        """P_j of each slot: the share of its holders in the weight of all."""
        self._count_waiting()
        return {name: mass / self.whole for name, mass in self._mass.items()}

    def mean(self) -> Adapter:
        """The mean over the holders of each slot, the old values where there are none."""
        self._count_waiting()
        return self._over(self._mass)

    def mean_with_zeros(self) -> Adapter:
        """The mean over all clients, with zeros for those that do not hold a slot that others hold."""
        self._count_waiting()
        return self._over({name: torch.full_like(m, self.whole) for name, m in self._mass.items()})

    def _count_waiting(self) -> None:
        for mask in list(self._waiting):
            self._count(mask)

    def _count(self, mask: bytes) -> None:
        """Count in the waiting updates that hold these slots."""
        updates, weights = zip(*self._waiting.pop(mask), strict=True)
        self._room += len(updates) * mask.count(1)
        scales = torch.tensor(weights, dtype=self._stack.dtype)
        for name in updates[0].adapter.modules:
            slots = _slots(updates[0].mask[name])
            self._mass[name][slots] += sum(weights)
            held = [update.adapter.modules[name] for update in updates]
            for part, total in self._sums[name].items():
                new = self._stack.weighted_sum([getattr(factors, part) for factors in held], scales)
                _add_slots(slots_first(total, part), slots, slots_first(new, part))

    def _over(self, divisors: Mapping[str, Tensor]) -> Adapter:
        modules = {}
        for name, bank in self.like.modules.items():
            covered = self._mass[name] > 0
            values = {}
            for part, old in bank.tensors().items():
                value = old.clone()
                rows = slots_first(self._sums[name][part], part)[covered]
                divisor = divisors[name][covered].to(rows.dtype)
                slots_first(value, part)[covered] = rows / divisor.view(-1, *[1] * (rows.ndim - 1))
                values[part] = value
            modules[name] = bank.with_tensors(values)
        return Adapter(self.like.form, modules)


class Stack:
    """Memory in which a few tensors of one shape are widened and added up, used again by every call.

    Args:
        numbers: how many the largest tensor has.
    """

    def __init__(self, numbers: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._memory = torch.empty((GROUP + 1) * (numbers + APART), dtype=dtype)
        self._views: dict[tuple[int, torch.Size], tuple[Sequence[Tensor], Tensor]] = {}

    def weighted_sum(self, tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
        """sum_k w_k X_k, valid until the next call."""
        key = (len(tensors), tensors[0].shape)
        if key not in self._views:
            self._views[key] = self._cut(*key)
        rows, columns = self._views[key]
        for row, tensor in zip(rows, tensors, strict=False):
            row.copy_(tensor)
        torch.mv(columns, weights, out=rows[-1].view(-1))
        return rows[-1]

    def _cut(self, number: int, shape: torch.Size) -> tuple[Sequence[Tensor], Tensor]:
        """That many tensors and one more for the result, and the many as columns of a matrix."""
        size = shape.numel()
        flat = self._memory[: (number + 1) * (size + APART)].view(number + 1, -1)[:, :size]
        return [row.view(shape) for row in flat], flat[:-1].T


def _slots(mask: Tensor) -> slice | Tensor:
    """The held slots: as a slice where they stand side by side, which is much faster to add to."""
    held = np.flatnonzero(mask.numpy())
    first, last = int(held[0]), int(held[-1])
    return slice(first, last + 1) if last - first + 1 == held.size else torch.from_numpy(held)


def _add_slots(total: Tensor, slots: slice | Tensor, new: Tensor) -> None:
    if isinstance(slots, slice):
        total[slots].add_(new)
    else:
        total.index_add_(0, slots, new)


def blend(first: Adapter, second: Adapter, share: Mapping[str, Tensor]) -> Adapter:
    """Each slot moved from its value in ``first`` toward that in ``second`` by its share, [R] per module."""
    modules = {}
    for name, old in first.modules.items():
        moved = {}
        for part, tensor in old.tensors().items():
            value, target = tensor.clone(), slots_first(second.modules[name].tensors()[part], part)
            weight = share[name].to(value.dtype).view(-1, *[1] * (value.ndim - 1))
            slots_first(value, part).lerp_(target, weight)
            moved[part] = value
        modules[name] = old.with_tensors(moved)
    return Adapter(first.form, modules)


def slots_first(tensor: Tensor, part: str) -> Tensor:
    """A view with the slot axis in front: B is [O, R], A is [R, I], e is [R]."""
    return tensor.T if part == "B" else tensor


def product_norm(factors: Factors) -> float:
    """Frobenius norm of scale * B diag(e) A, without building it."""
    B = factors.B if factors.e is None else factors.B * factors.e
    squared = ((B.T.double() @ B.double()) * (factors.A.double() @ factors.A.T.double())).sum()
    return factors.scale * float(squared.clamp(min=0).sqrt())
