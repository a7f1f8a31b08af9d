"""robust: the mean over the holders of a slot, made safe against a few clients that lie.

Source: trimmed mean (Yin et al., ICML 2018, arXiv 1803.01498); clipping to the cohort's median norm as in
Sun et al. (arXiv 1911.07963); the holders' rule is ours.

    align      flip a slot's sign in both factors where that brings it back to the served side
    clip       C_k = X_k - X,   C_k <- C_k min(1, median_i rms(C_i) / rms(C_k))    all slots and head together
    trim       c_j = mean of the h_j - 2 f middle values over the h_j holders of slot j, number by number
    hold       c_j = 0 where h_j < 2 f + 1: a slot that f liars could carry stays as it is
    then       the rule mixes X + c as it would have mixed the holders' mean

Root mean squares instead of norms, so that a client of high rank is not clipped for having more numbers.
Aligning undoes (-B, -A), which no check of products can see and which ruins a mean of factors.
Works with: fedavg, replication_padding (cascade), layer_wise, random_slots, anchored in factor space, in both
forms and with any masks; all clients weigh the same. All updates of a cohort are held at once.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from polyrank.adapter import Adapter, Factors, mask_minus, num_slots
from polyrank.aggregation import Aggregated, Aggregation
from polyrank.changes import Change, agreeing, by_count, change_of, moved, places
from polyrank.errors import InputError
from polyrank.messages import ClientUpdate
from polyrank.schema import Schema
from polyrank.state import ServerState

LIMITS = (
    "robust mode withstands at most {attackers} lying clients in a cohort; a slot that fewer than {holders} "
    "clients of a cohort hold does not learn. Not prevented: small lies inside the spread of honest updates "
    "(backdoors), one party that runs many clients, and slots whose factors are rescaled or reordered, which "
    "are clipped and trimmed but not put right. Honest clients whose data are rare are trimmed as well."
)


class Robust(Schema):
    """Robust means in place of plain ones."""

    attackers: Annotated[int, Field(ge=1)] = 1
    """f: how many clients of one cohort may lie. Every slot needs 2 f + 1 holders to learn."""

    @property
    def holders(self) -> int:
        """The least number of holders of a slot that learns."""
        return 2 * self.attackers + 1

    def limits(self) -> str:
        """What this setting does not defend against."""
        return LIMITS.format(attackers=self.attackers, holders=self.holders)

    def check_cohort(self, clients: int) -> None:
        """Raises: InputError where no slot could ever learn."""
        if clients < self.holders:
            allowed = f"needs at least {self.holders} clients in a cohort (2 f + 1), found {clients}"
            raise InputError("robust.attackers", self.attackers, allowed)


@dataclass(frozen=True, slots=True)
class RobustMean:
    """A rule whose mean over holders is clipped and trimmed."""

    robust: Robust
    rule: Aggregation

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Aggregate one cohort."""
        f, least = self.robust.attackers, self.robust.holders
        changes = [change_of(aligned(update, state.adapter), state) for update in updates]
        factors = clip_factors(changes)
        changes = [scaled(change, factor) for change, factor in zip(changes, factors, strict=True)]
        learning = {
            name: torch.stack([change.mask[name] for change in changes]).sum(dim=0) >= least
            for name in state.adapter.modules
        }
        values = Adapter(
            state.adapter.form,
            {
                name: self._module(bank, [c for c in changes if name in c.modules], name, learning[name])
                for name, bank in state.adapter.modules.items()
            },
        )
        head = dict(state.head)
        if len(changes) >= least:
            for name, old in state.head.items():
                change = trimmed_mean(torch.stack([c.head[name] for c in changes]), f)
                head[name] = (old.double() + change).to(old.dtype)
        masks = [{name: held & learning[name] for name, held in change.mask.items()} for change in changes]
        merged = by_count(self.rule).aggregate(state, agreeing(values, head, masks))
        held = {name: torch.stack([c.mask[name] for c in changes]).any(dim=0) for name in learning}
        still = num_slots(mask_minus(held, learning))
        notes = {"clipped": sum(factor < 1 for factor in factors), "still_slots": still}
        return replace(merged, head=head, notes=notes)

    def _module(self, bank: Factors, changes: Sequence[Change], name: str, learning: Tensor) -> Factors:
        """One module, its slots moved by the trimmed means over their holders."""
        for holders, slots in same_holders([change.mask[name] for change in changes], learning):
            rows = [(changes[k].modules[name], places(changes[k].mask[name])[slots]) for k in holders]
            change = {
                part: trimmed_mean(
                    torch.stack([parts[part][at] for parts, at in rows]), self.robust.attackers
                )
                for part in bank.tensors()
            }
            bank = moved(bank, slots, change)
        return bank


def trimmed_mean(values: Tensor, cut: int) -> Tensor:
    """The mean over the first axis without the ``cut`` least and the ``cut`` greatest, number by number."""
    return values.sort(dim=0).values[cut : len(values) - cut].mean(dim=0)


def clip_factors(changes: Sequence[Change]) -> list[float]:
    """What brings each change down to the median root mean square of all."""
    sizes = [change.norm() / max(1, change.size()) ** 0.5 for change in changes]
    middle = statistics.median(sizes)
    return [1.0 if size <= middle else middle / size for size in sizes]


def scaled(change: Change, factor: float) -> Change:
    """The change times a factor."""
    if factor == 1:
        return change
    modules = {
        name: {part: t * factor for part, t in parts.items()} for name, parts in change.modules.items()
    }
    return Change(change.mask, modules, {name: t * factor for name, t in change.head.items()})


def same_holders(masks: Sequence[Tensor], wanted: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """The wanted slots in groups that the same clients hold: those clients and the slots, by number."""
    slots = wanted.nonzero().squeeze(1)
    if not slots.numel():
        return
    patterns, group = torch.unique(torch.stack(list(masks))[:, slots], dim=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        yield pattern.nonzero().squeeze(1).tolist(), slots[group == number]


def aligned(update: ClientUpdate, bank: Adapter) -> ClientUpdate:
    """The update with the sign of each slot's factors on the side of the served ones; products stay the same.

    Form ``lora`` has one sign per slot, shared by B and A. In form ``svd`` B and A each share one with e.
    """
    modules = {}
    for name, factors in update.adapter.modules.items():
        modules[name] = _aligned(factors, bank.modules[name], update.mask[name])
    return replace(update, adapter=Adapter(update.adapter.form, modules))


def _aligned(new: Factors, bank: Factors, mask: Tensor) -> Factors:
    far_B = (new.B * bank.B[:, mask]).sum(dim=0)
    far_A = (new.A * bank.A[mask]).sum(dim=1)
    if new.e is None:
        sign = torch.where((far_A < 0) & (far_B <= 0), -1.0, 1.0)
        return replace(new, B=new.B * sign, A=new.A * sign[:, None])
    sign_B, sign_A = (torch.where(far < 0, -1.0, 1.0) for far in (far_B, far_A))
    return replace(new, B=new.B * sign_B, e=new.e * sign_B * sign_A, A=new.A * sign_A[:, None])
