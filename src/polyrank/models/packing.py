"""Packing: between the first and the last block, a batch is one row of real tokens without padding.

Linear maps, norms and activations work token by token, so padding only costs them time. What enters a block
[B, T, H] is cut to the N real tokens, [1, N, H]; attention alone looks at texts, so it puts its queries, keys
and values back into [B, T] and takes the real ones out again; the last block's output is padded again for the
head. Where the head reads one token of each text alone, the last block runs for those tokens alone
(`last_block.py`). It works through transformers' attention interface and hooks: no model is copied. A probe
compares the logits with the plain path's, and says why where a model keeps that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from polyrank.errors import first_line
from polyrank.models.absorbed import Unmade, attend, can_absorb
from polyrank.models.last_block import Forward, ReachedError, pair_of, pooled, straight
from polyrank.models.layout import Layout, UnfitError, layout_of, with_rotations

NAME = "polyrank_packed"
_CLOSE = {torch.bfloat16: 3e-2}  # relative; 1e-4 where rounding is finer

Read = Literal["first", "last"]
_READS: tuple[Read, ...] = ("first", "last")

# What attention may be handed that changes it and that `_attention` does not compute.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True, slots=True)
class Ready:
    """What the probes found out about a network.

    Args:
        packs: whether `packed_logits` may be used.
        pools: the one token of each text that its head reads, or None when it reads others too.
        absorbs: whether that token needs no keys or values of the others.
        reasons: why not, by what is not.
    """

    packs: bool
    pools: Read | None = None
    absorbs: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)


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
        return Ready(False, reasons={"packing": reason, "pooling": "it is not packed"})
    if speaks:
        return Ready(True, reasons={"pooling": "every token of a response is read"})
    plain, reasons = last.forward, {}
    for read in _READS:
        last.forward = pooled(last, plain)
        reasons[read] = _why_plain(network, last, inputs, read)
        if not reasons[read]:
            return Ready(True, read, _absorbs(network, last, plain, inputs, read))
    last.forward = plain
    return Ready(
        True, reasons={"pooling": "; ".join(f"{read} token: {why}" for read, why in reasons.items())}
    )


def _absorbs(network: Any, last: nn.Module, plain: Forward, inputs: Mapping[str, Tensor], read: Read) -> bool:
    """Let the last block do without keys and values, if it may; whether it does."""
    pair, fits = pair_of(last), list[bool]()
    if pair is None or not all(can_absorb(last.get_submodule(name)) for name in pair):
        return False
    look = last.register_forward_pre_hook(
        lambda _, args, kwargs: fits.append(straight(last, plain, pair, args, kwargs)), with_kwargs=True
    )
    with_keys = last.forward
    try:
        with torch.inference_mode():
            packed_logits(network, inputs, read)
    finally:
        look.remove()
    if not all(fits):
        return False
    last.forward = pooled(last, plain, pair)
    if _why_plain(network, last, inputs, read):
        last.forward = with_keys
        return False
    return True


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
    return (hidden, *args[1:]), with_rotations(kwargs, layout.pack)


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Pad what leaves the last block, so that each token is where the head looks for it."""
    layout: Layout | None = kwargs.get("packing")
    if layout is None:
        return None
    if not isinstance(output, Tensor):
        raise UnfitError("its blocks hand on more than hidden states")
    return layout.pad(output, None if layout.read is None else layout.rows[layout.read])


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
        raise ReachedError((key, value))
    mask = _seen(module, packing, options)
    alone = packing.keys is not None  # one query per text
    drops, scale = options.get("dropout", 0.0), options.get("scaling")
    if isinstance(packing.keys, Unmade):
        if mask is None or drops:
            raise UnfitError("its attention is not of the tokens read alone, or drops some at random")
        one = query[0].transpose(0, 1)
        states = packing.pad(packing.keys.states)
        return attend(one, states, packing.keys, mask[:, 0], scale or one.shape[2] ** -0.5)[None], None
    key, value = packing.keys or (key, value)
    seen = F.scaled_dot_product_attention(
        query.permute(2, 1, 0, 3) if alone else _texts(packing, query),
        _texts(packing, key),
        _texts(packing, value),
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=drops,
        scale=scale,
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
