"""What the cells of a study brought, one line each, in a file that is kept with the study.

A cell that is recorded is not run again, on any machine, while its config stays the same; so a study of many
hours can be stopped at any time, and its tables can be made anew without a single run.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from studies.cells import Cells, digest, finished, rounds_of

_ROUND_KEYS = ("test_accuracy", "simulated_s", "energy_j")


class Round(NamedTuple):
    """Bytes in both directions, test accuracy where it was scored, and what simulated devices took."""

    bytes: int
    accuracy: float | None
    simulated_s: float | None
    energy_j: float | None


class Spent(NamedTuple):
    """What some rounds took; seconds and joules of simulated devices, 0 where there are none."""

    megabytes: float
    simulated_s: float
    energy_j: float


@dataclass(frozen=True)
class Record:
    """One finished run.

    Args:
        config: digest of its config, without where the data lie.
        commit: of the code that ran it.
        accuracy: of labels, or of a language model's response tokens.
        waiting_s: mean simulated seconds that a client waited for the slowest.
    """

    cell: str
    config: str
    commit: str
    accuracy: float
    slots: int
    wall_s: float
    waiting_s: float | None
    rounds: Sequence[Round]
    perplexity: float | None = None

    @property
    def spent(self) -> Spent:
        """What all rounds took."""
        return _spent(self.rounds)

    @property
    def megabytes(self) -> float:
        return self.spent.megabytes

    def spent_to(self, target: float) -> Spent | None:
        """What it took until a scored round first reached an accuracy; None where none does."""
        for count, one in enumerate(self.rounds, 1):
            if one.accuracy is not None and one.accuracy >= target:
                return _spent(self.rounds[:count])
        return None


def _spent(rounds: Sequence[Round]) -> Spent:
    return Spent(
        sum(one.bytes for one in rounds) / 1e6,
        sum(one.simulated_s or 0.0 for one in rounds),
        sum(one.energy_j or 0.0 for one in rounds),
    )


def recorded(cells: Cells, out: Path, workers: int, path: Path) -> dict[str, Record]:
    """The records of all cells by name; those that the file lacks are run, and written as they finish."""
    out.mkdir(parents=True, exist_ok=True)
    known = {name: one for name, one in read(path).items() if one.config == digest(cells.get(name, {}))}
    missing = {name: cell for name, cell in cells.items() if name not in known}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    for name in finished(missing, out, workers):
        known[name] = one = made_of(name, out / name, digest(cells[name]), commit)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(one)) + "\n")
    return {name: known[name] for name in cells}


def read(path: Path) -> dict[str, Record]:
    """All records of a file; of two of one cell the later."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["cell"]: Record(**{**row, "rounds": [Round(*one) for one in row["rounds"]]}) for row in rows}


def made_of(name: str, folder: Path, config: str, commit: str) -> Record:
    """The record of a run folder."""
    summary = json.loads((folder / "summary.json").read_text())
    rounds = [
        Round(row["bytes_down"] + row["bytes_up"], *(row.get(key) for key in _ROUND_KEYS))
        for row in rounds_of(folder)
    ]
    accuracy = summary.get("test_accuracy", summary.get("test_token_accuracy"))
    scores = accuracy, summary["active_slots"], round(summary["wall_s"], 1), summary.get("waiting_s")
    return Record(name, config, commit, *scores, rounds, summary.get("test_perplexity"))
