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
from polyrank.models.layout import UnfitError


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

    def of(self, num_rows: int, num_clients: int) -> list[int]:
        """Rows of each client in a batch of so many.

        Raises: UnfitError when they are neither texts nor tokens.
        """
        if num_clients == 1:
            return [num_rows]
        if num_rows not in self._counts:
            raise UnfitError(f"a map sees {num_rows} rows that are neither the texts nor their tokens")
        return self._counts[num_rows]

    def spread(self, flat: Tensor, counts: Sequence[int]) -> Tensor:
        """[M, H] to [G, L, H]; what is behind a client's last row repeats that row."""
        if min(counts) == max(counts):
            return flat.view(len(counts), -1, flat.shape[1])
        taken, _ = self._index(counts, flat.device)
        return flat[taken]

    def join(self, spread: Tensor, counts: Sequence[int]) -> Tensor:
        """[G, L, H] back to [M, H]."""
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


def add_products(
    y: Tensor, x: Tensor, B: Tensor, e: Tensor | None, A: Tensor, scale: float, shares: Shares
) -> Tensor:
    """y + scale * B_g (e_g * (A_g x)) on the rows of each client g, client by client: for a CPU.

    A CPU is faster at a few small products, each into its place, than at one padded batch of them.
    Shapes: y [M, O], x [M, I], B [G, O, r], e [G, r] or None, A [G, r, I].
    """
    how = shares.of(len(x), len(A)), scale
    wide = y.to(A.dtype), x.to(A.dtype)  # the frozen part may be bf16
    added: Tensor = _AddProducts.apply(*wide, B, e, A, how)  # type: ignore[no-untyped-call]
    return added.to(y.dtype)


def add_padded(
    y: Tensor, x: Tensor, B: Tensor, e: Tensor | None, A: Tensor, scale: float, shares: Shares
) -> Tensor:
    """The same as `add_products`, as one batched product of clients padded to one length: for a GPU."""
    counts = shares.of(len(x), len(A))
    held = shares.spread(x, counts) @ A.mT
    out = (held if e is None else held * e[:, None]) @ B.mT
    return y + scale * shares.join(out, counts)


class _AddProducts(torch.autograd.Function):
    """`add_products` with its gradients: no padding, and no product of its own beside y."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        B: Tensor,
        e: Tensor | None,
        A: Tensor,
        how: tuple[Sequence[int], float],
    ) -> Tensor:
        ctx.counts, ctx.scale = how
        held, out = x.new_empty(len(x), A.shape[1]), torch.empty_like(y)
        for client, own in client_rows(ctx.counts):
            torch.mm(x[own], A[client].T, out=held[own])
            scaled = held[own] if e is None else held[own] * e[client]
            torch.addmm(y[own], scaled, B[client].T, alpha=ctx.scale, out=out[own])
        ctx.save_for_backward(x, B, e, A, held)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, B, e, A, held = ctx.saved_tensors
        need_x, *needs = ctx.needs_input_grad[1:5]
        d_x = torch.empty_like(x) if need_x else None  # every row is somebody's
        d_B, d_e, d_A = (
            torch.zeros_like(value) if needed else None
            for value, needed in zip((B, e, A), needs, strict=True)
        )
        for client, own in client_rows(ctx.counts):
            above, through = d_out[own], held[own]
            if d_B is not None:
                scaled = through if e is None else through * e[client]
                torch.mm(above.T, scaled * ctx.scale, out=d_B[client])
            if d_x is None and d_e is None and d_A is None:
                continue
            passed = torch.mm(above, B[client]).mul_(ctx.scale)
            if d_e is not None:
                d_e[client] = (passed * through).sum(dim=0)
            if e is not None:
                passed = passed.mul_(e[client])
            if d_A is not None:
                torch.mm(passed.T, x[own], out=d_A[client])
            if d_x is not None:
                torch.mm(passed, A[client], out=d_x[own])
        return d_out, d_x, d_B, d_e, d_A, None


def client_rows(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """The rows of every client that has any."""
    first = 0
    for client, count in enumerate(counts):
        if count:
            yield client, slice(first, first + count)
        first += count


class OwnHead(nn.Module):
    """A module that trains in full, with one set of parameters per client. Rows of x: texts, first axis."""

    def __init__(self, module: nn.Module, stacked: Mapping[str, nn.Parameter], shares: Shares) -> None:
        super().__init__()
        self.module = module
        self.names = list(stacked)
        self.stacked = nn.ParameterList(stacked.values())
        self.shares = shares

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        counts = self.shares.of(len(x), len(self.stacked[0]))
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
