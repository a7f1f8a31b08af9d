"""What noisy rounds cost in privacy, by the accountant of the dp-accounting package.

Unit: one client. Neighbouring: the same population (names, tiers), one client's changes counted or taken
for zero ("zero-out", REPLACE_SPECIAL in dp-accounting), at most ``clip_norm`` apart in the sum of a round.

    amplified    PoissonSampled(rate, Gaussian(noise_multiplier))  ``sampling.kind = "poisson"``
    plain        Gaussian(noise_multiplier)                            everything else

A cohort of fixed size gets no credit for being drawn at random: the exact value is not among what the PLD
accountant computes, and leaving the draw out can only overstate epsilon.
"""

from __future__ import annotations

import functools
import importlib.util
from bisect import bisect_right
from dataclasses import dataclass

from polyrank.errors import InputError


@dataclass(frozen=True, slots=True)
class Mechanism:
    """What is the same in every round of a run.

    Args:
        noise_multiplier: standard deviation of the noise over the clip norm.
        rate: each client's chance of being in a cohort, where cohorts are Poisson samples; else None.
        delta: of (epsilon, delta).
    """

    noise_multiplier: float
    rate: float | None
    delta: float

    def epsilon(self, amplified: int, plain: int = 0) -> float:
        """Epsilon after so many releases of either kind."""
        return (
            _epsilon(self, amplified, plain)
            if self.rate is not None
            else _epsilon(self, 0, amplified + plain)
        )

    def affordable(self, budget: float, rounds: int) -> int:
        """How many of some rounds stay within a budget."""
        return bisect_right(range(1, rounds + 1), budget, key=self.epsilon)


def require_accountant() -> None:
    """Raises: InputError where dp-accounting is not installed."""
    if importlib.util.find_spec("dp_accounting") is None:
        allowed = "needs the package dp-accounting; pip install 'polyrank[privacy]'"
        raise InputError("privacy", "dp-accounting not found", allowed)


@functools.cache
def _epsilon(mechanism: Mechanism, amplified: int, plain: int) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    noise = dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    if amplified:
        accountant.compose(dp_accounting.PoissonSampledDpEvent(mechanism.rate, noise), amplified)
    if plain:
        accountant.compose(noise, plain)
    return float(accountant.get_epsilon(mechanism.delta))
