"""The slot bank: low-rank factors per module, and which of their rank slots are held.

For each adapted module the server keeps R rank slots,

    delta_W = scale * B @ diag(e) @ A,      B: [O, R], e: [R] or all ones, A: [R, I]

and slot j is the rank-one term ``scale * e_j * B[:, j] A[j, :]``. A rank mask, one boolean per
slot, is the one currency between policies, clients and rules: a uniform rank, a device tier,
a depth limit and a pruned slot all say which slots of which modules somebody holds.

Shapes: O out, I in, R slots, r held slots.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polyrank.seed import seed_for

ModuleName = str
Form = Literal["lora", "svd"]
RankMask = Mapping[ModuleName, Bool[Tensor, " R"]]
Head = Mapping[str, Tensor]
"""Parameters of the task head (and of layers the checkpoint lacks) by dotted name; trained in full."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of one module.

    Args:
        B: output factor, [O, r].
        A: input factor, [r, I].
        scale: multiplies the product; belongs to the module, never to a client's rank.
        e: one value per slot, [r]; None means all ones (form ``lora``).
    """

    B: Float[Tensor, "O r"]
    A: Float[Tensor, "r I"]
    scale: float
    e: Float[Tensor, " r"] | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The trainable tensors by name, in the order in which they travel."""
        named = {"B": self.B, "e": self.e, "A": self.A}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Factors:
        """The same module with other values; ``tensors`` as returned by `tensors`."""
        return replace(self, B=tensors["B"], A=tensors["A"], e=tensors.get("e"))


@dataclass(frozen=True, slots=True)
class Adapter:
    """All adapted modules, in forward order: key order is depth order."""

    form: Form
    modules: Mapping[ModuleName, Factors]

    def num_parameters(self) -> int:
        return sum(t.numel() for f in self.modules.values() for t in f.tensors().values())


@dataclass(frozen=True, slots=True)
class Draw:
    """What a fresh A was drawn from: enough to draw it again, so that it need not travel.

    Args:
        columns: every row of A picks one column of the weight (SLoRA's sparse stage).
    """

    seed: int
    columns: bool = False


def new_adapter(
    shapes: Mapping[ModuleName, tuple[int, int]],
    *,
    form: Form,
    rank: int,
    scale: float,
    seed: int,
    columns: bool = False,
) -> Adapter:
    """A fresh bank whose product is zero, so that round 0 starts from the base model.

    ``lora``: A uniform as in PEFT, B = 0. ``svd`` (FedARA, arXiv 2501.14406): A and B normal with
    standard deviation 0.02, e = 0. Each module draws from its own seed, so that adding a module
    changes no other. ``columns`` (form ``lora``): the rows of A are unit vectors, each of another column
    of the weight, so that B holds those columns of the update and nothing else moves.

    Args:
        shapes: (O, I) of each module, in forward order.
        rank: R, the number of slots of every module.
        scale: multiplies the product (``lora_alpha / r`` in PEFT's words).
    """
    modules = {}
    for name, (out, in_) in shapes.items():
        draw = torch.Generator().manual_seed(seed_for(seed, "adapter", name))
        if columns:
            chosen = torch.randperm(in_, generator=draw)[:rank]
            A = torch.nn.functional.one_hot(chosen, in_).float()
            modules[name] = Factors(B=torch.zeros(out, rank), A=A, scale=scale)
        elif form == "lora":
            bound = 1 / math.sqrt(in_)
            A = (torch.rand(rank, in_, generator=draw) * 2 - 1) * bound
            modules[name] = Factors(B=torch.zeros(out, rank), A=A, scale=scale)
        else:
            A = torch.randn(rank, in_, generator=draw) * 0.02
            B = torch.randn(out, rank, generator=draw) * 0.02
            modules[name] = Factors(B=B, A=A, scale=scale, e=torch.zeros(rank))
    return Adapter(form, modules)


def delta_weight(factors: Factors) -> Float[Tensor, "O I"]:
    """The dense update of one module. For merging and for tests; rules never build it."""
    A = factors.A if factors.e is None else factors.e[:, None] * factors.A
    return factors.scale * (factors.B @ A)


