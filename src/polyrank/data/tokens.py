"""Texts as token ids, and batches padded to their own longest text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyrank.data.texts import Texts


class TextSizes(NamedTuple):
    """How much text a client has: examples, their tokens, and what they teach (labels or response tokens)."""

    texts: int
    tokens: int
    taught: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Encoded examples of unequal length, one after the other.

    Args:
        ids: all token ids in one row, [sum T].
        types: token type ids of the same shape, or None.
        starts: where each example starts, and the end of the last, [B + 1].
        labels: [B].
        pad_id: fills a batch up to its longest example.
        responses: where in each example its response begins, [B]; None where labels are learned.
    """

    ids: np.ndarray[Any, np.dtype[np.int32]]
    types: np.ndarray[Any, np.dtype[np.int8]] | None
    starts: np.ndarray[Any, np.dtype[np.int64]]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    pad_id: int
    responses: np.ndarray[Any, np.dtype[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> TextSizes:
        """All of it in numbers."""
        return TextSizes(len(self), int(self.starts[-1]), self.targets(range(len(self))))

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.diff(self.starts)

    def where(self, rows: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Positions of these examples' tokens in the one row of all tokens, in this order."""
        spans = [np.arange(self.starts[row], self.starts[row + 1]) for row in rows]
        return np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)

    def select(self, rows: Sequence[int]) -> Tokens:
        """The examples at these row numbers, in this order."""
        lengths = self.lengths[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        where = self.where(rows)
        types = None if self.types is None else self.types[where]
        responses = None if self.responses is None else self.responses[rows]
        return Tokens(self.ids[where], types, starts, self.labels[rows], self.pad_id, responses)

    def targets(self, rows: Sequence[int]) -> int:
        """How many things these examples teach: a label each, or the tokens of their responses."""
        if self.responses is None or len(rows) == 0:
            return len(rows)
        return int((self.lengths[rows] - self.responses[rows]).sum())

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Mapping[str, Tensor], Tensor]:
        """Model inputs [B, T] padded on the right to the longest of ``rows``, and labels [B].

        The labels of responses are their tokens in order; ``asked`` [B, T] are the tokens before them.
        """
        longest = int(self.lengths[rows].max())
        ids = np.full((len(rows), longest), self.pad_id, dtype=np.int64)
        types = np.zeros_like(ids)
        seen = np.zeros_like(ids)
        for line, row in enumerate(rows):
            span = slice(self.starts[row], self.starts[row + 1])
            length = span.stop - span.start
            ids[line, :length] = self.ids[span]
            seen[line, :length] = 1
            if self.types is not None:
                types[line, :length] = self.types[span]
        inputs: dict[str, np.ndarray[Any, Any]] = {"input_ids": ids, "attention_mask": seen}
        if self.types is not None:
            inputs["token_type_ids"] = types
        labels = self.labels[rows]
        if self.responses is not None:
            places = np.arange(longest) - self.responses[rows][:, None]
            asked = (places >= -1) & (np.arange(longest) < self.lengths[rows][:, None] - 1)
            inputs["asked"] = asked
            labels = ids[np.roll(asked, 1, axis=1)]
        tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
        return tensors, torch.from_numpy(labels).to(device)


def join(parts: Sequence[Tokens]) -> Tokens:
    """The examples of all parts, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([0, *(part.starts[-1] for part in parts)])
    starts = [part.starts[:-1] + end for part, end in zip(parts, ends, strict=False)]
    types = [part.types for part in parts if part.types is not None]
    responses = [part.responses for part in parts if part.responses is not None]
    return Tokens(
        np.concatenate([part.ids for part in parts]),
        np.concatenate(types) if types else None,
        np.concatenate([*starts, ends[-1:]]),
        np.concatenate([part.labels for part in parts]),
        parts[0].pad_id,
        np.concatenate(responses) if responses else None,
    )


def tokenize(texts: Texts, tokenizer: Any, max_length: int) -> Tokens:
    """Encode all texts, each cut to ``max_length`` tokens; an empty text is one padding token."""
    limit = min(max_length, tokenizer.model_max_length)
    encoded = tokenizer(
        list(texts.texts),
        None if texts.pairs is None else list(texts.pairs),
        truncation=True,
        max_length=limit,
        padding=False,
    )
    rows = [row or [int(tokenizer.pad_token_id)] for row in encoded["input_ids"]]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    types = None
    if texts.pairs is not None and "token_type_ids" in encoded:
        types = np.concatenate([np.asarray(row, dtype=np.int8) for row in encoded["token_type_ids"]])
    return Tokens(
        np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]),
        types,
        starts.astype(np.int64),
        np.asarray(texts.labels, dtype=np.int64),
        int(tokenizer.pad_token_id),
    )
