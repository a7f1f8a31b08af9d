"""Packing: between the first and the last block, a batch is one row of real tokens without padding.

Linear maps, norms and activations work token by token, so padding only costs them time. The first block's
input [B, T, H] is cut to the N real tokens, [1, N, H]; attention alone looks at texts, so it puts its
queries, keys and values back into [B, T] and takes the real ones out again; the last block's output is
padded again for the head. It works through transformers' attention interface and two hooks: no model is
copied. A model that does not hand the layout down to its attention keeps the plain path.
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


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the real tokens of a padded batch are.

    Args:
        rows: their positions in the flattened batch, [N].
        mask: which positions are real, [B, T].
    """

    rows: Tensor
    mask: Tensor

    def pack(self, padded: Tensor) -> Tensor:
        """[B, T, ...] to [1, N, ...]."""
        return padded.flatten(0, 1)[self.rows][None]

    def pad(self, packed: Tensor) -> Tensor:
        """[1, N, ...] to [B, T, ...], with zeros where no token is."""
        flat = packed.new_zeros(self.mask.numel(), *packed.shape[2:])
        return flat.index_copy(0, self.rows, packed[0]).view(*self.mask.shape, *packed.shape[2:])


def layout_of(attention_mask: Tensor) -> Layout | None:
    """The layout of a batch, or None when nothing is padded."""
    mask = attention_mask.bool()
    if bool(mask.all()):
        return None
    return Layout(mask.flatten().nonzero().squeeze(1), mask)


def packed_logits(network: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The network's logits [B, classes], computed without padding; the network was made ready before."""
    layout = layout_of(inputs["attention_mask"])
    if layout is None:
        logits: Tensor = network(**inputs).logits
        return logits
    before = network.config._attn_implementation
    network.config._attn_implementation = NAME
    try:
        logits = network(**inputs, packing=layout).logits
    finally:
        network.config._attn_implementation = before
    return logits


def make_ready(network: Any, blocks: Sequence[str]) -> bool:
    """Put the two hooks in and see whether packed and plain logits agree; if not, take them out.

    Returns: whether `packed_logits` may be used for this network.
    """
    AttentionInterface.register(NAME, _attention)
    first, last = (network.get_submodule(blocks[index]) for index in (0, -1))
    hooks = [
        first.register_forward_pre_hook(_pack_input, with_kwargs=True),
        last.register_forward_hook(_pad_output, with_kwargs=True),
    ]
    try:
        agrees = _agrees(network, last)
    except Exception:  # whatever a foreign model does on the probe, it only means the plain path
        agrees = False
    if not agrees:
        for hook in hooks:
            hook.remove()
        return False
    return True


def _agrees(network: Any, last: nn.Module) -> bool:
    """Whether the layout reaches the blocks, and the logits are those of the plain path."""
    rows: list[int] = []
    watch = last.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    try:
        return _same_logits(network) and rows[-1] == 9  # the real tokens of the batch below
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


def _pad_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    layout: Layout | None = kwargs.get("packing")
    if layout is None:
        return None
    if isinstance(output, tuple):
        return (layout.pad(output[0]), *output[1:])
    return layout.pad(output)


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
    q, k, v = (packing.pad(t.transpose(1, 2)).transpose(1, 2) for t in (query, key, value))
    seen = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=packing.mask[:, None, None, :],
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
    )
    return packing.pack(seen.transpose(1, 2)), None
