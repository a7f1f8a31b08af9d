"""What one client's session costs on a device: seconds, joules and memory. Simulated, never measured.

    compute_s = FLOP / reached FLOP/s + bytes moved / memory bandwidth + operations x launch_s
    forward     the blocks that run: all of them, or from the lowest adapted one where the rest is stored
    backward    gradients of activations down to the lowest adapted block and no further; no gradient of a
                frozen weight; for the adapters, of their factors too
    down_s, up_s = latency + 8 x encoded bytes / bits per second
    energy_j  = compute_w x compute_s + radio_w x (down_s + up_s)
    memory    = base weights + activations kept for the backward part + 4 x what trains (value, gradient,
                two of AdamW; 2 or 3 x with SGD) + the largest passing tensors

Source: counts of the operations that `session.py` runs; the three rates are a device's (`device.py`).
Differs: padding inside attention, the loss and the clipping of gradients are left out; energy has no
term for a device that waits.

Everything here is a pure function of plain numbers, so that it can be computed before a run, during it,
or long after from the rows of its folder. Letters: N tokens and B texts of one step, T tokens per text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from polyrank.device import Setup
from polyrank.models.shape import Map, ModelShape

WORD = 4  # bytes of a float32

# Operations of one step, (forward, backward), as torch dispatches them on the packed MiniLM, without views.
BLOCK_OPERATIONS = (14.0, 15.0)
ADAPTER_OPERATIONS = (4.0, 16.0)  # of one adapted map; the second includes clipping and the optimiser
ABSORBED_OPERATIONS = 12.0  # more, each way, of a last block without keys and values
STEP_OPERATIONS = 40.0  # embedding, head, loss and optimiser
EMBEDDING_PASSES = 10.0  # over the tokens' states, to read or to write: tables, sums and a norm
STORED_PASSES = 4.0  # more, to take them out of a stored prefix


@dataclass(frozen=True, slots=True)
class Workload:
    """One client's session.

    Args:
        ranks: slots that train, by module; modules without any are left out.
        frozen: slots that take part without training, by module.
        steps: local steps.
        texts: that went through the model over all steps, with repetitions.
        tokens: of those texts.
        stored_tokens: whose prefix is computed and stored in this session; 0 when it is there.
        skipped: blocks at the bottom that are taken from a stored prefix.
        optimizer_words: numbers per trained number besides its value: gradient and averages.
        factors: which of B and A train, as `messages.Training` has it in one round.
        asked: tokens of all steps for which the output layer of a language model runs.
    """

    shape: ModelShape
    ranks: Mapping[str, int]
    steps: int
    texts: int
    tokens: float
    bytes_down: int = 0
    bytes_up: int = 0
    frozen: Mapping[str, int] = field(default_factory=dict)
    stored_tokens: float = 0.0
    skipped: int = 0
    optimizer_words: int = 3
    asked: float = 0.0
    factors: Literal["both", "B", "A"] = "both"


@dataclass(frozen=True, slots=True)
class Demand:
    """What a session asks of any device, added up over its steps."""

    flop: float = 0.0
    moved_bytes: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Demand) -> Demand:
        return Demand(
            self.flop + other.flop,
            self.moved_bytes + other.moved_bytes,
            self.operations + other.operations,
        )

    def seconds(self, setup: Setup) -> float:
        """Time on a device."""
        work = self.flop / setup.flop_per_s + self.moved_bytes / setup.bytes_per_s
        return work + self.operations * setup.launch_s


@dataclass(frozen=True, slots=True)
class Cost:
    """Simulated seconds, joules and memory of one session on one device.

    Args:
        store_s: of computing the prefix that is stored for later sessions.
    """

    down_s: float
    store_s: float
    forward_s: float
    backward_s: float
    up_s: float
    energy_j: float
    memory_bytes: int
    flop: float

    @property
    def compute_s(self) -> float:
        return self.store_s + self.forward_s + self.backward_s

    @property
    def total_s(self) -> float:
        return self.down_s + self.compute_s + self.up_s


def cost(work: Workload, setup: Setup) -> Cost:
    """Price one session on one device.

    Raises: ValueError when the work skips blocks that hold an adapter.
    """
    down_s, up_s = link_seconds(work.bytes_down, work.bytes_up, setup)
    store, ahead, back = stored(work), forward(work), backward(work)
    store_s, forward_s, backward_s = (demand.seconds(setup) for demand in (store, ahead, back))
    energy_j = setup.compute_w * (store_s + forward_s + backward_s) + setup.radio_w * (down_s + up_s)
    flop = (store + ahead + back).flop
    return Cost(down_s, store_s, forward_s, backward_s, up_s, energy_j, memory_bytes(work), flop)


def link_seconds(bytes_down: int, bytes_up: int, setup: Setup) -> tuple[float, float]:
    """Seconds down and up; nothing is sent in no time."""
    down = setup.latency_s + 8 * bytes_down / setup.down_bit_per_s if bytes_down else 0.0
    return down, setup.latency_s + 8 * bytes_up / setup.up_bit_per_s if bytes_up else 0.0


def lowest_block(work: Workload) -> int:
    """The block at which back-propagation stops; the number of blocks when only the head trains."""
    held = [one.block for one in work.shape.maps if work.ranks.get(one.name)]
    return min([*held, work.shape.head_block])


def forward(work: Workload) -> Demand:
    """The forward part of all steps, the adapters' included."""
    if work.skipped > min([lowest_block(work), *_frozen_blocks(work)], default=0):
        raise ValueError("a block that holds an adapter cannot be taken from a stored prefix")
    total = _blocks_forward(work, work.skipped) + _adapters_forward(work)
    head = 2.0 * work.shape.head_parameters * work.texts
    passes = EMBEDDING_PASSES + (STORED_PASSES if work.skipped else 0.0)
    entering = work.shape.word * passes * work.tokens * work.shape.hidden
    return total + _output(work) + Demand(head, entering, STEP_OPERATIONS * work.steps)


