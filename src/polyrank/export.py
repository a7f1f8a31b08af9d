"""Adapters that PEFT loads, and plain transformers models with the adapter folded in."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from polyrank import durable
from polyrank.adapter import Adapter, Factors, restrict
from polyrank.aggregation.product import stack, truncated_svd
from polyrank.assemble import load_model
from polyrank.card import write_card
from polyrank.checkpoint import STATE_FILE, load_state
from polyrank.config import Config, make_config
from polyrank.errors import InputError, first_line
from polyrank.ledger import RunFolder, refuse_existing
from polyrank.lowrank import fold
from polyrank.models.load import BaseModel, pick_device, public_name, quiet, write_head
from polyrank.state import ServerState

WEIGHTS_FILE = "adapter_model.safetensors"
_TASK_TYPES = {"classification": "SEQ_CLS", "causal_lm": "CAUSAL_LM"}


def export_adapter(model: BaseModel, state: ServerState, path: Path, *, uniform: bool = False) -> None:
    """Write the active slots and the head in PEFT's format, each file on the disk when this returns.

    e is folded into A, and ``alpha_pattern`` is scale x rank, so that PEFT's ``alpha / r`` is the
    module's scale at every rank. Modules without active slots are absent.

    Args:
        uniform: pad every module with zero slots to the largest rank, for engines that read one rank.
    """
    path.mkdir(parents=True)
    adapter = served_adapter(state)
    if uniform:
        adapter = padded(adapter)
    durable.write(path / WEIGHTS_FILE, save(peft_tensors(adapter, state), metadata={"format": "pt"}))
    text = json.dumps(peft_config(model, adapter), indent=2, sort_keys=True)
    durable.write(path / "adapter_config.json", f"{text}\n".encode())


def served_adapter(state: ServerState) -> Adapter:
    """The active slots, together with all that was folded into the base, as one adapter.

    Folds add up to more slots than a module has rank; they are cut to min(O, I) slots, which loses nothing.
    """
    active = restrict(state.adapter, state.active)
    if not state.folds:
        return active
    modules = {}
    for name, bank in state.adapter.modules.items():
        parts = [a.modules[name] for a in (*state.folds, active) if name in a.modules]
        if not parts:
            continue
        left, right = stack([(f, torch.ones(f.rank)) for f in parts])
        full = min(bank.B.shape[0], bank.A.shape[1])
        if right.shape[0] <= full:
            modules[name] = Factors(left / bank.scale, right, bank.scale)
            continue
        U, s, Vh = truncated_svd(left, right, full)
        modules[name] = Factors(U * (s / bank.scale), Vh, bank.scale)
    return Adapter("lora", modules)


def padded(adapter: Adapter) -> Adapter:
    """The same function with as many slots in every module: those added are zero."""
    rank = max(factors.rank for factors in adapter.modules.values())
    modules = {}
    for name, factors in adapter.modules.items():
        more = rank - factors.rank
        B, A = F.pad(factors.B, (0, more)), F.pad(factors.A, (0, 0, 0, more))
        modules[name] = Factors(
            B, A, factors.scale, None if factors.e is None else F.pad(factors.e, (0, more))
        )
    return Adapter(adapter.form, modules)


def export_run(run: Path, out: Path, *, merged: bool, uniform: bool = False) -> Path:
    """Export a finished run again: its adapter, or the whole model with the adapter folded in.

    Args:
        uniform: of the adapter, one rank for all modules.

    Raises:
        InputError: the run is not finished, or ``out`` exists.
        RunError: the disk does not take it.
    """
    if merged and uniform:
        raise InputError("--uniform-rank", True, "goes without --merge, which leaves no rank")
    refuse_existing(out)
    folder = RunFolder(run)
    config, facts = read_config(folder), (folder.read("summary.json"), folder.read("partition.json"))
    plain = config.model.model_copy(
        update={"base_dtype": "fp32", "quantize": None}
    )  # to fold in full precision
    model = load_model(config.model_copy(update={"model": plain}), facts[1]["labels"], pick_device("cpu"))
    state = load_state(run / STATE_FILE)
    with durable.disk_errors(out):
        if merged:
            _save_merged(model, state, out)
        else:
            export_adapter(model, state, out, uniform=uniform)
        write_card(out, model, config, facts)
    return out


def _save_merged(model: BaseModel, state: ServerState, out: Path) -> None:
    """Write the model with the adapter folded in; its config keeps what the checkpoint says of caching."""
    write_head(model, state.head)
    fold(model.network, served_adapter(state))
    with quiet():
        before = AutoConfig.from_pretrained(model.source)
        if hasattr(before, "use_cache"):
            model.network.config.use_cache = before.use_cache
        try:
            model.network.save_pretrained(out)
        except SafetensorError as error:  # how the library tells of a full disk
            raise OSError(first_line(error)) from error
        model.tokenizer.save_pretrained(out)
    for path in out.glob("*.safetensors"):
        path.chmod(0o644)


def read_config(folder: RunFolder) -> Config:
    """The resolved config that a run folder keeps."""
    return make_config(folder.read("config.json"))


def config_digest(folder: RunFolder) -> str:
    """sha256 of a run folder's config: a run that goes on must be by the very same."""
    return hashlib.sha256((folder.path / "config.json").read_bytes()).hexdigest()


def adapter_sha256(path: Path) -> str:
    """Fingerprint of the exported weights."""
    return hashlib.sha256((path / WEIGHTS_FILE).read_bytes()).hexdigest()


def peft_tensors(adapter: Adapter, state: ServerState) -> dict[str, Tensor]:
    """The adapter and head under the names PEFT gives them."""
    tensors = {}
    for name, factors in adapter.modules.items():
        A = factors.A if factors.e is None else factors.e[:, None] * factors.A
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = factors.B.contiguous()
    return tensors | {f"base_model.model.{name}": value for name, value in state.head.items()}


def peft_config(model: BaseModel, adapter: Adapter) -> dict[str, Any]:
    """``adapter_config.json`` as a plain dict, the same bytes every time."""
    ranks = {name: factors.rank for name, factors in adapter.modules.items()}
    alphas = {name: factors.scale * factors.rank for name, factors in adapter.modules.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    conv1d = any(isinstance(model.network.get_submodule(name), Conv1D) for name in ranks)
    config = LoraConfig(
        task_type=_TASK_TYPES[model.task],
        base_model_name_or_path=public_name(model.source),
        r=rank,
        lora_alpha=alpha,
        target_modules=list(ranks),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
        modules_to_save=list(model.head_modules) or None,
        fan_in_fan_out=conv1d,
        inference_mode=True,
    ).to_dict()
    return {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}


def _most_common(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
