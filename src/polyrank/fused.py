"""Several clients in one pass: whose rows are whose, and the values that each client has of its own.

The frozen base model works row by row (and attention text by text), so the batches of several clients go
through it as one. What a client trains is kept per client along a leading axis G, padded with zeros to the
largest rank: such an entry has gradient 0 and stays 0. One client alone is a group of one.

Shapes: G clients, M rows of a batch (texts, padded tokens, or real tokens), L rows of the longest client.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from polyrank.adapter import Factors, Head


class Shares:
    """How many rows of the current batch belong to each client, in the order of the clients.

    A layer may see the batch as texts, as padded tokens or as real tokens alone; the number of rows tells
    which. Where two of these numbers are equal, so are the shares.
    """

    def __init__(self) -> None:
        self._counts: dict[int, list[int]] = {}
        self._places: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def begin(self, lengths: Sequence[Sequence[int]]) -> None:
        """Take the token counts of the texts of each client in the next batch."""
        longest = max(max(texts, default=0) for texts in lengths)
        ways = [
            [len(texts) for texts in lengths],
            [sum(texts) for texts in lengths],
            [longest * len(texts) for texts in lengths],
        ]
        self._counts = {sum(way): way for way in ways}
        self._places.clear()

    def of(self, num_rows: int) -> list[int]:
        """Rows of each client in a batch of so many."""
        return self._counts[num_rows]

    def spread(self, flat: Tensor) -> Tensor:
        """[M, H] to [G, L, H]; what is behind a client's last row repeats that row."""
        counts = self.of(len(flat))
        if min(counts) == max(counts):
            return flat.view(len(counts), -1, flat.shape[1])
        taken, _ = self._index(counts, flat.device)
        return flat[taken]

    def join(self, spread: Tensor, num_rows: int) -> Tensor:
        """[G, L, H] back to [M, H]."""
        counts = self.of(num_rows)
        flat = spread.flatten(0, 1)
        if min(counts) == max(counts):
            return flat
        _, back = self._index(counts, flat.device)
        return flat[back]

    def _index(self, counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        key = (sum(counts), device)
        if key not in self._places:
            count = torch.tensor(counts)[:, None]
            start = count.cumsum(0) - count
            place = torch.arange(max(counts))
            taken = (start + place.minimum(count - 1)).clamp(0, sum(counts) - 1)
            back = (place < count).flatten().nonzero().squeeze(1)
            self._places[key] = taken.to(device), back.to(device)
        return self._places[key]


class OwnHead(nn.Module):
    """A module that trains in full, with one set of parameters per client. Rows of x: texts, first axis."""

    def __init__(self, module: nn.Module, stacked: Mapping[str, nn.Parameter], shares: Shares) -> None:
        super().__init__()
        self.module = module
        self.names = list(stacked)
        self.stacked = nn.ParameterList(stacked.values())
        self.shares = shares

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        counts = self.shares.of(len(x)) if len(self.stacked[0]) > 1 else [len(x)]
        own = zip(*(values.unbind(0) for values in self.stacked), strict=True)
        outputs = [
            functional_call(self.module, dict(zip(self.names, values, strict=True)), (part, *args), options)
            for part, values in zip(torch.split(x, counts), own, strict=True)
            if len(part)
        ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


@contextlib.contextmanager
def own_heads(
    network: nn.Module, modules: Sequence[str], heads: Sequence[Head], shares: Shares
) -> Iterator[dict[str, nn.Parameter]]:
    """The network with every client's own head in place; yields the parameters [G, ...] by dotted name."""
    originals = {name: network.get_submodule(name) for name in modules}
    found: dict[str, nn.Parameter] = {}
    try:
        for name, module in originals.items():
            stacked = {
                inner: nn.Parameter(torch.stack([head[f"{name}.{inner}"] for head in heads]).to(p.device))
                for inner, p in module.named_parameters()
            }
            found |= {f"{name}.{inner}": value for inner, value in stacked.items()}
            network.set_submodule(name, OwnHead(module, stacked, shares))
        yield found
    finally:
        for name, module in originals.items():
            network.set_submodule(name, module)


def stack_factors(factors: Sequence[Factors | None]) -> dict[str, Tensor]:
    """B [G, O, r], e [G, r] and A [G, r, I] of some clients, with zeros up to the largest rank."""
    held = [f for f in factors if f is not None]
    rank, like = max(f.rank for f in held), held[0]
    stacked = {}
    for part, tensor in like.tensors().items():
        axis = {"B": 1, "e": 0, "A": 0}[part]
        shape = list(tensor.shape)
        shape[axis] = rank
        values = torch.zeros(len(factors), *shape, dtype=tensor.dtype)
        for value, f in zip(values, factors, strict=True):
            if f is not None:
                value.narrow(axis, 0, f.rank).copy_(f.tensors()[part].detach())
        stacked[part] = values
    return stacked


def clip_each(parameters: Sequence[nn.Parameter], most: float) -> None:
    """Scale each client's gradients so that their joint norm is at most ``most``."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)
    factor = (most / (norms + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor.view(-1, *[1] * (grad.ndim - 1)))
