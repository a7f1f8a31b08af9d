"""What the cost of a model depends on: its linear maps, block by block, without any weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyrank.models.last_block import makes_queries
from polyrank.models.load import BaseModel, head_parameters
from polyrank.models.targets import ATTENTION_INPUTS, GATES, NEW_GELU, resolve_targets

_PARALLEL = frozenset(["phi", "gptj", "codegen", "cohere", "cohere2"])
"""Families whose blocks hand attention and MLP the same tensor, and whose config does not say so."""


@dataclass(frozen=True, slots=True)
class Map:
    """One linear map of a block, O outputs and I inputs.

    Args:
        block: number of its block, from 0.
        enters: whether it reads what enters the block (maps to queries, keys and values).
        keys: whether it makes keys or values, which the last block needs of every token.
        kept: numbers of a row that what follows keeps for the backward part; None for its outputs.
        beside: whether it is of an MLP that reads what enters the block, as attention does.
    """

    name: str
    outputs: int
    inputs: int
    block: int
    enters: bool
    keys: bool
    kept: int | None = None
    beside: bool = False

    @property
    def keeps(self) -> int:
        return self.outputs if self.kept is None else self.kept


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model.

    Args:
        maps: the linear maps of all blocks, in forward order.
        hidden: width of what goes from block to block.
        parameters: of the whole model without its head.
        head_parameters: trained in full.
        head_block: lowest block with a part that is trained in full; the number of blocks without one.
        pooled: whether the last block runs for one token of each text, but for keys and values.
        absorbs: heads of that block where it does without keys and values, too; 0 where it needs them.
        skips: whether a stored prefix may stand in for the first blocks.
        vocabulary: outputs of a language model's output layer; 0 for a classifier.
        word: bytes of a number of its activations.
        weight_bytes: of its frozen weights as they are stored; None for numbers of 4 bytes.
        map_word: bytes of a number of a map inside a block as it is stored.
        scores: numbers that a query keeps for every key where attention is not fused; 0 where it is.
        capped: whether its logits go through a softcap, which keeps them once more.
        recomputes: whether a block keeps what enters it and computes the rest again.
    """

    maps: Sequence[Map]
    hidden: int
    blocks: int
    parameters: int
    head_parameters: int
    head_tensors: int
    head_block: int
    pooled: bool
    skips: bool
    vocabulary: int = 0
    word: int = 4
    weight_bytes: int | None = None
    map_word: float = 4.0
    scores: int = 0
    capped: bool = False
    recomputes: bool = False
    absorbs: int = 0


def shape_of(model: BaseModel) -> ModelShape:
    """Read the sizes off a loaded model."""
    shapes = resolve_targets(model.network, model.blocks, "all-linear")
    maps = [_map(model, name, shape) for name, shape in shapes.items()]
    head = head_parameters(model)
    inside = [_block(name, model.blocks) for name in model.head_modules]
    trained = sum(parameter.numel() for parameter in head.values())
    speaks, config = model.task == "causal_lm", model.network.config
    weights = [model.network.get_submodule(name).weight for name in shapes]
    own = {id(weight) for weight in weights}
    others = [p for p in model.network.parameters() if id(p) not in own]
    numbers = sum(one.outputs * one.inputs for one in maps)
    in_maps = sum(stored_bytes(weight) for weight in weights)
    eager = config._attn_implementation == "eager" and hasattr(config, "num_attention_heads")
    softcap = getattr(config, "attn_logit_softcapping", None) is not None
    return ModelShape(
        maps,
        int(config.hidden_size),
        len(model.blocks),
        numbers + sum(p.numel() for p in others) - trained,
        trained,
        len(head),
        min(inside, default=len(model.blocks)),
        model.pools is not None,
        model.skips,
        int(config.vocab_size) if speaks else 0,
        model.network.dtype.itemsize if speaks else 4,
        in_maps + sum(p.numel() * p.element_size() for p in others) if speaks else None,
        in_maps / numbers if speaks else 4.0,
        (1 + softcap) * int(config.num_attention_heads) if eager else 0,
        getattr(config, "final_logit_softcapping", None) is not None,
        model.recomputes,
        int(config.num_attention_heads) if model.absorbs and model.pools else 0,
    )


def stored_bytes(weight: Tensor) -> int:
    """Bytes of a weight as it is stored: of a quantised one, its small numbers and their scales."""
    parts: list[Any] = [weight]
    if hasattr(weight, "__tensor_flatten__"):  # torchao: a tensor of others, which claims to be float32
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    if (state := getattr(weight, "quant_state", None)) is not None:  # bitsandbytes, 4 bit
        parts.append(state.absmax)
    if (scales := getattr(weight, "SCB", None)) is not None:  # bitsandbytes, 8 bit
        parts.append(scales)
    return sum(part.numel() * part.element_size() for part in parts)


def _map(model: BaseModel, name: str, shape: tuple[int, int]) -> Map:
    """One map, with what follows it."""
    (outputs, inputs), config, block = shape, model.network.config, _block(name, model.blocks)
    parts, last = name.removeprefix(f"{model.blocks[block]}.").split("."), name.rpartition(".")[2]
    within = model.network.get_submodule(model.blocks[block])
    enters, gated = last in ATTENTION_INPUTS, last in GATES
    keys = enters and not makes_queries(last)
    beside = _parallel(config) and "mlp" in parts[0]
    closes = not enters and outputs == config.hidden_size and inputs >= outputs and not gated
    kept = outputs
    if gated:
        kept += outputs // 2 if "up" in last else outputs
    elif last in NEW_GELU and any(type(part).__name__ == "NewGELUActivation" for part in within.modules()):
        kept *= 4  # what enters it, half of that, its tanh, and one more than that
    elif closes:
        norms = sum("Norm" in type(part).__name__ for part in within.children())
        kept *= (
            0 if beside else 2 if norms > 2 else 1
        )  # their sum is kept once; a norm of its own keeps it too
    elif enters:
        kept = _kept_of_attention(model, outputs, keys)
    return Map(name, outputs, inputs, block, enters, keys, kept, beside)


def _kept_of_attention(model: BaseModel, outputs: int, keys: bool) -> int:
    """What attention keeps of a map to queries, keys or values."""
    config = model.network.config
    heads = getattr(config, "num_attention_heads", 0)
    width: int = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
    fused = outputs > width  # turned queries and keys are copies, and the values keep the whole output
    if fused and any(name.endswith("rotary_emb") for name, _ in model.network.named_modules()):
        return outputs + (outputs + width) // 2
    if keys and not fused and config._attn_implementation == "eager":
        return max(outputs, width)  # repeated for every query head
    return outputs


def _parallel(config: Any) -> bool:
    """Whether attention and MLP of a block read the same tensor."""
    for name in ("use_parallel_residual", "parallel_attn"):
        if hasattr(config, name):
            return bool(getattr(config, name))
    return config.model_type in _PARALLEL


def _block(name: str, blocks: Sequence[str]) -> int:
    """Number of the block that a module is in; one more than the last for a module outside."""
    return next((n for n, block in enumerate(blocks) if name.startswith(f"{block}.")), len(blocks))