def backward(work: Workload) -> Demand:
    """The backward part of all steps and the optimiser; blocks that are computed again, too."""
    lowest, total = lowest_block(work), Demand()
    if work.shape.recomputes:
        total = _again(work, lowest)
    for block in range(lowest, work.shape.blocks):
        total += Demand(0.0, 0.0, BLOCK_OPERATIONS[1] * work.steps)
        if block > lowest or _learns_attention(work, lowest):
            total += _attention(work, block, 1 if block == lowest and _absorbed(work, block) else 2)
    for one in work.shape.maps:
        rows, rank = _rows(work, one), work.ranks.get(one.name, 0)
        if one.block < lowest:
            continue
        passes = _passes_gradient(work, one, lowest)
        if passes:
            total += Demand(2.0 * one.outputs * one.inputs * rows, _traffic(work, one, rows), 0.0)
        if rank or (passes and _held(work, one)):
            inputs = _adapter_inputs(work, one)
            moved = WORD * rows * (4 * inputs + 6 * one.outputs + 4 * rank)
            through = one.outputs if passes or work.factors != "B" else 0  # B alone needs nothing from below
            passed = 2.0 * _held(work, one) * (through + (inputs if passes else 0)) * rows
            learned = 2.0 * rank * _trained(work, one.outputs, inputs) * rows
            total += Demand(passed + learned, moved, ADAPTER_OPERATIONS[1] * work.steps)
    trained = trained_numbers(work)
    total += _output(work)
    return total + Demand(4.0 * work.shape.head_parameters * work.texts, 7.0 * WORD * trained * work.steps)


def stored(work: Workload) -> Demand:
    """Computing, once, the prefix that later steps and sessions take from store."""
    if not work.stored_tokens:
        return Demand()
    per_text = _per_text(work)
    texts = work.stored_tokens / max(1.0, per_text)
    batches = max(1.0, texts / 32)
    shape = work.shape
    total = Demand(0.0, 0.0, STEP_OPERATIONS * batches)
    for one in shape.maps:
        if one.block < work.skipped:
            moved = work.shape.word * work.stored_tokens * (one.inputs + 3 * one.outputs)
            total += Demand(2.0 * one.outputs * one.inputs * work.stored_tokens, moved, 0.0)
    for _ in range(work.skipped):
        flop = 4.0 * work.stored_tokens * per_text * shape.hidden
        total += Demand(flop, 0.0, BLOCK_OPERATIONS[0] * batches)
    return total