def full_mask(adapter: Adapter) -> RankMask:
    """Every slot of every module."""
    return {name: torch.ones(f.rank, dtype=torch.bool) for name, f in adapter.modules.items()}


def prefix_mask(adapter: Adapter, rank: int) -> RankMask:
    """The first ``rank`` slots of every module."""
    return {name: torch.arange(f.rank) < rank for name, f in adapter.modules.items()}


def mask_and(first: RankMask, second: RankMask) -> RankMask:
    """The slots that are in both masks."""
    return {name: held & second[name] for name, held in first.items()}


def mask_minus(first: RankMask, second: RankMask) -> RankMask:
    """The slots of the first mask that are not in the second."""
    return {name: held & ~second[name] for name, held in first.items()}


def within(mask: RankMask, held: RankMask) -> RankMask:
    """A mask over the bank's slots as a mask over the held slots alone, for a restricted adapter."""
    return {name: part[held[name]] for name, part in mask.items()}


def over_bank(part: RankMask, held: RankMask) -> RankMask:
    """A mask over the held slots alone as a mask over the bank's slots; undoes `within`."""
    whole = {}
    for name, slots in held.items():
        whole[name] = slots.clone()
        if name in part:
            whole[name][slots] = part[name]
    return whole


def block_numbers(names: Iterable[ModuleName]) -> dict[ModuleName, int]:
    """Depth of the block that each module is in: the first number in its dotted name; 0 without one."""
    return {name: next((int(word) for word in name.split(".") if word.isdigit()), 0) for name in names}


def top_blocks(mask: RankMask, depth: int) -> RankMask:
    """The slots of the last ``depth`` blocks that the mask names; none of the others."""
    blocks = block_numbers(mask)
    held = set(sorted(set(blocks.values()))[-depth:])
    return {name: s if blocks[name] in held else torch.zeros_like(s) for name, s in mask.items()}


def num_slots(mask: RankMask) -> int:
    """How many slots a mask holds over all modules."""
    return sum(int(held.sum()) for held in mask.values())


def restrict(adapter: Adapter, mask: RankMask) -> Adapter:
    """The held slots only; a module without a held slot is absent, not empty."""
    modules = {}
    for name, factors in adapter.modules.items():
        held = mask[name]
        if bool(held.all()):
            modules[name] = factors
        elif bool(held.any()):
            e = None if factors.e is None else factors.e[held]
            modules[name] = Factors(factors.B[:, held], factors.A[held], factors.scale, e)
    return Adapter(adapter.form, modules)


def embed(adapter: Adapter, mask: RankMask, like: Adapter) -> Adapter:
    """Put held slots back into the bank ``like``; every other slot keeps its value there."""
    modules = {}
    for name, bank in like.modules.items():
        if name not in adapter.modules:
            modules[name] = bank
            continue
        held, part = mask[name], adapter.modules[name]
        B, A = bank.B.clone(), bank.A.clone()
        B[:, held], A[held] = part.B, part.A
        e = bank.e
        if e is not None and part.e is not None:
            e = e.clone()
            e[held] = part.e
        modules[name] = Factors(B, A, bank.scale, e)
    return Adapter(like.form, modules)


def fresh_slots(like: Adapter, draw: Draw) -> Adapter:
    """A new bank of the shapes of ``like`` whose product is zero."""
    modules: dict[ModuleName, Factors] = {}
    for name, f in like.modules.items():
        bank = new_adapter(
            {name: (f.B.shape[0], f.A.shape[1])},
            form=like.form,
            rank=f.rank,
            scale=f.scale,
            seed=draw.seed,
            columns=draw.columns,
        )
        modules |= bank.modules
    return Adapter(like.form, modules)


def fingerprint(adapter: Adapter) -> str:
    """A short hash of all numbers and names of an adapter."""
    digest = hashlib.blake2b(digest_size=16)
    for name, factors in adapter.modules.items():
        digest.update(name.encode())
        for tensor in factors.tensors().values():
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
