"""voting: clients say which slots matter, the server keeps those, and the others are gone for good.

Source: FedARA (Wu et al., IEEE TC 2026, arXiv 2501.14406), dynamic rank allocation and module pruning.

    budget       b(t) = b_T + (b_0 - b_T) (1 - x)^3      x from 0 to 1 between the first and last rounds
    vote         client k holds h_k of the n active slots, and marks the b_k = b(t) h_k / n (rounded, at least
                 one) that it scores highest, over all modules together: M_k
    share        v_j = sum_k w_k M_kj / sum_k w_k        over the clients that held slot j, else its last
    arbitration  threshold: keep v_j >= T_h, and at least b_T slots;  top: keep exactly b(t)

Slots that were dropped stay dropped; a module without slots is detached: no matmul, no gradient, no
optimiser state, no bytes. A slot that nobody has voted on yet counts as wanted by all where somebody has
trained it; where nobody has, its product is zero, and it keeps its place only as long as b(t) has room.
``kind = "adalora"`` is the baseline: AdaLoRA (Zhang et al., arXiv 2303.10512) run on each client. Its mask
zeroes e of the low-scored slots during local training, they may come back, and everything travels.
Differs: ties in a vote go to the larger slot of the merged bank (|e| |B| |A|), because scores do not travel;
the schedule's end points, the weights w_k (examples), and what is asked of a client that holds a part of the
slots, and done about a slot that nobody held, are ours. With b(t) votes for everybody, a device that holds
fewer would want all it holds, and its vote would say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from polyrank.adapter import Adapter, RankMask, mask_and, mask_minus, num_slots, prefix_mask
from polyrank.importance import Importance
from polyrank.messages import Ballot
from polyrank.schema import Schema
from polyrank.state import ServerState

Share = Annotated[float, Field(ge=0, le=1)]


class Voting(Schema):
    """How the number of active slots falls from all of them to ``target_rank`` per module on average."""

    kind: Literal["fedara", "adalora"] = "fedara"
    target_rank: Annotated[float, Field(gt=0)] = 4.0
    """Slots per module in the end, averaged over the modules: b_T = target_rank x modules."""
    importance: Importance = "sensitivity"
    arbitration: Literal["threshold", "top"] = "threshold"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    schedule: Literal["cubic", "linear"] = "cubic"
    warmup_share: Share = 0.1
    """Share of the rounds before the budget begins to fall."""
    final_share: Share = 0.3
    """Share of the rounds at the end over which it stays at its lowest."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.85
    """b1 and b2: how much of the old averages a local step keeps."""

    def budget(self, bank: Adapter, round_: int, rounds: int) -> int:
        """b(t): slots that may stay once round ``round_`` is over."""
        first = sum(factors.rank for factors in bank.modules.values())
        last = min(first, max(1, round(self.target_rank * len(bank.modules))))
        warm, final = self.warmup_share * rounds, self.final_share * rounds
        falling = max(rounds - warm - final, 1e-9)
        x = min(1.0, max(0.0, (round_ + 1 - warm) / falling))
        left = (1 - x) ** 3 if self.schedule == "cubic" else 1 - x
        return round(last + (first - last) * left)

    def ballot(self, state: ServerState, held: RankMask, rounds: int) -> Ballot | None:
        """What a client is asked about the slots it trains; nothing while every active slot may stay."""
        budget, active = self.budget(state.adapter, state.round, rounds), num_slots(state.active)
        if budget >= active:
            return None
        own = max(1, round(budget * num_slots(held) / active))
        return Ballot(own, self.importance, self.smoothing, self.kind == "adalora")

    def arbitrate(
        self, bank: Adapter, active: RankMask, shares: RankShares, round_: int, rounds: int
    ) -> RankMask:
        """The slots that stay active.

        Args:
            bank: after aggregation.
            shares: v_j by slot; NaN where nobody has voted on it yet.
        """
        budget = self.budget(bank, round_, rounds)
        if self.arbitration == "top":
            return strongest(bank, active, shares, budget)
        floor, wanted = min(budget, self.budget(bank, rounds, rounds)), votes_of(bank, shares)
        kept: RankMask = {name: held & (wanted[name] >= self.threshold) for name, held in active.items()}
        if num_slots(kept) < floor:
            kept = strongest(bank, active, shares, floor)
        untried = {name: held & (wanted[name] == _UNTRIED) for name, held in mask_minus(active, kept).items()}
        room = strongest(bank, untried, shares, max(0, budget - num_slots(kept)))
        return {name: held | room[name] for name, held in kept.items()}


_UNTRIED = -1.0
"""Stands for the share of a slot that nobody has trained or voted on."""
RankShares = Mapping[str, Tensor]
"""One number per slot of the bank by module, [R]."""


def vote_shares(
    active: RankMask, held: Sequence[RankMask], votes: Sequence[RankMask], weights: Sequence[float]
) -> RankShares:
    """v_j: weight of the clients that voted for a slot over the weight of those that held it."""
    shares = {}
    for name, slots in active.items():
        mass, voted = (torch.zeros(slots.numel(), dtype=torch.float64) for _ in range(2))
        for mask, marked, weight in zip(held, votes, weights, strict=True):
            mass[mask[name]] += weight
            voted[marked[name]] += weight
        shares[name] = voted / mass  # 0 / 0 is NaN
    return shares


def last_known(shares: RankShares, before: RankShares) -> RankShares:
    """The shares, and where nobody held a slot, those that it got last."""
    return {
        name: torch.where(now.isnan(), before[name], now) if name in before else now
        for name, now in shares.items()
    }


def votes_of(bank: Adapter, shares: RankShares) -> RankShares:
    """The shares without gaps: 1 for a slot trained but never voted on, less than any for the rest."""
    return {
        name: torch.where(known.isnan(), torch.where(slot_norms(bank, name) > 0, 1.0, _UNTRIED), known)
        for name, known in shares.items()
    }


def strongest(bank: Adapter, active: RankMask, shares: RankShares, count: int) -> RankMask:
    """The ``count`` active slots with the most votes; ties go to the larger slot, then to the earlier."""
    places = [(name, int(slot)) for name, held in active.items() for slot in held.nonzero().squeeze(1)]
    sizes, wanted = {name: slot_norms(bank, name) for name in active}, votes_of(bank, shares)

    def rank(place: tuple[str, int]) -> tuple[float, float]:
        name, slot = place
        return -float(wanted[name][slot]), -float(sizes[name][slot])

    kept = {name: torch.zeros_like(held) for name, held in active.items()}
    for name, slot in sorted(places, key=rank)[:count]:
        kept[name][slot] = True
    return kept


def best_slots(state: ServerState, rank: int) -> RankMask:
    """What a device holds that has room for ``rank`` slots per module: the first of each module, and once
    there was a vote, as many of the most voted active slots, wherever they are."""
    if not state.shares:
        return mask_and(state.active, prefix_mask(state.adapter, rank))
    return strongest(state.adapter, state.active, state.shares, rank * len(state.active))


def slot_norms(bank: Adapter, name: str) -> Tensor:
    """|e_j| |B_j| |A_j| of every slot of a module, [R]."""
    factors = bank.modules[name]
    norms: Tensor = factors.B.norm(dim=0) * factors.A.norm(dim=1)
    return norms if factors.e is None else norms * factors.e.abs()
