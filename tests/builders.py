"""Small adapters, states and updates for unit and law tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from polyrank.adapter import Adapter, Factors, Form, Head, RankMask, full_mask, restrict
from polyrank.aggregation.base import SlotSums
from polyrank.messages import ClientUpdate
from polyrank.state import ServerState

SHAPES = {"block.0.q": (3, 4), "block.1.q": (5, 2)}


def random_adapter(
    seed: int, rank: int, form: Form = "lora", shapes: Mapping[str, tuple[int, int]] = SHAPES
) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (out, in_) in shapes.items():
        B = torch.randn(out, rank, generator=draw)
        A = torch.randn(rank, in_, generator=draw)
        e = torch.randn(rank, generator=draw) if form == "svd" else None
        modules[name] = Factors(B, A, 2.0, e)
    return Adapter(form, modules)


def random_head(seed: int) -> Head:
    draw = torch.Generator().manual_seed(seed + 10_000)
    return {"score.weight": torch.randn(2, 3, generator=draw), "score.bias": torch.randn(2, generator=draw)}


def state_of(adapter: Adapter, round_: int = 0) -> ServerState:
    return ServerState(round_, 0, adapter, full_mask(adapter), random_head(99))


def update_of(
    client: str,
    adapter: Adapter,
    mask: RankMask | None = None,
    num_examples: int = 10,
    head: Head | None = None,
) -> ClientUpdate:
    """An update that reports the slots of ``mask`` of a full-size adapter."""
    held = full_mask(adapter) if mask is None else mask
    head = random_head(len(client)) if head is None else head
    metrics = {"loss": 1.0, "last_loss": 1.0, "steps": 1}
    return ClientUpdate(0, client, held, restrict(adapter, held), head, num_examples, metrics)


def largest_difference(first: Adapter, second: Adapter) -> float:
    """Largest absolute difference over all tensors of two adapters of one shape."""
    assert list(first.modules) == list(second.modules)
    worst = 0.0
    for name, factors in first.modules.items():
        for part, tensor in factors.tensors().items():
            worst = max(worst, float((tensor - second.modules[name].tensors()[part]).abs().max()))
    return worst


def slot_mean(bank: Adapter, updates: Sequence[ClientUpdate], weights: Sequence[float]) -> Adapter:
    """The weighted mean of each slot over its holders."""
    sums = SlotSums(bank)
    for update, weight in zip(updates, weights, strict=True):
        sums.add(update, weight)
    return sums.mean()
