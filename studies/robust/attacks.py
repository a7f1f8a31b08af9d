"""Clients that lie: an engine that carries another engine's bytes and rewrites the updates of some clients.

With X the served values and X_k those an honest client would send:

    sign_flip     X - (X_k - X)             the honest change, backwards
    times_10      X + 10 (X_k - X)
    random        standard normal numbers in place of all values
    factor_flip   (-B_k, -A_k)              the same product (form svd: -B_k, -e_k), head as it is
    nan           NaN in every tensor       refused when it is decoded, with or without robust mode
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyrank.adapter import Adapter, restrict, within
from polyrank.engine.base import Answer, Client, Engine
from polyrank.gate import decode_update
from polyrank.messages import ClientUpdate, TrainTask
from polyrank.seed import seed_for
from polyrank.wire import decode_task, encode_update

Bend = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Served values, honest values, a source of random numbers -> what is sent."""


BENDS: Mapping[str, Bend] = {
    "sign_flip": lambda old, new, _: 2 * old - new,
    "times_10": lambda old, new, _: old + 10 * (new - old),
    "random": lambda _, new, draw: torch.randn(new.shape, generator=draw),
    "nan": lambda _, new, __: torch.full_like(new, float("nan")),
}
ATTACKS = ("sign_flip", "times_10", "random", "factor_flip", "nan")


@dataclass(frozen=True)
class Liars:
    """An engine some of whose clients attack in every round."""

    engine: Engine
    liars: Collection[str]
    attack: str

    @property
    def fuse(self) -> int:
        return self.engine.fuse

    @property
    def pause_s(self) -> float:
        return self.engine.pause_s

    def clients(self) -> list[Client]:
        return list(self.engine.clients())

    def close(self) -> None:
        self.engine.close()

    def exchange(self, requests: Iterable[tuple[str, bytes]]) -> Iterator[Answer]:
        asked: dict[str, bytes] = {}

        def noted() -> Iterator[tuple[str, bytes]]:
            for client, request in requests:
                if client in self.liars:
                    asked[client] = request
                yield client, request

        for answer in self.engine.exchange(noted()):
            if answer.client in self.liars and answer.payload is not None:
                task = decode_task(asked.pop(answer.client))
                assert isinstance(task, TrainTask)
                lie = bent(self.attack, decode_update(answer.payload, task), task)
                yield replace(answer, payload=encode_update(lie, task))
            else:
                yield answer


def bent(attack: str, update: ClientUpdate, task: TrainTask) -> ClientUpdate:
    """What an attacker sends in place of an honest update."""
    served = restrict(task.adapter, within(update.mask, task.mask))
    if attack == "factor_flip":
        flipped = {}
        for name, f in update.adapter.modules.items():
            flipped[name] = replace(f, B=-f.B, A=-f.A) if f.e is None else replace(f, B=-f.B, e=-f.e)
        return replace(update, adapter=Adapter(served.form, flipped))
    bend, draw = BENDS[attack], torch.Generator().manual_seed(seed_for(task.seed, attack))
    modules = {}
    for name, factors in update.adapter.modules.items():
        old = served.modules[name].tensors()
        bad = {part: bend(old[part], new, draw) for part, new in factors.tensors().items()}
        modules[name] = factors.with_tensors(bad)
    head = {name: bend(task.head[name], new, draw) for name, new in update.head.items()}
    return replace(update, adapter=Adapter(served.form, modules), head=head)
