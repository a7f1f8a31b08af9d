"""Loading a causal language model: frozen whole, in fp32, bf16, or fewer bits."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any, Literal

import torch

from polyrank.errors import InputError
from polyrank.models.frozen import fp32_pays, pack_blocks
from polyrank.models.load import BaseModel, Dtype, prepare, reading, weights_digest

Bits = Literal["8bit", "4bit"]


def load_speaker(
    name: str, device: torch.device, base_dtype: Dtype = "fp32", bits: Bits | None = None
) -> BaseModel:
    """A frozen causal language model with its own output layer; tied embeddings stay tied.

    Args:
        base_dtype: of the stored weights, and of what multiplies by them; MPS knows fp32 alone.
        bits: of the weights inside the blocks, where they are quantised (bitsandbytes; nf4 or int8).

    Raises:
        InputError: nothing can be loaded under that name, a parameter is missing, or not in so few bits.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if base_dtype == "bf16" and device.type != "mps" else torch.float32
    how = {} if bits is None else quantized(bits, dtype, device)
    with reading(name, name, "a model folder or a hub id", "causal language model"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        network, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **how
        )
        if missing := sorted(info["missing_keys"]):  # it would babble with a parameter drawn at random
            raise ValueError(f"the checkpoint lacks {missing[0]}" + (" and others" if missing[1:] else ""))
    digest = weights_digest(network)
    model = replace(prepare(network, tokenizer, name, set(), device, "causal_lm"), digest=digest)
    if device.type == "cpu" and dtype == torch.float32 and bits is None and fp32_pays():
        pack_blocks(model.network, model.blocks, (), "fp32")
    return model


def quantized(bits: Bits, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """How transformers is told to quantise.

    Raises: InputError where there is no CUDA, or no bitsandbytes.
    """
    if device.type != "cuda":
        allowed = (
            f"needs CUDA, and this run is on {device.type}; base_dtype = 'bf16' halves the memory anywhere"
        )
        raise InputError("model.quantize", bits, allowed)
    if importlib.util.find_spec("bitsandbytes") is None:
        allowed = "needs the extra 'quantized' (pip install 'polyrank[quantized]')"
        raise InputError("model.quantize", bits, allowed)
    from transformers import BitsAndBytesConfig

    four: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": dtype,
    }
    config = BitsAndBytesConfig(**(four if bits == "4bit" else {"load_in_8bit": True}))
    return {"quantization_config": config, "device_map": {"": device}}