def memory_bytes(work: Workload) -> int:
    """The most memory that one step takes."""
    return sum(memory_parts(work).values())


def memory_parts(work: Workload) -> dict[str, int]:
    """The same by what takes it."""
    shape = work.shape
    weights = WORD * (shape.parameters + shape.head_parameters)
    frozen = sum(work.frozen.get(one.name, 0) * (one.inputs + one.outputs) for one in shape.maps)
    trained = trained_numbers(work)
    both = trained_numbers(replace(work, factors="both"))
    return {
        "base": weights if shape.weight_bytes is None else shape.weight_bytes,
        "adapter": WORD * (both + frozen),
        "optimiser": WORD * trained * work.optimizer_words,
        "activations": int(kept_bytes(work)),
        "passing": int(_passing_bytes(work)),
    }


def trained_numbers(work: Workload) -> int:
    """Numbers that train: factors and head."""
    factors = sum(
        work.ranks.get(one.name, 0) * _trained(work, one.outputs, one.inputs) for one in work.shape.maps
    )
    return factors + work.shape.head_parameters


def kept_bytes(work: Workload) -> float:
    """Activations that one step keeps for its backward part: none below the lowest adapted block."""
    lowest, steps, total = lowest_block(work), max(1, work.steps), 0.0
    read: set[tuple[int, float]] = set()
    for one in work.shape.maps:
        rows, rank = _rows(work, one) / steps, work.ranks.get(one.name, 0)
        first = one.block == lowest and ((one.enters and _learns_attention(work, lowest)) or rank > 0)
        if one.block > lowest or first or (one.block == lowest and _passes_gradient(work, one, lowest)):
            total += rows * one.keeps  # what follows it keeps its input: attention, activation or norm
        if rank:
            shared = one.enters and (one.block, rows) in read  # queries, keys and values read one tensor
            total += rows * (rank + (0 if shared else one.inputs))
            read |= {(one.block, rows)} if one.enters else set()
    running = work.shape.blocks - lowest
    tokens = sum(_read_rows(work, block) for block in range(lowest, work.shape.blocks)) / steps
    leaving = work.shape.hidden  # attention, where that is fused, and else scores
    total += tokens * (work.shape.scores * _per_text(work) if work.shape.scores else leaving)
    last = work.shape.blocks - 1
    if _absorbed(work, last) and (lowest < last or _learns_attention(work, last)):
        heads, texts = (
            work.shape.absorbs,
            work.texts / steps,
        )  # states; weights, carried queries, mixed states
        total += work.tokens / steps * work.shape.hidden
        total += texts * heads * (_per_text(work) + 2 * work.shape.hidden)
    if work.shape.recomputes and running:  # what enters each block, and the rest of one of them at a time
        total = work.tokens / steps * work.shape.hidden * running + total / running
    spoken = work.asked / steps * work.shape.vocabulary  # log probabilities
    return work.shape.word * (total + spoken * work.shape.capped) + WORD * spoken


def _passing_bytes(work: Workload) -> float:
    """The largest tensors that come and go: what enters and leaves the widest map, twice."""
    widest = max((one.inputs + one.outputs for one in work.shape.maps), default=0)
    spoken = WORD * work.asked * (work.shape.hidden + work.shape.vocabulary)
    return 2.0 / max(1, work.steps) * max(work.shape.word * work.tokens * widest, spoken)


def _adapters_forward(work: Workload) -> Demand:
    """The low-rank products of all adapters."""
    total = Demand()
    for one in work.shape.maps:
        rank, rows = _held(work, one), _rows(work, one)
        if rank:
            inputs = _adapter_inputs(work, one)
            moved = WORD * rows * (inputs + 6 * one.outputs + 2 * rank)
            total += Demand(
                2 * rank * (inputs + one.outputs) * rows, moved, ADAPTER_OPERATIONS[0] * work.steps
            )
    return total


def _again(work: Workload, lowest: int) -> Demand:
    """The second pass of blocks that are computed again, without maps that lead to nothing that is kept."""
    last = {one.block: one for one in work.shape.maps}
    maps = [
        one
        for one in work.shape.maps
        if _held(work, one) or (last[one.block] is not one and (one.block > lowest or not one.beside))
    ]
    again = replace(work, shape=replace(work.shape, maps=maps))
    return _blocks_forward(again, lowest) + _adapters_forward(again)


