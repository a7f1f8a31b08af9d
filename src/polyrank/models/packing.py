"""Packing: between the first and the last block, a batch is one row of real tokens without padding.

Linear maps, norms and activations work token by token, so padding only costs them time. The first block's
input [B, T, H] is cut to the N real tokens, [1, N, H]; attention alone looks at texts, so it puts its
queries, keys and values back into [B, T] and takes the real ones out again; the last block's output is
padded again for the head. Where the head reads the first token of each text alone, the last block runs for
those tokens alone; only its keys and values still come from all of them. It works through transformers'
attention interface and hooks: no model is copied. A model that does not hand the layout down to its
attention, or whose logits differ, keeps the plain path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

NAME = "polyrank_packed"
_CLOSE = 1e-4


@dataclass(slots=True)
class Layout:
    """Where the real tokens of a padded batch are.

    Args:
        rows: their positions in the flattened batch, [N].
        mask: which positions are real, [B, T].
        first: place of each text's first token among the N, [B].
        everything: while the last block runs for first tokens alone, its input for all, [1, N, H].
    """

    rows: Tensor
    mask: Tensor
    first: Tensor
    everything: Tensor | None = None

    def pack(self, padded: Tensor) -> Tensor:
        """[B, T, ...] to [1, N, ...]."""
        return padded.flatten(0, 1)[self.rows][None]

    def pad(self, packed: Tensor) -> Tensor:
        """[1, N, ...] to [B, T, ...], with zeros where no token is."""
        flat = packed.new_zeros(self.mask.numel(), *packed.shape[2:])
        return flat.index_copy(0, self.rows, packed[0]).view(*self.mask.shape, *packed.shape[2:])


def layout_of(attention_mask: Tensor) -> Layout:
    """The layout of a batch that is padded on the right."""
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1)
    return Layout(mask.flatten().nonzero().squeeze(1), mask, lengths.cumsum(0) - lengths)


def packed_logits(network: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The network's logits [B, classes], computed without padding; the network was made ready before."""
    layout = layout_of(inputs["attention_mask"])
    before = network.config._attn_implementation
    network.config._attn_implementation = NAME
    try:
        logits: Tensor = network(**inputs, packing=layout).logits
    finally:
        network.config._attn_implementation = before
    return logits


def make_ready(network: Any, blocks: Sequence[str]) -> bool:
    """Put the hooks in as far as packed and plain logits agree, and take the others out again.

    Returns: whether `packed_logits` may be used for this network.
    """
    AttentionInterface.register(NAME, _attention)
    first, last = (network.get_submodule(blocks[index]) for index in (0, -1))
    packing = [
        first.register_forward_pre_hook(_pack_input, with_kwargs=True),
        last.register_forward_hook(_pad_output, with_kwargs=True),
    ]
    shared = first is last  # one block for all depths
    if not _agrees(network, last, before_hooks=not shared):
        for hook in packing:
            hook.remove()
        return False
    if not shared:
        pooling = last.register_forward_pre_hook(_first_tokens, with_kwargs=True)
        if not _agrees(network, last, before_hooks=True):
            pooling.remove()
    return True


def _agrees(network: Any, last: nn.Module, *, before_hooks: bool) -> bool:
    """Whether the layout reaches the blocks, and the logits are those of the plain path.

    Args:
        before_hooks: look at the last block's input before its own hooks change it.
    """
    rows: list[int] = []

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        rows.append(args[0].shape[1])

    watch = last.register_forward_pre_hook(look, prepend=before_hooks)
    try:
        return _same_logits(network) and rows[-1] == 9  # the real tokens of the batch below
    except Exception:  # whatever a foreign model does on the probe, it only means the plain path
        return False
    finally:
        watch.remove()


def _same_logits(network: Any) -> bool:
    ids = torch.arange(12).view(2, 6) % (network.config.vocab_size - 4) + 3
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    device = next(network.parameters()).device
    pad = network.config.pad_token_id or 0
    ids = ids.where(mask.bool(), torch.tensor(pad))
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    with torch.inference_mode():
        plain = network(**inputs).logits
        packed = packed_logits(network, inputs)
    return bool((plain - packed).abs().max() <= _CLOSE * (1 + plain.abs().max()))


def _pack_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layout: Layout | None = kwargs.get("packing")
    if layout is None:
        return None
    return (layout.pack(args[0]), *args[1:]), kwargs


def _first_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layout: Layout | None = kwargs.get("packing")
    if layout is None:
        return None
    layout.everything = args[0]
    return (args[0][:, layout.first], *args[1:]), kwargs


def _pad_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    layout: Layout | None = kwargs.get("packing")
    if layout is None:
        return None
    if layout.everything is None:
        return layout.pad(output)
    layout.everything = None
    padded = output.new_zeros(*layout.mask.shape, output.shape[-1])
    padded[:, 0] = output[0]
    return padded


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Layout,
    **options: Any,
) -> tuple[Tensor, None]:
    """Bidirectional attention within each text. Shapes: query, key, value [1, heads, N, D]."""
    if packing.everything is None:
        q = packing.pad(query.transpose(1, 2)).transpose(1, 2)
    else:  # one query per text; keys and values of all tokens
        q = query.permute(2, 1, 0, 3)
        key, value = (_heads(part(packing.everything), query) for part in _key_and_value(module))
    k, v = (packing.pad(t.transpose(1, 2)).transpose(1, 2) for t in (key, value))
    seen = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=packing.mask[:, None, None, :],
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
    )
    if packing.everything is None:
        return packing.pack(seen.transpose(1, 2)), None
    return seen.permute(2, 0, 1, 3), None


def _key_and_value(attention: nn.Module) -> tuple[nn.Module, nn.Module]:
    for key, value in (("key", "value"), ("k_lin", "v_lin")):
        if hasattr(attention, key):
            return getattr(attention, key), getattr(attention, value)
    raise AttributeError(f"{type(attention).__name__} has no maps to key and value of a known name")


def _heads(x: Tensor, like: Tensor) -> Tensor:
    """[1, N, heads * D] to [1, heads, N, D]."""
    return x.view(*x.shape[:2], like.shape[1], like.shape[3]).transpose(1, 2)
