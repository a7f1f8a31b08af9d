"""Gradient checkpointing: a block keeps what enters it, and computes the rest again when its gradient is due.

It saves most of the memory of activations and costs a second forward pass. Numbers stay the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch.utils.checkpoint import checkpoint

from polyrank.models.load import BaseModel
from polyrank.models.packing import NAME


@contextlib.contextmanager
def recomputed(model: BaseModel) -> Iterator[None]:
    """The model's blocks, recomputed in the backward pass where the model asks for it."""
    if not model.recomputes:
        yield
        return
    blocks: list[Any] = [model.network.get_submodule(name) for name in model.blocks]
    before = [block.__dict__.get("forward") for block in blocks]
    config = model.network.config
    attention = config._attn_implementation
    try:
        if model.packs:
            config._attn_implementation = NAME  # also in the backward pass, when `packed_logits` is over
        for block in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        config._attn_implementation = attention
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own
