"""What the cost of a model depends on: its linear maps, block by block, without any weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyrank.models.load import BaseModel, head_parameters
from polyrank.models.packing import makes_queries
from polyrank.models.targets import ATTENTION_INPUTS, GATES, resolve_targets


@dataclass(frozen=True, slots=True)
class Map:
    """One linear map of a block, O outputs and I inputs.

    Args:
        block: number of its block, from 0.
        enters: whether it reads what enters the block (maps to queries, keys and values).
        keys: whether it makes keys or values, which the last block needs of every token.
        gates: numbers of its output whose activation is kept besides.
    """

    name: str
    outputs: int
    inputs: int
    block: int
    enters: bool
    keys: bool
    gates: int = 0


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
        skips: whether a stored prefix may stand in for the first blocks.
        vocabulary: outputs of a language model's output layer; 0 for a classifier.
        word: bytes of a number of its activations.
        weight_bytes: of its frozen weights as they are stored; None for numbers of 4 bytes.
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


def shape_of(model: BaseModel) -> ModelShape:
    """Read the sizes off a loaded model."""
    shapes = resolve_targets(model.network, model.blocks, "all-linear")
    maps = []
    for name, (outputs, inputs) in shapes.items():
        block = _block(name, model.blocks)
        last = name.rpartition(".")[2]
        enters = last in ATTENTION_INPUTS
        keys = enters and not makes_queries(last)
        gates = 0 if last not in GATES else outputs // 2 if "up" in last else outputs
        maps.append(Map(name, outputs, inputs, block, enters, keys, gates))
    head = head_parameters(model)
    inside = [_block(name, model.blocks) for name in model.head_modules]
    total = sum(parameter.numel() for parameter in model.network.parameters())
    trained = sum(parameter.numel() for parameter in head.values())
    speaks = model.task == "causal_lm"
    sizes = [parameter.numel() * parameter.element_size() for parameter in model.network.parameters()]
    return ModelShape(
        maps,
        int(model.network.config.hidden_size),
        len(model.blocks),
        total - trained,
        trained,
        len(head),
        min(inside, default=len(model.blocks)),
        model.pools is not None,
        model.skips,
        int(model.network.config.vocab_size) if speaks else 0,
        model.network.dtype.itemsize if speaks else 4,
        sum(sizes) if speaks else None,
    )


def _block(name: str, blocks: Sequence[str]) -> int:
    """Number of the block that a module is in; one more than the last for a module outside."""
    return next((n for n, block in enumerate(blocks) if name.startswith(f"{block}.")), len(blocks))
