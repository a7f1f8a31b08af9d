"""What a run is judged by: which two numbers, how they are called, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Measure:
    """One number that a model is judged by.

    Args:
        key: its name in rows and tables; ``test_`` stands before it where test texts were scored.
        title: its name for people.
        spec: how it is written alone.
        rises: whether more is better.
    """

    key: str
    title: str
    spec: str = ".3f"
    rises: bool = True

    @property
    def on_test(self) -> str:
        return f"test_{self.key}"

    def reaches(self, value: float, target: float) -> bool:
        """Whether a value is as good as a target."""
        return value >= target if self.rises else value <= target


Measures = tuple[Measure, Measure]
"""The one that leads, and a second."""
MEASURES: Mapping[str, Measures] = {
    "classification": (Measure("accuracy", "accuracy", ".1%"), Measure("macro_f1", "macro-F1")),
    "causal_lm": (
        Measure("perplexity", "perplexity", rises=False),
        Measure("token_accuracy", "token accuracy", ".1%"),
    ),
}
"""By task."""
SCORE_NAMES = {task: frozenset({"loss", *(one.key for one in both)}) for task, both in MEASURES.items()}
"""Names of all numbers that a model is scored by, by task."""


def measures_of(row: Mapping[str, Any], prefix: str = "test_") -> Measures | None:
    """What a row or a summary was judged by; None where it holds no scores."""
    return next((both for both in MEASURES.values() if f"{prefix}{both[0].key}" in row), None)


def judged(row: Mapping[str, Any]) -> Measures:
    """The same of a row that is known to hold scores."""
    found = measures_of(row)
    assert found is not None, "there are no scores"
    return found


def told(summary: Mapping[str, Any]) -> str:
    """The result of a run in a few words."""
    numbers = ", ".join(f"{m.title} {summary[m.on_test]:.3f}" for m in judged(summary))
    majority = summary.get("majority_rate")
    return numbers if majority is None else f"{numbers} (majority class {majority:.3f})"
