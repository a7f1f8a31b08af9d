"""What this machine has and which paths a model takes, for people who ask why something does not run."""

from __future__ import annotations

import os
from typing import Any

import torch

from polyrank.errors import InputError
from polyrank.grouping import why_alone
from polyrank.ledger import versions
from polyrank.models.frozen import DTYPES, bf16_is_there, packed_dtype
from polyrank.models.load import PACKAGED, BaseModel, load_base, packaged_model, pick_device
from polyrank.models.prefix import why_not_skip
from polyrank.models.targets import Targets, resolve_targets


def examine(name: str | None = None) -> dict[str, Any]:
    """Findings by name: versions, devices, memory, and the paths of one model.

    Args:
        name: a model folder or hub id; without one, the packaged model if it is installed.

    Raises: InputError when the named model cannot be loaded.
    """
    found = versions()
    packages = found.pop("packages")
    try:
        model = str(packaged_model())
        name = name or PACKAGED
    except InputError as error:
        model = error.allowed
    return {
        **found,
        **packages,
        "cpu cores": os.cpu_count(),
        "device auto": str(pick_device("auto")),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "no",
        "mps": torch.backends.mps.is_available(),
        "bf16 on cpu": bf16_is_there(),
        f"model {PACKAGED}": model,
        **({} if name is None else paths(name)),
    }


def paths(name: str) -> dict[str, str]:
    """How a model goes through its blocks, and why not faster."""
    model = load_base(name, ["no", "yes"], 0, pick_device("auto"))
    no_prefix = why_not_skip(model)
    on_cpu = model.device.type == "cpu"
    ways = {None: "the default library", "fp32": "packed once in float32", "bf16": "packed once in bf16"}
    frozen = {dtype: ways[packed_dtype(dtype) if on_cpu else None] for dtype in DTYPES}
    pooled = f"{model.pools} token{', without keys and values of the others' if model.absorbs else ''}"
    return {
        "paths of": model.source,
        "packed": "yes" if model.packs else f"no: {model.reasons['packing']}",
        "pooled": pooled if model.pools else f"no: {model.reasons['pooling']}",
        "prefix": f"no: {no_prefix}" if no_prefix else "yes",
        "fused": "; ".join(f"{targets}: {_fused(model, targets)}" for targets in ("attention", "all-linear")),
        "frozen maps": "; ".join(f"base_dtype = '{dtype}': {way}" for dtype, way in frozen.items()),
    }


def _fused(model: BaseModel, targets: Targets) -> str:
    """Whether clients share a pass where adapters are on these maps."""
    try:
        shapes = resolve_targets(model.network, model.blocks, targets)
    except InputError as error:
        return f"no: {error.allowed.partition(';')[0]}"
    reason = why_alone(model, shapes)
    return f"no: {reason}" if reason else "yes"
