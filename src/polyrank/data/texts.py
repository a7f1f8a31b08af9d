"""Labelled texts in memory, and the config table that says where they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from polyrank.schema import Schema

Turns = tuple[tuple[str, str], ...]
"""What was said before a response: role (system, user, assistant) and text of each turn."""

TextColumns = Annotated[tuple[str, ...], Field(min_length=1, max_length=2)]


class Data(Schema):
    """Where the texts come from.

    ``source`` is ``docstrings`` (built in), a local .csv, .tsv, .parquet or .jsonl file, a folder
    with ``train.*`` and ``test.*``, or ``hub:OWNER/NAME``.
    """

    source: str = "docstrings"
    subset: str | None = None
    """Configuration of a hub data set, where it has several."""
    test: str | None = None
    """A file of test texts, where the source is a file; without one, ``test_share`` of it is kept aside."""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    text: TextColumns | str = ("text",)
    """One text column, or two for a pair of texts."""
    label: str = "label"
    labels: tuple[str, ...] | None = None
    """Label names in order; without it, they are found in the data."""
    prompt: TextColumns | str | None = None
    """For ``task = "causal_lm"``: the column with the prompt, or two that make it up."""
    response: str | None = None
    """The column with the response to learn."""
    messages: str | None = None
    """A column of conversations instead: lists of messages with ``role`` and ``content``. Without any of
    these three, the columns are found by their usual names."""
    max_train: Annotated[int, Field(ge=1)] | None = None
    max_test: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        check_columns(self.prompt, self.response, self.messages)
        return self

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)


def check_columns(prompt: object, response: object, messages: object) -> None:
    """Raises: ValueError when columns of a language model's texts are named by halves, or in two ways."""
    if (prompt is None) != (response is None):
        raise ValueError("data.prompt and data.response go together")
    if messages is not None and prompt is not None:
        raise ValueError("data.messages goes without data.prompt and data.response")


@dataclass(frozen=True, slots=True)
class Texts:
    """Some labelled texts, or some prompts with their responses.

    Args:
        texts: the first (or only) text of each example, or the turns that it responds to.
        pairs: the second text of each example, or its response; or None.
        labels: index into the label names, by example.
        groups: natural owner of each example (a site, an author), or None.
    """

    texts: Sequence[str | Turns]
    pairs: Sequence[str] | None
    labels: Sequence[int]
    groups: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Sequence[int]) -> Texts:
        """The examples at these row numbers, in this order."""
        return Texts(
            [self.texts[row] for row in rows],
            None if self.pairs is None else [self.pairs[row] for row in rows],
            [self.labels[row] for row in rows],
            None if self.groups is None else [self.groups[row] for row in rows],
        )


@dataclass(frozen=True, slots=True)
class Corpus:
    """Train and test texts with the names of their labels."""

    train: Texts
    test: Texts
    label_names: Sequence[str]


def corpus_digest(corpus: Corpus) -> str:
    """sha256 of all texts, labels and label names in their order."""
    parts = [[p.texts, p.pairs, list(map(int, p.labels)), p.groups] for p in (corpus.train, corpus.test)]
    return hashlib.sha256(json.dumps([parts, list(corpus.label_names)]).encode()).hexdigest()
