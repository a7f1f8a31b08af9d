"""What a client changed of the served model: the common ground of robust and private means.

Both replace the mean over the holders of a slot and leave the rest of a rule as it is: they settle on one
change per slot, and `agreeing` hands the rule updates that all say just that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from polyrank.adapter import Adapter, Factors, Head, ModuleName, RankMask, restrict
from polyrank.aggregation import Aggregation
from polyrank.aggregation.base import slots_first
from polyrank.messages import ClientUpdate
from polyrank.state import ServerState


@dataclass(frozen=True, slots=True)
class Change:
    """An update minus what was served: the held slots and the head.

    Args:
        modules: by module and part; the first axis runs over the held slots (B is [r, O]).
    """

    mask: RankMask
    modules: Mapping[ModuleName, Mapping[str, Tensor]]
    head: Head

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor: module after module, then the head."""
        for parts in self.modules.values():
            yield from parts.values()
        yield from self.head.values()

    def norm(self) -> float:
        """Euclidean norm over everything together, added up in float64."""
        return math.sqrt(math.fsum(float(t.double().square().sum()) for t in self.tensors()))

    def size(self) -> int:
        """How many numbers it has."""
        return sum(tensor.numel() for tensor in self.tensors())


def change_of(update: ClientUpdate, state: ServerState) -> Change:
    """The change of one update; float64, so that nothing is lost by the difference."""
    modules = {}
    for name, factors in update.adapter.modules.items():
        bank, held = state.adapter.modules[name].tensors(), update.mask[name]
        modules[name] = {
            part: slots_first(new, part).double() - slots_first(bank[part], part)[held].double()
            for part, new in factors.tensors().items()
        }
    head = {name: update.head[name].double() - old.double() for name, old in state.head.items()}
    return Change(update.mask, modules, head)


def places(mask: Bool[Tensor, " R"]) -> Int[Tensor, " R"]:
    """Where each slot of the bank stands among the held ones; meaningless for the others."""
    return mask.cumsum(0) - 1


def moved(bank: Factors, slots: Tensor, change: Mapping[str, Tensor]) -> Factors:
    """A module with a change added to some of its slots.

    Args:
        slots: which, by number.
        change: by part, the first axis over these slots.
    """
    values = {}
    for part, old in bank.tensors().items():
        value = old.clone()
        rows = slots_first(value, part)
        rows[slots] = (rows[slots].double() + change[part]).to(value.dtype)
        values[part] = value
    return bank.with_tensors(values)


def agreeing(values: Adapter, head: Head, masks: Sequence[RankMask]) -> list[ClientUpdate]:
    """Updates that say the same of every slot they hold; one stands for all that hold the same slots."""
    groups: Counter[bytes] = Counter()
    by_bits = {}
    for mask in masks:
        bits = torch.cat(list(mask.values())).numpy().tobytes()
        groups[bits] += 1
        by_bits[bits] = mask
    return [
        ClientUpdate(0, "", by_bits[bits], restrict(values, by_bits[bits]), head, count, {})
        for bits, count in groups.items()
    ]


def by_count(rule: Aggregation) -> Aggregation:
    """The rule that counts each of the clients behind `agreeing` updates once."""
    return rule.model_copy(update={"weights": "examples"})
