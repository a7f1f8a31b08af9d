"""`polyrank plan --memory`: what a session of a language model takes, from the model's config alone.

The network is built without any numbers (torch's meta device), and its sizes go through the same count that
prices simulated devices. A session is one that holds every slot, with full batches of texts of full length in
which every token is learned: no session takes more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from polyrank.clock import optimizer_words
from polyrank.config import Config
from polyrank.cost import Workload, memory_parts
from polyrank.device import packaged
from polyrank.errors import InputError
from polyrank.models.load import BaseModel, expanded, reading
from polyrank.models.shape import ModelShape, shape_of
from polyrank.models.targets import block_names, resolve_targets

_QUANTIZED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
"""Bytes of a number of a map inside a block: nf4 keeps a float32 for every 64 of them."""


def plan_memory(config: Config) -> dict[str, Any]:
    """Bytes of one session by what takes them, and which packaged devices have room for them.

    Raises: InputError when the task is another, or there is no such model.
    """
    if config.task != "causal_lm":
        allowed = "must be 'causal_lm' for a plan of memory; a classifier's is part of its fleet's plan"
        raise InputError("task", config.task, allowed)
    model = replace(skeleton(config.model.name), recomputes=config.model.gradient_checkpointing)
    shape = _stored(shape_of(model), config)
    targets = resolve_targets(model.network, model.blocks, config.adapter.targets)
    training = config.training
    tokens = float(training.batch_size * config.model.max_length)
    ranks = dict.fromkeys(targets, config.adapter.rank)
    work = Workload(shape, ranks, 1, training.batch_size, tokens, asked=tokens)
    parts = memory_parts(replace(work, optimizer_words=optimizer_words(training)))
    total = sum(parts.values())
    devices = packaged().devices
    return {
        "model": config.model.name,
        "parameters": shape.parameters,
        "blocks": shape.blocks,
        "tokens_per_step": int(tokens),
        "parts": parts,
        "total_bytes": total,
        "fits": {
            name: total <= device.usable_bytes and (device.cuda or config.model.quantize != "4bit")
            for name, device in devices.items()
        },
        "usable_bytes": {name: device.usable_bytes for name, device in devices.items()},
    }


def skeleton(name: str) -> BaseModel:
    """A language model without numbers: its modules and their sizes.

    Raises: InputError when there is no config under that name.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = expanded(name)
    with reading(name, source, "a model folder or a hub id", "causal language model"), torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    prefix = network.base_model_prefix
    blocks = block_names(getattr(network, prefix), prefix)
    return BaseModel(network, None, name, blocks, [], torch.device("meta"), task="causal_lm")


def _stored(shape: ModelShape, config: Config) -> ModelShape:
    """The same with its weights stored as the config says."""
    word = 2 if config.model.base_dtype == "bf16" else 4
    inside = sum(one.inputs * one.outputs for one in shape.maps)
    of_map = float(word) if config.model.quantize is None else _QUANTIZED[config.model.quantize]
    weights = word * (shape.parameters - inside) + of_map * inside
    return replace(shape, word=word, weight_bytes=int(weights), map_word=of_map)


def memory_lines(content: dict[str, Any]) -> list[str]:
    """The plan for people."""
    fits = [name for name, there in content["fits"].items() if there]
    size = f"{content['parameters'] / 1e9:.2f} billion parameters in {content['blocks']} blocks"
    return [
        f"{content['model']}: {size}, {content['tokens_per_step']} tokens a step",
        *(f"  {name:<12} {size / 1e9:9.2f} GB" for name, size in content["parts"].items()),
        f"  {'in all':<12} {content['total_bytes'] / 1e9:9.2f} GB (keys and values are not kept)",
        f"  fits         {', '.join(fits) or 'none of the packaged devices'}",
    ]
