"""Which linear maps of a model carry an adapter: families by name, or the user's own choice."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from polyrank.errors import InputError, choices

Targets = Literal["attention", "all-linear"] | Sequence[str]

# What the model families call the maps to query, key and value (some hold all three in one).
ATTENTION_INPUTS = frozenset(
    [
        *("query", "key", "value"),  # BERT, RoBERTa, ALBERT, ELECTRA
        *("q_lin", "k_lin", "v_lin"),  # DistilBERT
        *("query_proj", "key_proj", "value_proj"),  # DeBERTa-v2
        *("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, Phi, OPT
        *("in_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv"),  # fused: DeBERTa, Phi-3, GPT-2,
        # GPT-NeoX (and BLOOM, Falcon), ModernBERT
    ]
)


# Maps whose output goes through an activation and is then multiplied: what leaves the activation is kept too.
GATES = frozenset(["gate_proj", "gate_up_proj"])
# Maps into an activation that may be NewGELU, which is computed, and kept, step by step.
NEW_GELU = frozenset(["c_fc", "fc_in", "fc1"])


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(O, I) of a linear map, or None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return None


def block_names(base: nn.Module, prefix: str) -> list[str]:
    """Dotted names of the transformer blocks, first to last.

    Args:
        base: the model without its head.
        prefix: dotted name of ``base`` in the whole model.
    """
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            return [f"{prefix}.{name}.{index}" for index in range(len(module))]
    raise InputError("model.name", prefix, "must be a model with a list of transformer blocks")


def resolve_targets(
    network: nn.Module, blocks: Sequence[str], targets: Targets
) -> Mapping[str, tuple[int, int]]:
    """The adapted modules and their (O, I), in forward order.

    Args:
        targets: ``"attention"`` (the maps to query, key and value), ``"all-linear"`` (every linear
            map inside a block) or names: a full dotted name, or its last parts (``"output.dense"``).

    Raises:
        InputError: a target matches no linear map of a block.
    """
    inside = tuple(f"{block}." for block in blocks)
    linear = {
        name: shape
        for name, module in network.named_modules()
        if name.startswith(inside) and (shape := linear_shape(module)) is not None
    }
    if targets == "all-linear":
        return linear
    kinds = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in linear})
    if targets == "attention":
        found = {n: s for n, s in linear.items() if n.rpartition(".")[2] in ATTENTION_INPUTS}
        if not found:
            raise InputError("adapter.targets", targets, f"matches nothing here; {choices('', kinds)}")
        return found
    for target in targets:
        if not any(_matches(name, target) for name in linear):
            allowed = f"matches no linear map of a block; {choices(target, kinds)}"
            raise InputError("adapter.targets", target, allowed)
    return {n: s for n, s in linear.items() if any(_matches(n, target) for target in targets)}


def lies_in(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of these, or inside one."""
    return f"{name}.".startswith(tuple(f"{module}." for module in modules))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
