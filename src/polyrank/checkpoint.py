"""The server's state on disk: one safetensors file, tensors by name and JSON for the rest."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from polyrank.adapter import Adapter, Factors
from polyrank.errors import InputError
from polyrank.state import Capacity, ClientRecord, ServerState

STATE_FILE = "state.safetensors"


def save_state(state: ServerState, path: Path) -> None:
    """Write the whole state; equal states give equal bytes."""
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
        for name, factors in fold.modules.items():
            tensors[f"fold/{number}/{name}/B"] = factors.B.contiguous()
            tensors[f"fold/{number}/{name}/A"] = factors.A.contiguous()
    meaning = {
        "round": state.round,
        "seed": state.seed,
        "form": state.adapter.form,
        "scales": {name: factors.scale for name, factors in state.adapter.modules.items()},
        "head": list(state.head),
        "folds": [{name: f.scale for name, f in fold.modules.items()} for fold in state.folds],
        "clients": {name: asdict(record) for name, record in state.clients.items()},
    }
    save_file(tensors, path, metadata={"polyrank": json.dumps(meaning)})
    path.chmod(0o644)


def load_state(path: Path) -> ServerState:
    """Raises: InputError when the file is missing or is no state."""
    try:
        with safe_open(path, "pt") as file:
            meaning = json.loads((file.metadata() or {})["polyrank"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
        folds = [
            Adapter(
                "lora",
                {
                    name: Factors(
                        tensors[f"fold/{number}/{name}/B"], tensors[f"fold/{number}/{name}/A"], scale
                    )
                    for name, scale in scales.items()
                },
            )
            for number, scales in enumerate(meaning["folds"])
        ]
        clients = {name: _record(fields) for name, fields in meaning["clients"].items()}
        shares = {n.removeprefix("shares/"): t for n, t in tensors.items() if n.startswith("shares/")}
        return ServerState(meaning["round"], meaning["seed"], adapter, active, head, clients, folds, shares)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError("RUN", str(path), f"is not a saved state ({type(error).__name__})") from error


def _record(fields: dict[str, Any]) -> ClientRecord:
    known = fields.get("capacity")
    return ClientRecord(**{**fields, "capacity": None if known is None else Capacity(**known)})
