"""Frozen linear maps on a faster path: weights packed once for both directions, in float32 or bf16.

A frozen map needs no weight gradient, so a training step multiplies by W once forward and once backward.
oneDNN packs W and W' once in the layout that the processor reads fastest. In float32 that is the same
product up to rounding, and pays on processors for which the default library leaves units unused; in bf16,
activations are rounded on the way in and come back as float32. The module tree, its names and its float32
weights stay as they are: only ``forward`` of the map is replaced.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from polyrank.models.targets import linear_shape

Dtype = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ROWS = 512  # the number of rows that the packing is tuned for; any other works
_MOST_BYTES = 2**30  # packing triples a weight's memory: past this, float32 weights stay as they are
_PAYS = 1.05


class PackedMap:
    """y = x W' + b for one frozen nn.Linear or Conv1D. Shapes: x [..., I], y [..., O]."""

    def __init__(self, module: nn.Module, dtype: Dtype) -> None:
        self.dtype = dtype
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        rows = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
        pack = torch.ops.mkldnn._reorder_linear_weight
        self.forward = pack(rows.to(_DTYPES[dtype]).contiguous(), _ROWS)
        self.backward = pack(rows.T.to(_DTYPES[dtype]).contiguous(), _ROWS)
        self.bias = bias.detach().to(_DTYPES[dtype]) if isinstance(bias, Tensor) else None

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
    flat = x.reshape(-1, x.shape[-1])
    rows = len(flat)
    if rows_for(rows) != rows or flat.dtype != packed.dtype:
        given, flat = flat, flat.new_empty(rows_for(rows), flat.shape[1], dtype=packed.dtype)
        flat[:rows], flat[rows:] = given, 0
    y: Tensor = torch.ops.mkldnn._linear_pointwise(flat, packed, bias, "none", [], "")[:rows]
    return y.float().view(*x.shape[:-1], y.shape[-1])


def rows_for(rows: int) -> int:
    """A slightly larger number of rows, one of 16 in each doubling.

    oneDNN compiles a product of its own for every number of rows, which takes 1 ms and 1 MB each, and packed
    texts have another number in every step.
    """
    step = max(8, (1 << rows.bit_length()) // 32)
    return math.ceil(rows / step) * step


def bf16_is_fast() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fp32_pays() -> bool:
    """Whether float32 products are faster packed on this machine.

    Timed once and remembered in the user's cache folder: a choice that fell anew in every run could change
    the last bits of its result. Where nothing can be remembered, the default library is used.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "polyrank" / f"packed-fp32-{platform.node()}-{torch.__version__}.json"
    try:
        return bool(json.loads(path.read_text())["pays"])
    except (OSError, ValueError, KeyError):
        gain = _gain()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"pays": gain > _PAYS, "gain": round(gain, 3)}))
    except OSError:
        return False
    return gain > _PAYS


def _gain() -> float:
    """Time of a default product over that of a packed one, least of several turns each."""
    module, x = nn.Linear(384, 1536).requires_grad_(False), torch.randn(_ROWS, 384)
    packed = PackedMap(module, "fp32")

    def default() -> Tensor:
        return F.linear(x, module.weight, module.bias)

    def least(work: Callable[[], Tensor]) -> float:
        start = time.process_time_ns()
        for _ in range(3):
            work()
        return time.process_time_ns() - start

    with torch.inference_mode():
        turns = [(least(default), least(lambda: packed(x))) for _ in range(8)]
    return min(turn[0] for turn in turns[1:]) / min(turn[1] for turn in turns[1:])


def pack_blocks(
    network: nn.Module, blocks: Sequence[str], trained: Sequence[str] = (), dtype: Dtype = "bf16"
) -> None:
    """Put every linear map of the blocks on the packed path, but those that train."""
    inside = tuple(f"{block}." for block in blocks)
    maps = {
        name: module
        for name, module in network.named_modules()
        if name not in trained and name.startswith(inside) and linear_shape(module) is not None
    }
    size = sum(p.numel() * p.element_size() for module in maps.values() for p in module.parameters())
    if dtype == "bf16" or size <= _MOST_BYTES:
        for module in maps.values():
            pack(module, dtype)


def pack(module: nn.Module, dtype: Dtype) -> None:
    """Put one map on the packed path, with the weight it has now."""
    module.forward = PackedMap(module, dtype)


def pack_again(module: nn.Module) -> None:
    """Take a new weight into a map that is on the packed path; any other is left alone."""
    if isinstance(module.forward, PackedMap):
        pack(module, module.forward.dtype)
