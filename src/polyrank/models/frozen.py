"""Frozen linear maps on a faster path: weights packed once for both directions, in float32 or bf16.

A frozen map needs no weight gradient, so a training step multiplies by W once forward and once backward.
oneDNN packs W and W' once in the layout that the processor reads fastest. In float32 that is the same
product up to rounding, and pays on processors for which the default library leaves units unused; in bf16,
activations are rounded on the way in and come back as float32. The module tree, its names and its float32
weights stay as they are: only ``forward`` of the map is replaced.
"""

from __future__ import annotations

import contextlib
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

from polyrank.models.targets import lies_in, linear_shape

Dtype = Literal["fp32", "bf16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
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
        self.forward = pack(rows.to(DTYPES[dtype]).contiguous(), _ROWS)
        self.backward = pack(rows.T.to(DTYPES[dtype]).contiguous(), _ROWS)
        self.bias = bias.detach().to(DTYPES[dtype]) if isinstance(bias, Tensor) else None

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


def bf16_is_there() -> bool:
    """Whether this CPU multiplies bf16 in hardware; not whether that is faster than float32."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_dtype(base_dtype: Dtype) -> Dtype | None:
    """What frozen maps are packed in on this machine; None: they stay with the default library.

    bf16 where it is asked for and the faster: a processor may have units for it that are slower. Timed
    once and remembered in the user's cache folder: a choice that fell anew in every run could change the last
    bits of its result. Where nothing can be remembered, float32 is left to the default library and bf16 to
    the units for it.
    """
    gains = _remembered_gains()
    if gains is None:
        return "bf16" if base_dtype == "bf16" and bf16_is_there() else None
    if base_dtype == "bf16" and gains["bf16"] > _PAYS * max(1.0, gains["fp32"]):
        return "bf16"
    return "fp32" if gains["fp32"] > _PAYS else None


def _remembered_gains() -> dict[Dtype, float] | None:
    """What packing gains on this machine by dtype: read, or timed and written; None where it cannot be."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "polyrank" / f"packed-{platform.node()}-{torch.__version__}.json"
    with contextlib.suppress(OSError):
        if (found := _read_gains(path)) is not None:
            return found
        path.unlink()  # damaged
    own = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(_gains()))
        with contextlib.suppress(FileExistsError):  # of several processes that time it, the first one says
            os.link(own, path)
        own.unlink()
        return _read_gains(path)
    except OSError:
        return None


def _read_gains(path: Path) -> dict[Dtype, float] | None:
    try:
        found = json.loads(path.read_text())
        return {"fp32": float(found["fp32"]), "bf16": float(found["bf16"])}
    except (ValueError, KeyError, TypeError):
        return None


def _gains() -> dict[Dtype, float]:
    """Time of a default product over that of a packed one, least of several turns each; 0: not there."""
    module, x = nn.Linear(384, 1536).requires_grad_(False), torch.randn(_ROWS, 384)
    dtypes: list[Dtype] = ["fp32", "bf16"] if bf16_is_there() else ["fp32"]
    packed = {dtype: PackedMap(module, dtype) for dtype in dtypes}

    def default(x: Tensor) -> Tensor:
        return F.linear(x, module.weight, module.bias)

    def turn(work: Callable[[Tensor], Tensor]) -> float:
        start = time.process_time_ns()
        for _ in range(3):
            work(x)
        return time.process_time_ns() - start

    with torch.inference_mode():
        turns = [(turn(default), {dtype: turn(packed[dtype]) for dtype in dtypes}) for _ in range(9)][1:]
    plain = min(first for first, _ in turns)
    gains = {dtype: plain / min(others[dtype] for _, others in turns) for dtype in dtypes}
    return {"fp32": gains["fp32"], "bf16": gains.get("bf16", 0.0)}


def pack_blocks(
    network: nn.Module, blocks: Sequence[str], trained: Sequence[str] = (), dtype: Dtype = "bf16"
) -> None:
    """Put every linear map of the blocks on the packed path, but those that train."""
    inside = tuple(f"{block}." for block in blocks)
    maps = {
        name: module
        for name, module in network.named_modules()
        if name.startswith(inside) and not lies_in(name, trained) and linear_shape(module) is not None
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
