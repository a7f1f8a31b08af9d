"""Packing: between the first and the last block, a batch is one row of real tokens without padding.

Linear maps, norms and activations work token by token, so padding only costs them time. What enters a block
[B, T, H] is cut to the N real tokens, [1, N, H]; attention alone looks at texts, so it puts its queries, keys
and values back into [B, T] and takes the real ones out again; the last block's output is padded again for the
head. Where the head reads one token of each text alone, the last block runs for those tokens alone; only its
keys and values still come from all of them. It works through transformers' attention interface and hooks: no
model is copied. A probe compares the logits with the plain path's, and says why where a model keeps that.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from polyrank.errors import first_line
from polyrank.models.targets import linear_shape

NAME = "polyrank_packed"
_CLOSE = {torch.bfloat16: 3e-2}  # relative; 1e-4 where rounding is finer

Read = Literal["first", "last"]
Maps = Mapping[str, nn.Module]

# What the model families call a map to queries alone, and one to keys or values alone.
_QUERY = frozenset(["query", "q_lin", "q_proj", "query_proj"])
_KEY = frozenset(["key", "value", "k_lin", "v_lin", "k_proj", "v_proj", "key_proj", "value_proj"])

# What attention may be handed that changes it and that `_attention` does not compute.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the real tokens of a batch are that is padded on the right.

    Args:
        rows: their positions in the flattened batch, [N].
        mask: which positions are real, [B, T].
        read: place among the N of the one token of each text that the head reads, [B]; None for all.
        keys: where the last block runs for those tokens alone, keys and values of all, each [1, heads, N, D].
        stop: whether the last block is run for its keys and values alone.
    """

    rows: Tensor
    mask: Tensor
    read: Tensor | None = None
    keys: tuple[Tensor, Tensor] | None = None
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


def makes_queries(name: str) -> bool:
    """Whether a map of this name makes queries alone, which a last block needs of the tokens read alone."""
    return name in _QUERY


class UnfitError(Exception):
    """What a model does that the packed path cannot."""


class _Reached(Exception):  # noqa: N818
    """The last block has come to its attention, and its keys and values are known."""

    def __init__(self, keys: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.keys = keys


@dataclass(frozen=True, slots=True)
class Ready:
    """What the probes found out about a network.

    Args:
        packs: whether `packed_logits` may be used.
        pools: the one token of each text that its head reads, or None when it reads others too.
        reasons: why not, by what is not.
    """

    packs: bool
    pools: Read | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)


def layout_of(attention_mask: Tensor) -> Layout:
    """The layout of a batch that is padded on the right."""
    mask = attention_mask.bool()
    return Layout(mask.flatten().nonzero().squeeze(1), mask)


def packed_logits(network: Any, inputs: Mapping[str, Tensor], read: Read | None = None) -> Tensor:
    """The network's logits, computed without padding; the network was made ready before.

    Args:
        read: the one token of each text that the head reads; None runs the last block for all.
    """
    layout = layout_of(inputs["attention_mask"])
    if read is not None:
        layout = replace(layout, read=_read_tokens(layout, inputs["input_ids"], network.config, read))
    before = network.config._attn_implementation
    network.config._attn_implementation = NAME
    try:
        return plain_logits(network, {**inputs, "packing": layout})
    finally:
        network.config._attn_implementation = before


