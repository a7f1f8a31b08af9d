"""Where the real tokens of a packed batch are, and how to come and go between packed and padded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyrank.models.absorbed import Unmade


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the real tokens of a batch are that is padded on the right.

    Args:
        rows: their positions in the flattened batch, [N].
        mask: which positions are real, [B, T].
        read: place among the N of the one token of each text that the head reads, [B]; None for all.
        keys: where the last block runs for those tokens alone, keys and values of all, each [1, heads, N, D];
            or what they would be made of.
        stop: whether the last block is run for its keys and values alone.
    """

    rows: Tensor
    mask: Tensor
    read: Tensor | None = None
    keys: tuple[Tensor, Tensor] | Unmade | None = None
    stop: bool = False

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] or, the same for all texts, [1, T, ...] to [1, N, ...]."""
        flat = x.expand(len(self.mask), *x.shape[1:]).flatten(0, 1)
        return (flat if self._full else flat[self.rows])[None]

    def pad(self, packed: Tensor, rows: Tensor | None = None) -> Tensor:
        """[1, N, ...] to [B, T, ...], with zeros where no token is; or the tokens of ``rows`` alone."""
        shape = (*self.mask.shape, *packed.shape[2:])
        if rows is None and self._full:
            return packed.reshape(shape)
        flat = packed.new_zeros(self.mask.numel(), *packed.shape[2:])
        return flat.index_copy(0, self.rows if rows is None else rows, packed[0]).view(shape)

    @property
    def _full(self) -> bool:
        return len(self.rows) == self.mask.numel()


class UnfitError(Exception):
    """What a model does that the packed path cannot."""


def layout_of(attention_mask: Tensor) -> Layout:
    """The layout of a batch that is padded on the right."""
    mask = attention_mask.bool()
    return Layout(mask.flatten().nonzero().squeeze(1), mask)


def with_rotations(kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A block's arguments with its rotations of positions, where it gets them, changed."""
    rotations = kwargs.get("position_embeddings")
    if rotations is None:
        return kwargs
    return {**kwargs, "position_embeddings": tuple(change(part) for part in rotations)}
