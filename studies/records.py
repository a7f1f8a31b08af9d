"""What the cells of a study brought, one line each, in a file that is kept with the study.

A cell that is recorded is not run again, on any machine, while its config stays the same; so a study of many
hours can be stopped at any time, and its tables can be made anew without a single run.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studies.cells import Cells, finished, rounds_of


@dataclass(frozen=True)
class Record:
    """One finished run.

    Args:
        config: digest of its config, without where the data lie.
        commit: of the code that ran it.
        rounds: bytes in both directions and, where it was scored, test accuracy.
    """

    cell: str
    config: str
    commit: str
    accuracy: float
    slots: int
    wall_s: float
    rounds: list[tuple[int, float | None]]

    @property
    def megabytes(self) -> float:
        return sum(size for size, _ in self.rounds) / 1e6

    def megabytes_to(self, target: float) -> float | None:
        """Traffic until a scored round first reaches an accuracy; None where none does."""
        spent = 0.0
        for size, accuracy in self.rounds:
            spent += size / 1e6
            if accuracy is not None and accuracy >= target:
                return spent
        return None


def recorded(cells: Cells, out: Path, workers: int, path: Path) -> dict[str, Record]:
    """The records of all cells by name; those that the file lacks are run, and written as they finish."""
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
    return {row["cell"]: Record(**row) for row in map(json.loads, lines)}


def made_of(name: str, folder: Path, config: str, commit: str) -> Record:
    """The record of a run folder."""
    summary = json.loads((folder / "summary.json").read_text())
    rounds = [(row["bytes_down"] + row["bytes_up"], row.get("test_accuracy")) for row in rounds_of(folder)]
    scores = summary["test_accuracy"], summary["active_slots"], round(summary["wall_s"], 1)
    return Record(name, config, commit, *scores, rounds)


def digest(config: Mapping[str, Any]) -> str:
    """A short name for a config, the same wherever the data lie."""
    data = dict(config.get("data", {}))
    data["source"] = Path(data.get("source", "")).name
    return hashlib.sha256(json.dumps({**config, "data": data}, sort_keys=True).encode()).hexdigest()[:12]