def plain_logits(network: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The network's logits [B, classes], or [n, V] of the tokens that ``inputs`` say are ``asked``.

    The output layer of a language model is by far its widest map, and only tokens before a response need it.
    """
    asked = inputs.get("asked")
    if asked is None:
        logits: Tensor = network(**inputs).logits
        return logits
    rest = {name: value for name, value in inputs.items() if name != "asked"}
    output = network.get_output_embeddings()
    hook = output.register_forward_pre_hook(lambda _, args: (args[0][asked],))
    try:
        logits = network(**rest, use_cache=False).logits
    finally:
        hook.remove()
    return logits


def make_ready(network: Any, blocks: Sequence[str], speaks: bool = False) -> Ready:
    """Put the hooks in as far as packed and plain logits agree, and take the others out again.

    Args:
        speaks: whether it is a language model, which has logits at every token.
    """
    AttentionInterface.register(NAME, _attention)
    modules = [network.get_submodule(name) for name in blocks]
    last = modules[-1]
    hooks = [module.register_forward_pre_hook(_enter, with_kwargs=True) for module in modules]
    hooks.append(last.register_forward_hook(_leave, with_kwargs=True))
    inputs = _probe(network, speaks)
    reason = _why_plain(network, last, inputs, None)
    if reason:
        for hook in hooks:
            hook.remove()
        return Ready(False, None, {"packing": reason, "pooling": "it is not packed"})
    if speaks:
        return Ready(True, None, {"pooling": "every token of a response is read"})
    reads: tuple[Read, ...] = ("first", "last")
    plain = last.forward
    last.forward = functools.partial(_pooled, last, plain, _stand_ins(last, _QUERY), _stand_ins(last, _KEY))
    found = {read: _why_plain(network, last, inputs, read) for read in reads}
    for read, why_not in found.items():
        if not why_not:
            return Ready(True, read)
    last.forward = plain
    return Ready(True, None, {"pooling": "; ".join(f"{read} token: {why}" for read, why in found.items())})


def difference(plain: Tensor, other: Tensor) -> str:
    """How far two results are apart in words, empty when they agree to rounding."""
    apart = float((plain - other).abs().max() / plain.abs().max())
    return "" if apart <= _CLOSE.get(plain.dtype, 1e-4) else f"logits differ by {apart:.0e}"


def told(error: Exception) -> str:
    """Why a probe failed, in one line."""
    if isinstance(error, UnfitError):
        return str(error)
    if isinstance(error, TypeError) and "packing" in str(error):
        return "its attention does not take the layout"
    return f"{type(error).__name__}: {first_line(error)}"


def _why_plain(network: Any, last: nn.Module, inputs: Mapping[str, Tensor], read: Read | None) -> str:
    """What keeps the packed path from the plain path's logits, empty when nothing does."""
    entered: list[int] = []
    watch = last.register_forward_pre_hook(lambda _, args: entered.append(args[0].shape[1]))
    try:
        with torch.inference_mode():
            plain = plain_logits(network, inputs)
            packed = packed_logits(network, inputs, read)
    except Exception as error:  # whatever a foreign model does on the probe, it only means the plain path
        return told(error)
    finally:
        watch.remove()
    if entered[-1:] != [int(inputs["attention_mask"].sum())]:
        return "its blocks do not get the layout"
    return difference(plain, packed)


def _probe(network: Any, speaks: bool) -> Mapping[str, Tensor]:
    """Three texts of 7, 4 and 1 tokens; a language model is asked at all of them."""
    device = next(network.parameters()).device
    mask = (torch.arange(7) < torch.tensor([[7], [4], [1]])).long()
    ids = torch.arange(21).view(3, 7) % (network.config.vocab_size - 4) + 3
    ids = ids.where(mask.bool(), torch.tensor(network.config.pad_token_id or 0))
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    return inputs | ({"asked": mask.bool().to(device)} if speaks else {})


def _read_tokens(layout: Layout, ids: Tensor, config: Any, read: Read) -> Tensor:
    """Place among the N of each text's first token, or of its last that is not the padding token.

    The latter is where transformers' heads look: they go by ids and not by the mask.
    """
    lengths = layout.mask.sum(dim=1)
    first = lengths.cumsum(0) - lengths
    if read == "first":
        return first
    columns = torch.arange(ids.shape[1], device=ids.device)
    last: Tensor = ((ids != config.pad_token_id) * columns).argmax(dim=1)
    return first + last


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pack what enters a block: the hidden states and, where it gets them, the rotations of positions."""
    layout: Layout | None = kwargs.get("packing")
    if layout is None:
        return None
    hidden = args[0] if args[0].shape[:2] != layout.mask.shape else layout.pack(args[0])
    return (hidden, *args[1:]), _with_rotations(kwargs, layout.pack)


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Pad what leaves the last block, so that each token is where the head looks for it."""
    layout: Layout | None = kwargs.get("packing")
    if layout is None:
        return None
    if not isinstance(output, Tensor):
        raise UnfitError("its blocks hand on more than hidden states")
    return layout.pad(output, None if layout.read is None else layout.rows[layout.read])


def _with_rotations(kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    rotations = kwargs.get("position_embeddings")
    if rotations is None:
        return kwargs
    return {**kwargs, "position_embeddings": tuple(change(part) for part in rotations)}


def _pooled(
    block: nn.Module, forward: Callable[..., Any], queries: Maps, keys: Maps, *args: Any, **kwargs: Any
) -> Any:
    """The last block: once up to its attention for keys and values of all, then for the tokens read.

    Args:
        queries: what stands in for its maps to queries the first time.
        keys: what stands in for its maps to keys and values the second time.
    """
    layout: Layout | None = kwargs.get("packing")
    if layout is None or layout.read is None:
        return forward(*args, **kwargs)
    read = layout.read
    with _standing_in(block, queries):
        found = _keys_of(forward, args, {**kwargs, "packing": replace(layout, stop=True)})
    kwargs = _with_rotations(kwargs, lambda x: x[:, read])
    with _standing_in(block, keys):
        return forward(args[0][:, read], *args[1:], **{**kwargs, "packing": replace(layout, keys=found)})


def _keys_of(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    try:
        forward(*args, **kwargs)
    except _Reached as reached:
        return reached.keys
    raise UnfitError("its last block does not come to its attention")


class _Nothing(nn.Module):
    """Stands in for a map whose output nobody reads: of the right shape, and never computed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.width)


def _stand_ins(block: nn.Module, names: Container[str]) -> Maps:
    maps = {n: linear_shape(m) for n, m in block.named_modules() if n.rpartition(".")[2] in names}
    return {name: _Nothing(shape[0]) for name, shape in maps.items() if shape is not None}


@contextlib.contextmanager
def _standing_in(block: nn.Module, stand_ins: Maps) -> Iterator[None]:
    maps = {name: block.get_submodule(name) for name in stand_ins}
    try:
        for name, nothing in stand_ins.items():
            block.set_submodule(name, nothing)
        yield
    finally:
        for name, module in maps.items():
            block.set_submodule(name, module)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention within each text. Shapes: query [1, heads, N or B, D], key and value [1, heads, N, D]."""
    if packing is None:
        raise UnfitError("its attention does not take the layout")
    if packing.stop:
        raise _Reached((key, value))
    alone = packing.keys is not None  # one query per text
    key, value = packing.keys or (key, value)
    mask = _seen(module, packing, options)
    seen = F.scaled_dot_product_attention(
        query.permute(2, 1, 0, 3) if alone else _texts(packing, query),
        _texts(packing, key),
        _texts(packing, value),
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return seen.permute(2, 0, 1, 3) if alone else packing.pack(seen.transpose(1, 2)), None


def _texts(packing: Layout, x: Tensor) -> Tensor:
    """[1, heads, N, D] to [B, heads, T, D]."""
    return packing.pad(x.transpose(1, 2)).transpose(1, 2)


def _seen(module: nn.Module, packing: Layout, options: Mapping[str, Any]) -> Tensor | None:
    """Which keys each query sees, in a shape that broadcasts to [B, heads, queries, T].

    None where a query sees all that stands before it: padding stands after the last token.
    """
    config = getattr(module, "config", None)
    for name in _UNKNOWN:
        if options.get(name) is not None:
            raise UnfitError(f"its attention has a {name}")
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(config, name, None) is not None and name not in options:
            raise UnfitError(f"its {name} is in the mask alone")
    causal, window = options.get("is_causal"), options.get("sliding_window")
    if not (getattr(module, "is_causal", False) if causal is None else causal):
        if window is not None:
            raise UnfitError("its attention has a window on both sides")
        return packing.mask[:, None, None, :]
    length = packing.mask.shape[1]
    if packing.keys is None and (window is None or window >= length):
        return None
    columns = torch.arange(length, device=packing.mask.device)
    queries = columns[:, None]
    if packing.read is not None and packing.keys is not None:
        queries = (packing.rows[packing.read] % length)[:, None, None, None]
    return (columns <= queries) & (columns > queries - (window or length))
