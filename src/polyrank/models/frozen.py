"""Frozen linear maps on a faster path: bf16 weights, packed once for both directions.

A frozen map needs no weight gradient, so a training step multiplies by W once forward and once backward.
oneDNN packs W and W' once in the layout that the processor's bf16 units read; activations are rounded to
bf16 on the way in and come back as float32. The module tree, its names and its float32 weights stay as
they are: only ``forward`` of the map is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from polyrank.models.targets import linear_shape

_ROWS = 512  # the number of rows that the packing is tuned for; any other works


class PackedMap:
    """y = x W' + b in bf16 for one frozen nn.Linear or Conv1D. Shapes: x [..., I], y [..., O]."""

    def __init__(self, module: nn.Module) -> None:
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        rows = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
        pack = torch.ops.mkldnn._reorder_linear_weight
        self.forward = pack(rows.bfloat16().contiguous(), _ROWS)
        self.backward = pack(rows.T.bfloat16().contiguous(), _ROWS)
        self.bias = bias.detach().bfloat16() if isinstance(bias, Tensor) else None

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = _Multiply.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _Multiply(torch.autograd.Function):
    """The map forward, and the gradient of its input alone backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedMap) -> Tensor:
        ctx.packed = packed
        return _multiply(x, packed.forward, packed.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _multiply(grad, ctx.packed.backward, None), None


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).bfloat16()
    y = torch.ops.mkldnn._linear_pointwise(flat, packed, bias, "none", [], "")
    wide: Tensor = y.float().view(*x.shape[:-1], y.shape[-1])
    return wide


def bf16_is_fast() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_blocks(network: nn.Module, blocks: Sequence[str], trained: Sequence[str] = ()) -> None:
    """Put every linear map of the blocks on the packed path, but those that train."""
    inside = tuple(f"{block}." for block in blocks)
    for name, module in network.named_modules():
        if name in trained:
            continue
        if name.startswith(inside) and linear_shape(module) is not None:
            pack(module)


def pack(module: nn.Module) -> None:
    """Put one map on the packed path, with the weight it has now."""
    module.forward = PackedMap(module)


def is_packed(module: nn.Module) -> bool:
    """Whether `pack` was called on a map."""
    return isinstance(module.forward, PackedMap)
