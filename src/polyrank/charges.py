"""What a run has spent of its privacy budget: written down, and on disk, before anything is released.

    privacy.key      secret: noise and cohorts are drawn from it          never give it away
    privacy.jsonl    one row per release, appended and synced first

A run that dies between charge and release has charged: it may overstate epsilon, never understate it. When
the round is done again, the very same sum gets the very same noise, which is the same release and costs
nothing. Another sum (a client failed this time) gets new noise and is charged in full, without credit for
sampling, because its cohort is that of the first. A record that lacks rounds, or that this config cannot have
written, ends the run: what it spent is not known.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from polyrank import durable
from polyrank.accountant import Mechanism
from polyrank.errors import InputError, RunError

CHARGES, KEY = "privacy.jsonl", "privacy.key"


class BudgetError(RunError):
    """A release that the budget does not pay for; nothing of it left."""


@dataclass(frozen=True, slots=True)
class Charge:
    """One release that was paid for.

    Args:
        number: of the release in this run, from 0; also that of its noise.
        sum: keyed digest of what the noise is added to.
        amplified: whether sampling counted in its favour.
        epsilon: spent once this is released.
    """

    number: int
    round: int
    sum: str
    amplified: bool
    epsilon: float
    delta: float


class Charges:
    """The record of one run folder; made anew from the files whenever a run goes on.

    Args:
        budget: the epsilon that may be spent.
        noise_seed: draw everything from this number instead of a secret one, for experiments.

    Raises: InputError when the record cannot be read, or is not one of such releases.
    """

    def __init__(self, folder: Path, mechanism: Mechanism, budget: float, noise_seed: int | None) -> None:
        self.mechanism = mechanism
        self.budget = budget
        self._path = folder / CHARGES
        with durable.disk_errors(folder):
            seeded = None if noise_seed is None else hashlib.sha256(b"%d" % noise_seed).digest()
            self.key = seeded or secret(folder)
            self.made = read_charges(self._path)
        if self.made:
            self._check(self.made[-1])

    def charge(self, round_: int, content: bytes) -> Charge:
        """Pay for the release of one sum; on disk when this returns.

        Raises: BudgetError when it would pass the budget; nothing is written then.
        """
        name = hashlib.blake2b(content, key=self.key, digest_size=16).hexdigest()
        before = [charge for charge in self.made if charge.round == round_]
        for charge in before:
            if charge.sum == name:
                return charge
        epsilon = self._epsilon([*self.made_in(), round_])
        if epsilon > self.budget:
            left = f"round {round_} would take epsilon to {epsilon:.4g}, the budget is {self.budget:g}"
            raise BudgetError(f"privacy: {left}; nothing of it was released")
        charge = Charge(len(self.made), round_, name, not before, epsilon, self.mechanism.delta)
        with durable.disk_errors(self._path):
            durable.append(self._path, (json.dumps(asdict(charge)) + "\n").encode())
            durable.sync_folder(self._path.parent)
        self.made.append(charge)
        return charge

    def made_in(self) -> list[int]:
        """The round of each release so far."""
        return [charge.round for charge in self.made]

    def _epsilon(self, rounds: Sequence[int]) -> float:
        """What releases in these rounds cost: the first of a round has credit for sampling."""
        amplified = len(set(rounds))
        return self.mechanism.epsilon(amplified, len(rounds) - amplified)

    def _check(self, last: Charge) -> None:
        """The record must be of this very mechanism: what was spent with less noise is not known otherwise.

        Raises: InputError when it is not.
        """
        expected = self._epsilon(self.made_in())
        if last.delta != self.mechanism.delta or not math.isclose(last.epsilon, expected, rel_tol=1e-6):
            allowed = (
                f"says epsilon {last.epsilon:.4g} where {len(self.made)} releases by this config take "
                f"{expected:.4g}; what was spent is not known any more"
            )
            raise InputError(CHARGES, str(self._path), allowed)


def read_charges(path: Path) -> list[Charge]:
    """All charges of a record; a last line that was never finished is cut off, its release never came.

    Raises: InputError when the record was damaged.
    """
    if not path.exists():
        return []
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        with path.open("r+b") as file:
            file.truncate(len(whole) + bool(whole))
            os.fsync(file.fileno())
    try:
        charges = [Charge(**json.loads(line)) for line in whole.splitlines()]
        if [charge.number for charge in charges] != list(range(len(charges))):
            raise ValueError("charges are missing")
    except (ValueError, TypeError) as error:
        raise InputError(CHARGES, str(path), "is damaged; what was spent is not known any more") from error
    return charges


def secret(folder: Path) -> bytes:
    """The key of a run folder; drawn when it is asked for first, and readable by its owner alone."""
    path = folder / KEY
    if not path.exists():
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
        durable.sync_folder(folder)
    key = path.read_bytes()
    if len(key) != 32:
        raise InputError(KEY, str(path), "must hold 32 bytes")
    return key
