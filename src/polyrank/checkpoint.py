"""The server's state as bytes: one safetensors buffer, tensors by name and JSON for the rest."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from polyrank.adapter import Adapter, Factors
from polyrank.durable import replace
from polyrank.errors import InputError
from polyrank.state import Capacity, ClientRecord, ServerState

STATE_FILE = "state.safetensors"


class StateError(ValueError):
    """Bytes that are not a state or a fold."""


def save_state(state: ServerState, path: Path) -> None:
    """Write the whole state; equal states give equal bytes."""
    replace(path, encode_state(state))


def load_state(path: Path) -> ServerState:
    """Raises: InputError when the file is missing or is no state."""
    try:
        return decode_state(path.read_bytes())
    except (OSError, StateError) as error:
        raise InputError("RUN", str(path), f"is not a saved state ({error})") from error


def encode_state(state: ServerState) -> bytes:
    """The whole state; equal states give equal bytes."""
    tensors: dict[str, Tensor] = {}
    for name, factors in state.adapter.modules.items():
        for part, tensor in factors.tensors().items():
            tensors[f"adapter/{name}/{part}"] = tensor.contiguous()
        tensors[f"active/{name}"] = state.active[name].to(torch.uint8)
    for name, shares in state.shares.items():
        tensors[f"shares/{name}"] = shares
    for name, tensor in state.head.items():
        tensors[f"head/{name}"] = tensor.contiguous()
    for number, fold in enumerate(state.folds):
        tensors |= _fold_tensors(fold, f"fold/{number}/")
    meaning = {
        "round": state.round,
        "seed": state.seed,
        "form": state.adapter.form,
        "scales": {name: factors.scale for name, factors in state.adapter.modules.items()},
        "head": list(state.head),
        "folds": [_scales(fold) for fold in state.folds],
        "clients": {name: asdict(record) for name, record in state.clients.items()},
    }
    return save(tensors, metadata={"polyrank": json.dumps(meaning)})


def decode_state(data: bytes) -> ServerState:
    """Raises: StateError when the bytes are no state."""
    try:
        meaning, tensors = _opened(data)
        modules = {
            name: Factors(
                tensors[f"adapter/{name}/B"],
                tensors[f"adapter/{name}/A"],
                scale,
                tensors.get(f"adapter/{name}/e"),
            )
            for name, scale in meaning["scales"].items()
        }
        active = {name: tensors[f"active/{name}"].bool() for name in modules}
        head = {name: tensors[f"head/{name}"] for name in meaning["head"]}
        adapter = Adapter(meaning["form"], modules)
        folds = [_fold(tensors, scales, f"fold/{n}/") for n, scales in enumerate(meaning["folds"])]
        clients = {name: _record(fields) for name, fields in meaning["clients"].items()}
        shares = {n.removeprefix("shares/"): t for n, t in tensors.items() if n.startswith("shares/")}
        return ServerState(meaning["round"], meaning["seed"], adapter, active, head, clients, folds, shares)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise StateError(type(error).__name__) from error


def _record(fields: dict[str, Any]) -> ClientRecord:
    known = fields.get("capacity")
    return ClientRecord(**{**fields, "capacity": None if known is None else Capacity(**known)})


def encode_fold(fold: Adapter) -> bytes:
    """One fold alone; equal folds give equal bytes."""
    return save(_fold_tensors(fold, ""), metadata={"polyrank": json.dumps(_scales(fold))})


def decode_fold(data: bytes) -> Adapter:
    """Raises: StateError when the bytes are no fold."""
    try:
        scales, tensors = _opened(data)
        return _fold(tensors, scales, "")
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise StateError(type(error).__name__) from error


def _opened(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    # Copies lie in memory as tensors that were computed do: the same kernels, and so the same bits.
    tensors = {name: tensor.clone() for name, tensor in load(data).items()}
    return json.loads(header["__metadata__"]["polyrank"]), tensors


def _scales(fold: Adapter) -> dict[str, float]:
    return {name: factors.scale for name, factors in fold.modules.items()}


def _fold_tensors(fold: Adapter, lead: str) -> dict[str, Tensor]:
    return {
        f"{lead}{name}/{part}": tensor.contiguous()
        for name, factors in fold.modules.items()
        for part, tensor in (("B", factors.B), ("A", factors.A))
    }


def _fold(tensors: dict[str, Tensor], scales: dict[str, float], lead: str) -> Adapter:
    modules = {n: Factors(tensors[f"{lead}{n}/B"], tensors[f"{lead}{n}/A"], s) for n, s in scales.items()}
    return Adapter("lora", modules)
