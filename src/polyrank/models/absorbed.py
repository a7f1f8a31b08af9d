"""Attention of one query of each text over all its tokens, without computing their keys or values.

A key is a linear map of a token's state, so the map may go to the query instead: q . (W x) = (W' q) . x. The
same for values: sum_j p_j (W x_j) = W (sum_j p_j x_j). Two products of B rows stand in for two of all N
tokens. The bias of the keys moves all scores of a query alike, which softmax does not see; that of the
values comes back whole, as the weights p add up to 1. Equal to the usual order but for rounding.

Shapes: B texts, T tokens of the longest, h heads of D numbers, I inputs of a map, O = h D outputs, rank r.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Update = tuple[slice, Tensor, Tensor | None, Tensor, float]
"""Texts of one client, and what it adds to a map for them: B [O, r], e [r] or None, A [r, I], scale."""


@dataclass(frozen=True, slots=True)
class Unmade:
    """Keys and values that nobody computed yet.

    Args:
        states: of all tokens, [1, N, I].
        key, value: the maps that would make them.
    """

    states: Tensor
    key: nn.Module
    value: nn.Module


def can_absorb(module: nn.Module) -> bool:
    """Whether a map is a plain product, with or without low-rank updates, and drops nothing."""
    plain = _plain(module)
    return isinstance(plain, nn.Linear) and plain.weight.dtype.is_floating_point and not _drops(module)


def attend(query: Tensor, states: Tensor, maps: Unmade, mask: Tensor, scale: float) -> Tensor:
    """What each query sees, [B, h, D].

    Args:
        query: [B, h, D].
        states: [B, T, I], padded.
        mask: which tokens a query sees, [B, 1, T].
    """
    scores = _carried(maps.key, query) @ states.mT * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return _mapped(maps.value, weights @ states, query.shape[2])


def _carried(module: Any, query: Tensor) -> Tensor:
    """W' q with each head's rows of W: [B, h, D] to [B, h, I]."""
    heads, size = query.shape[1:]
    found = _by_head(query, _plain(module).weight.view(heads, size, -1))
    for updates in _updates(module, len(query)):
        found = found + torch.cat(
            [
                _scaled(_by_head(query[texts], B.view(heads, size, -1)), e, scale) @ A
                for texts, B, e, A, scale in updates
            ]
        )
    return found


def _mapped(module: Any, mixed: Tensor, size: int) -> Tensor:
    """W x + b with each head's rows of W: [B, h, I] to [B, h, D]."""
    heads, plain = mixed.shape[1], _plain(module)
    found = _by_head(mixed, plain.weight.view(heads, size, -1).mT)
    if plain.bias is not None:
        found = found + plain.bias.view(heads, size)
    for updates in _updates(module, len(mixed)):
        found = found + torch.cat(
            [
                _by_head(_scaled(mixed[texts] @ A.T, e, scale), B.view(heads, size, -1).mT)
                for texts, B, e, A, scale in updates
            ]
        )
    return found


def _by_head(x: Tensor, weights: Tensor) -> Tensor:
    """Each head by its own matrix: [B, h, n] and [h, n, m] to [B, h, m]."""
    return (x.transpose(0, 1) @ weights).transpose(0, 1)


def _scaled(held: Tensor, e: Tensor | None, scale: float) -> Tensor:
    return held * (scale if e is None else e * scale)


def _plain(module: Any) -> Any:
    return getattr(module, "base", module)


def _updates(module: Any, texts: int) -> Iterable[Sequence[Update]]:
    return module.updates(texts) if hasattr(module, "updates") else ()


def _drops(module: Any) -> bool:
    return getattr(module, "dropout", 0.0) > 0
