"""Loading a causal language model: frozen whole, in fp32, bf16, or fewer bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from polyrank.errors import InputError
from polyrank.models.frozen import pack_blocks, packed_dtype
from polyrank.models.load import BaseModel, Dtype, expanded, prepare, reading, weights_digest
from polyrank.models.targets import block_names, linear_shape

Bits = Literal["8bit", "4bit"]


def load_speaker(
    name: str, device: torch.device, base_dtype: Dtype = "fp32", bits: Bits | None = None
) -> BaseModel:
    """A frozen causal language model with its own output layer; tied embeddings stay tied.

    Args:
        base_dtype: of the stored weights, and of what multiplies by them; MPS knows fp32 alone.
        bits: of the weights inside the blocks, where they are quantised: nf4 or int8 by bitsandbytes on CUDA,
            int8 by torchao on a CPU.

    Raises:
        InputError: nothing can be loaded under that name, a parameter is missing, or not in so few bits.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if base_dtype == "bf16" and device.type != "mps" else torch.float32
    how = {} if bits is None else quantized(bits, dtype, device)  # refuses before anything is read
    source = expanded(name)
    with reading(name, source, "a model folder or a hub id", "causal language model"):
        tokenizer = AutoTokenizer.from_pretrained(source)
        network, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, use_safetensors=True, **how
        )
        if missing := sorted(info["missing_keys"]):  # it would babble with a parameter drawn at random
            raise ValueError(f"the checkpoint lacks {missing[0]}" + (" and others" if missing[1:] else ""))
    digest = weights_digest(network)
    if bits is not None and device.type == "cpu":
        blocks = block_names(getattr(network, network.base_model_prefix), network.base_model_prefix)
        round_to_int8([network.get_submodule(block) for block in blocks])
    model = replace(prepare(network, tokenizer, source, set(), device, "causal_lm"), digest=digest)
    if device.type == "cpu" and dtype == torch.float32 and bits is None and packed_dtype("fp32"):
        pack_blocks(model.network, model.blocks, (), "fp32")
    return model


def quantized(bits: Bits, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """How transformers is told to quantise while it loads; nothing where that is done afterwards.

    Raises: InputError where the device has no such weights, or the library for them is missing.
    """
    if device.type != "cuda" and (bits, device.type) != ("8bit", "cpu"):
        other = (
            "'8bit' also runs on a CPU" if device.type == "cpu" else "base_dtype = 'bf16' runs on CPUs too"
        )
        allowed = f"needs CUDA, and this run is on {device.type}; {other}"
        raise InputError("model.quantize", bits, allowed)
    library = "bitsandbytes" if device.type == "cuda" else "torchao"
    if importlib.util.find_spec(library) is None:
        allowed = f"needs {library}, from the extra 'quantized' (pip install 'polyrank[quantized]')"
        raise InputError("model.quantize", bits, allowed)
    if device.type == "cpu":
        return {}
    from transformers import BitsAndBytesConfig

    four: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": dtype,
    }
    config = BitsAndBytesConfig(**(four if bits == "4bit" else {"load_in_8bit": True}))
    return {"quantization_config": config, "device_map": {"": device}}


def round_to_int8(blocks: Sequence[nn.Module]) -> None:
    """Store the weights of every linear map in the blocks as int8, with a scale for each output.

    They are widened when they are multiplied by; activations and gradients keep their precision.

    Raises: InputError for maps that torchao does not know (GPT-2's Conv1D).
    """
    maps = [module for block in blocks for module in block.modules() if linear_shape(module) is not None]
    if not all(isinstance(module, nn.Linear) for module in maps):
        allowed = "needs CUDA for a model whose maps are not nn.Linear (GPT-2's are Conv1D)"
        raise InputError("model.quantize", "8bit", allowed)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for block in blocks:
        quantize_(block, Int8WeightOnlyConfig())