def _blocks_forward(work: Workload, first: int) -> Demand:
    """The frozen maps and attention of the blocks from ``first`` upward."""
    total = Demand()
    for block in range(first, work.shape.blocks):
        total += Demand(0.0, 0.0, BLOCK_OPERATIONS[0] * work.steps) + _attention(work, block, 1)
    for one in work.shape.maps:
        if one.block >= first:
            rows = _rows(work, one)
            total += Demand(2.0 * one.outputs * one.inputs * rows, _traffic(work, one, rows))
    return total


def _output(work: Workload) -> Demand:
    """A language model's frozen output layer: once forward, and once for the gradient of what enters it."""
    size = work.shape.vocabulary * work.shape.hidden
    rows = WORD * work.asked * (work.shape.hidden + 3 * work.shape.vocabulary)
    return Demand(2.0 * size * work.asked, rows + work.shape.word * work.steps * size if work.asked else 0.0)


def _attention(work: Workload, block: int, times: int) -> Demand:
    """Scores and weighted values of one block: every query meets T keys, or as many states for each head."""
    each = times * 4.0 * _read_rows(work, block) * _per_text(work) * work.shape.hidden
    if not _absorbed(work, block):
        return Demand(each)
    moved = times * 4.0 * work.shape.word * work.tokens * work.shape.hidden
    return Demand(each * work.shape.absorbs, moved, ABSORBED_OPERATIONS * work.steps)


def _per_text(work: Workload) -> float:
    """Tokens of a text."""
    return work.tokens / max(1, work.texts)


def _traffic(work: Workload, one: Map, rows: float) -> float:
    """Bytes that a frozen map and what follows it read and write: weights once per step, rows in and out."""
    weights = work.shape.map_word * work.steps * one.inputs * one.outputs
    return weights + work.shape.word * rows * (one.inputs + 3 * one.outputs)


def _rows(work: Workload, one: Map) -> float:
    """Rows that go through a map over all steps."""
    pooled = work.shape.pooled and one.block == work.shape.blocks - 1
    return work.texts if pooled and (not one.keys or work.shape.absorbs) else work.tokens


def _read_rows(work: Workload, block: int) -> float:
    """Rows that leave a block's attention over all steps."""
    return work.texts if work.shape.pooled and block == work.shape.blocks - 1 else work.tokens


def _absorbed(work: Workload, block: int) -> bool:
    """Whether a block's attention does without keys and values (`models/absorbed.py`)."""
    return work.shape.absorbs > 0 and block == work.shape.blocks - 1


def _adapter_inputs(work: Workload, one: Map) -> int:
    """Numbers that A reads of each row: of a map that is absorbed, one state for each head."""
    return one.inputs * (work.shape.absorbs if one.keys and _absorbed(work, one.block) else 1)


def _held(work: Workload, one: Map) -> int:
    return work.ranks.get(one.name, 0) + work.frozen.get(one.name, 0)


def _trained(work: Workload, of_b: int, of_a: int) -> int:
    """Of so many numbers of B and of A, those that train."""
    return (0 if work.factors == "A" else of_b) + (0 if work.factors == "B" else of_a)


def _frozen_blocks(work: Workload) -> list[int]:
    return [one.block for one in work.shape.maps if work.frozen.get(one.name)]


def _learns_attention(work: Workload, block: int) -> bool:
    """Whether something that feeds a block's attention trains."""
    return any(one.enters and work.ranks.get(one.name) for one in work.shape.maps if one.block == block)


def _passes_gradient(work: Workload, one: Map, lowest: int) -> bool:
    """Whether the gradient of a map's input is needed: in the lowest block, only after an adapter.

    An MLP beside attention does not come after its maps.
    """
    if one.block > lowest:
        return True
    if one.enters:
        return one.keys and _absorbed(work, one.block) and _learns_attention(work, lowest)
    names = [other for other in work.shape.maps if other.block == lowest and other.beside == one.beside]
    before = [*names[: names.index(one)], *(other for other in names if other.enters)]
    return any(work.ranks.get(other.name) for other in before) or lowest == work.shape.head_block
