"""The last block for the tokens alone that the head reads; its attention still looks at all tokens.

The block runs twice: once up to its attention, for the keys and values of all tokens, and then for the
tokens read, of which attention is handed those keys and values. Where keys and values are plain maps of one
state for each token, the first time only notes the states, and `absorbed.py` does without keys and values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyrank.models.absorbed import Unmade, can_absorb
from polyrank.models.layout import Layout, UnfitError, with_rotations
from polyrank.models.targets import linear_shape

# What the model families call a map to queries alone, and one to keys or to values alone.
_QUERY = frozenset(["query", "q_lin", "q_proj", "query_proj"])
_KEY = frozenset(["key", "k_lin", "k_proj", "key_proj"])
_VALUE = frozenset(["value", "v_lin", "v_proj", "value_proj"])

Forward = Callable[..., Any]


class Pair(NamedTuple):
    """Names, within the block, of its map to keys and its map to values."""

    key: str
    value: str


class ReachedError(Exception):
    """The last block has come to its attention, and its keys and values are known."""

    def __init__(self, keys: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.keys = keys


def makes_queries(name: str) -> bool:
    """Whether a map of this name makes queries alone, which a last block needs of the tokens read alone."""
    return name in _QUERY


def pooled(block: nn.Module, forward: Forward, pair: Pair | None = None) -> Forward:
    """The block's forward that runs for the tokens read alone.

    Args:
        forward: its own.
        pair: its maps to keys and values where `straight` found them.
    """
    queries, keys = _stand_ins(block, _QUERY), _stand_ins(block, _KEY | _VALUE)

    def run(*args: Any, **kwargs: Any) -> Any:
        layout: Layout | None = kwargs.get("packing")
        if layout is None or layout.read is None:
            return forward(*args, **kwargs)
        read = layout.read
        found: Unmade | tuple[Tensor, Tensor]
        maps = [block.get_submodule(name) for name in pair or ()]
        if pair is not None and not block.training and all(can_absorb(one) for one in maps):
            found = _unmade(block, forward, pair, queries | keys, args, kwargs)
        else:
            with _standing_in(block, queries):
                found = keys_of(forward, args, kwargs)
        kwargs = with_rotations(kwargs, lambda x: x[:, read])
        with _standing_in(block, keys):
            return forward(args[0][:, read], *args[1:], **{**kwargs, "packing": replace(layout, keys=found)})

    return run


def keys_of(forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Keys and values that a block comes to its attention with."""
    try:
        forward(*args, **{**kwargs, "packing": replace(kwargs["packing"], stop=True)})
    except ReachedError as reached:
        return reached.keys
    raise UnfitError("its last block does not come to its attention")


def pair_of(block: nn.Module) -> Pair | None:
    """The block's one map to keys and one map to values; None where they are not these."""
    maps = {n: n.rpartition(".")[2] for n, m in block.named_modules() if linear_shape(m) is not None}
    keys, values = ([name for name, last in maps.items() if last in kind] for kind in (_KEY, _VALUE))
    return Pair(keys[0], values[0]) if len(keys) == len(values) == 1 else None


def straight(
    block: nn.Module, forward: Forward, pair: Pair, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether both maps read one tensor, and attention gets what they make: not turned, normed or joined."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, given, made: seen.update({name: (given[0], made)})

    hooks = [block.get_submodule(name).register_forward_hook(note(name)) for name in pair]
    try:
        arrived = keys_of(forward, args, kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    (states, key), (others, value) = (seen[name] for name in pair)
    whole = [x.transpose(1, 2).flatten(2) for x in arrived]
    return states is others and torch.equal(whole[0], key) and torch.equal(whole[1], value)


class _Nothing(nn.Module):
    """Stands in for a map whose output nobody reads: of the right shape, and never computed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.width)


StandIns = dict[str, _Nothing]


def _unmade(
    block: nn.Module, forward: Forward, pair: Pair, stand_ins: StandIns, args: tuple[Any, ...], kwargs: Any
) -> Unmade:
    """What keys and values would be made of."""
    states: list[Tensor] = []
    note = stand_ins[pair.key].register_forward_pre_hook(lambda _, given: states.append(given[0]))
    try:
        with _standing_in(block, stand_ins):
            keys_of(forward, args, kwargs)
    finally:
        note.remove()
    return Unmade(states[0], *(block.get_submodule(name) for name in pair))


def _stand_ins(block: nn.Module, names: Container[str]) -> StandIns:
    maps = {n: linear_shape(m) for n, m in block.named_modules() if n.rpartition(".")[2] in names}
    return {name: _Nothing(shape[0]) for name, shape in maps.items() if shape is not None}


@contextlib.contextmanager
def _standing_in(block: nn.Module, stand_ins: StandIns) -> Iterator[None]:
    maps = {name: block.get_submodule(name) for name in stand_ins}
    try:
        for name, nothing in stand_ins.items():
            block.set_submodule(name, nothing)
        yield
    finally:
        for name, module in maps.items():
            block.set_submodule(name, module)
