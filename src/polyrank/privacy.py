"""privacy: central differential privacy for the clients of a run.

Source: DP-FedAvg (McMahan et al., ICLR 2018, arXiv 1710.06963) with a fixed denominator; per slot, ours.

    C_k = (X_k - X) min(1, S / |X_k - X|)            all trained numbers of a client together, head included
    N_j = sum_{k in cohort} C_kj + Gaussian(0, (z S)^2)           once, on every slot that anybody may hold
    M_j = X_j + N_j / D_j,     D_j = (expected share of the population in a cohort) x (clients that hold j)
    then   the rule mixes M as it would have mixed the holders' mean, with the population's shares P_j

S is ``clip_norm``, z is ``noise_multiplier``. Who holds which slot follows from config and seed alone, so D_j
and P_j say nothing about data; how many a cohort really had stays out of the result. All clients weigh the
same. A client that failed counts as zero, and a round without any answer releases noise alone. A slot with
few holders gets a noisier mean: the noise of M_j is z S / D_j.
Works with: the rules of robust mode; see `config.py` for all that is refused and why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polyrank.accountant import Mechanism, require_accountant
from polyrank.adapter import Adapter, Head, ModuleName
from polyrank.aggregation import Aggregated, Aggregation
from polyrank.aggregation.base import slots_first
from polyrank.allocation import Allocation
from polyrank.changes import agreeing, by_count, change_of, moved
from polyrank.charges import Charges
from polyrank.errors import InputError
from polyrank.messages import ClientUpdate
from polyrank.sampling import SamplePoisson, Sampling
from polyrank.schema import Schema
from polyrank.state import ServerState

Positive = Annotated[float, Field(gt=0)]


class Privacy(Schema):
    """Noise on the sum of clipped changes, until the budget is spent."""

    epsilon: Positive = 8.0
    """The budget: the run plans only rounds that stay within it."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    clip_norm: Positive = 1.0
    """S: a client's change is shortened to this norm."""
    noise_multiplier: Positive = 1.0
    """z: standard deviation of the noise over the clip norm."""
    noise_seed: Annotated[int, Field(ge=0)] | None = None
    """For experiments that must repeat: noise that anybody can draw again protects nobody."""

    def mechanism(self, sampling: Sampling) -> Mechanism:
        """What the accountant is told about a round."""
        rate = sampling.rate if isinstance(sampling, SamplePoisson) else None
        return Mechanism(self.noise_multiplier, rate, self.delta)

    def affordable(self, sampling: Sampling, rounds: int) -> int:
        """How many of the rounds the budget pays for.

        Raises: InputError when it pays for none, or dp-accounting is not installed.
        """
        require_accountant()
        mechanism = self.mechanism(sampling)
        count = mechanism.affordable(self.epsilon, rounds)
        if count == 0:
            raise InputError("privacy.epsilon", self.epsilon, f"one round takes {mechanism.epsilon(1):.4g}")
        return count

    def open(self, folder: Path, sampling: Sampling) -> Charges:
        """The record of what a run spends, in its folder."""
        return Charges(folder, self.mechanism(sampling), self.epsilon, self.noise_seed)


@dataclass(frozen=True)
class PrivateMean:
    """A rule whose mean over holders is a noisy sum over a fixed denominator.

    Args:
        share: expected share of the population in a cohort.
    """

    privacy: Privacy
    rule: Aggregation
    allocation: Allocation
    share: float
    charges: Charges

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Aggregate one cohort, which may be empty.

        Raises: BudgetError when the budget does not pay for it.
        """
        sums = clipped_sum(state, updates, self.privacy.clip_norm)
        deviation = self.privacy.noise_multiplier * self.privacy.clip_norm
        charge = self.charges.charge(state.round, sums.content(deviation))  # on disk before any release
        sums.add_noise(deviation, self.charges.key, charge.number)
        masks = list(self.allocation.allocate(state, list(state.clients)).values())
        holders = {name: torch.stack([mask[name] for mask in masks]).sum(dim=0) for name in sums.modules}
        values = {}
        for name, bank in state.adapter.modules.items():
            slots = holders[name].nonzero().squeeze(1)
            divisor = self.share * holders[name][slots].double()
            change = {
                part: total[slots] / divisor.view(-1, *[1] * (total.ndim - 1))
                for part, total in sums.modules[name].items()
            }
            values[name] = moved(bank, slots, change)
        size = self.share * len(masks)
        head = {n: (old.double() + sums.head[n] / size).to(old.dtype) for n, old in state.head.items()}
        agreed = agreeing(Adapter(state.adapter.form, values), head, masks)
        merged = by_count(self.rule).aggregate(state, agreed)
        return replace(merged, head=head, notes={"epsilon": charge.epsilon, "delta": charge.delta})


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over clients, in float64: by module and part, slots first, and the head. Grows in place."""

    modules: Mapping[ModuleName, Mapping[str, Tensor]]
    head: Head

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, in a fixed order."""
        for parts in self.modules.values():
            yield from parts.values()
        yield from self.head.values()

    def content(self, deviation: float) -> bytes:
        """The numbers as bytes, and what besides them decides the noise that they get."""
        besides = f"{np.__version__} {deviation!r}".encode()
        return b"".join([besides, *(t.numpy().tobytes() for t in self.tensors())])

    def add_noise(self, deviation: float, key: bytes, number: int) -> None:
        """Add independent Gaussian noise to every number, the same for the same key and number."""
        entropy = np.random.SeedSequence(int.from_bytes(key), spawn_key=(number,))
        draw = np.random.default_rng(entropy)
        for tensor in self.tensors():
            tensor.add_(torch.from_numpy(draw.normal(0.0, deviation, tuple(tensor.shape))))


def clipped_sum(state: ServerState, updates: Iterable[ClientUpdate], most: float) -> Sums:
    """The sum of the clients' changes, each shortened to a norm of at most ``most``."""
    sums = Sums(
        {
            name: {
                p: torch.zeros_like(slots_first(t, p), dtype=torch.float64) for p, t in f.tensors().items()
            }
            for name, f in state.adapter.modules.items()
        },
        {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.head.items()},
    )
    for update in updates:
        change = change_of(update, state)
        norm = change.norm()
        factor = min(1.0, most / norm) if norm > 0 else 1.0
        for name, parts in change.modules.items():
            for part, tensor in parts.items():
                sums.modules[name][part][change.mask[name]] += factor * tensor
        for name, tensor in change.head.items():
            sums.head[name] += factor * tensor
    return sums
