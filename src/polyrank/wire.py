"""Messages as bytes: the only codec, and the only place where a message gets its size.

A message is a digest of 16 bytes and one safetensors buffer. Numbers travel as flat tensors, meaning as one
JSON text:

    adapter   float32   B, e, A of each held module, module after module
    head      float32   the head's parameters
    mask      uint8     one bit per slot of the bank: held; in an update: kept by self-pruning
    trained   uint8     one bit per slot of the bank: of the held slots, those that train
    votes     uint8     one bit per slot that trained: those the client votes for
    folds     float32   updates that join the frozen weights, where a client has missed some
    "polyrank" in the metadata: kind, round, client, shapes, training settings

A task carries the shapes. An update carries none: its schema is that of the task it answers, so a
reply of any other size is refused before it is read. Only the factors that trained come up, and an A
that never changes goes down as its seed. Flat tensors keep the overhead at about 60 bytes a module.
What comes up is opened here and judged in `gate.py`. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from polyrank.adapter import (
    Adapter,
    Draw,
    Factors,
    RankMask,
    fresh_slots,
    full_mask,
    within,
)
from polyrank.messages import (
    Ballot,
    ClientScores,
    ClientUpdate,
    EvaluateTask,
    Folds,
    Reason,
    Task,
    Training,
    TrainTask,
)

FORMAT = 2
MAX_REPLY_HEADER = 8192
ALL_PARTS = frozenset({"B", "e", "A"})
_METADATA = "polyrank"
_DIGEST_BYTES = 16
_DRAWN_BYTES = 12
"""For each number of a drawn A: itself in float32, and a whole number where it picks columns."""


class WireError(ValueError):
    """Bytes that are not the message that was expected.

    Args:
        reason: the kind of refusal, by which refusals are counted.
    """

    def __init__(self, message: str, reason: Reason = "header") -> None:
        super().__init__(message)
        self.reason: Reason = reason


# --- tasks: server to client -----------------------------------------------------------------


def encode_task(task: Task) -> bytes:
    """The task as bytes; equal tasks give equal bytes."""
    meaning: dict[str, Any] = {
        "format": FORMAT,
        "kind": "train" if isinstance(task, TrainTask) else "evaluate",
        "round": task.round,
        "client": task.client,
        "form": task.adapter.form,
        "modules": _module_table(task.adapter, task.mask),
        "head": [[name, list(t.shape)] for name, t in task.head.items()],
    }
    parts = ALL_PARTS
    tensors = {"head": flatten(task.head.values()), "mask": pack_bits(task.mask)}
    if isinstance(task, TrainTask):
        training = task.training.model_dump(exclude_defaults=True)
        meaning |= {"seed": task.seed, "training": training, "attempt": task.attempt, "base": task.base}
        if any(not torch.equal(task.trained[name], held) for name, held in task.mask.items()):
            tensors["trained"] = pack_bits(task.trained)
        if task.ballot is not None:
            meaning["ballot"] = asdict(task.ballot)
        if task.drawn is not None:
            meaning["drawn"] = asdict(task.drawn)
            parts = ALL_PARTS - {"A"}
    else:
        meaning |= {"batch_size": task.batch_size}
    tensors["adapter"] = flatten(adapter_tensors(task.adapter, parts))
    if task.folds.adapters:
        tables = [_module_table(fold, full_mask(fold)) for fold in task.folds.adapters]
        meaning["folds"] = {"first": task.folds.first, "modules": tables}
        tensors["folds"] = flatten(t for fold in task.folds.adapters for t in adapter_tensors(fold))
    return _encode(meaning, tensors)


def decode_task(data: bytes) -> Task:
    """Raises: WireError when the bytes are not a task."""
    meaning, tensors = _decode(data)
    try:
        sizes = {name: slots for name, _, _, _, slots in meaning["modules"]}
        mask = unpack_bits(tensors["mask"], sizes)
        ranks = {name: int(held.sum()) for name, held in mask.items()}
        schema = _adapter_schema(meaning["form"], meaning["modules"], ranks)
        drawn, parts = None, ALL_PARTS
        if "drawn" in meaning:
            drawn, parts = Draw(**meaning["drawn"]), ALL_PARTS - {"A"}
            schema = _with_drawn_a(schema, meaning["modules"], mask, drawn)
        adapter = unflatten_adapter(tensors["adapter"], schema, parts)
        folds = _decode_folds(meaning, tensors)
        head_shapes = {name: tuple(shape) for name, shape in meaning["head"]}
        head = unflatten(tensors["head"], head_shapes)
        common = (meaning["round"], meaning["client"])
        if meaning["kind"] == "train":
            training = Training.model_validate(meaning["training"])
            trained = unpack_bits(tensors["trained"], sizes) if "trained" in tensors else mask
            ballot = Ballot(**meaning["ballot"]) if "ballot" in meaning else None
            task = TrainTask(*common, meaning["seed"], mask, trained, adapter, head, training, folds)
            asked = {"attempt": meaning["attempt"], "base": meaning["base"]}
            return replace(task, drawn=drawn, ballot=ballot, **asked)
        if meaning["kind"] == "evaluate":
            return EvaluateTask(*common, mask, adapter, head, meaning["batch_size"], folds)
    except (
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:  # the last is torch's, of a negative size
        raise WireError(f"not a task: {error}") from error
    raise WireError(f"unknown kind of task {meaning['kind']!r}")


def task_bytes(data: bytes) -> int:
    """What a task takes once it is read: its own bytes, and those of an A that travels as its seed.

    It is told from the header alone, for whoever must not read more than there is room for.

    Raises: WireError when the bytes are not a task.
    """
    try:
        size = int.from_bytes(data[_DIGEST_BYTES : _DIGEST_BYTES + 8], "little")
        body = data[_DIGEST_BYTES + 8 : _DIGEST_BYTES + 8 + size]
        meaning = json.loads(json.loads(body)["__metadata__"][_METADATA])
        drawn = sum(abs(in_ * slots) for _, _, in_, _, slots in meaning["modules"])
        return len(data) + (_DRAWN_BYTES * int(drawn) if "drawn" in meaning else 0)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise WireError(f"not a task: {error}") from error


# --- replies: client to server ---------------------------------------------------------------


def encode_update(update: ClientUpdate, task: TrainTask) -> bytes:
    """The update as bytes: the factors that trained. Shapes are those of its task and do not travel."""
    tensors = {
        "adapter": flatten(adapter_tensors(update.adapter, trained_parts(task.training))),
        "head": flatten(update.head.values()),
    }
    if any(not torch.equal(update.mask[name], bits) for name, bits in task.trained.items()):
        tensors["mask"] = pack_bits(update.mask)
    if update.votes is not None:
        tensors["votes"] = pack_bits(within(update.votes, task.trained))
    return _encode(_reply("update", update) | {"attempt": task.attempt, "base": task.base}, tensors)


def encode_scores(scores: ClientScores) -> bytes:
    """The scores as bytes."""
    return _encode(_reply("scores", scores), {})


def _reply(kind: str, reply: ClientUpdate | ClientScores) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": kind,
        "round": reply.round,
        "client": reply.client,
        "num_examples": reply.num_examples,
        "metrics": dict(reply.metrics),
    }


def open_reply(data: bytes, max_header: int = MAX_REPLY_HEADER) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Meaning and tensors of a reply; what they say is for `gate.py` to check.

    Raises: WireError when the bytes are not one message of flat tensors, spelt without anything that it does
        not need.
    """
    body = _unsealed(data)
    size = int.from_bytes(body[:8], "little")
    if size > max_header:
        raise WireError(f"a header of {size} bytes, at most {max_header} are possible")
    try:
        header = json.loads(body[8 : 8 + size], object_pairs_hook=_once)
        if list(header.pop("__metadata__")) != [_METADATA]:
            raise WireError("metadata besides that of polyrank")
        if any(set(entry) != {"dtype", "shape", "data_offsets"} for entry in header.values()):
            raise WireError("a tensor that is described by other keys")
        shapes = {name: entry["shape"] for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WireError(f"not a polyrank message: {error}") from error
    for name, shape in shapes.items():
        _is_row(name, shape, len(body))
    return _parsed(body)


def _is_row(name: str, shape: object, most: int) -> None:
    """Look at a shape before anything is made of it: a product of its numbers may have no end.

    Raises: WireError when it is not that of a flat tensor that the message has room for.
    """
    (length,) = shape if isinstance(shape, list) and len(shape) == 1 else (None,)
    if type(length) is not int or not 0 <= length <= most:
        raise WireError(f"tensor {name[:64]} is no row of at most {most} numbers", "shape")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise WireError("a key stands there twice")
    return found


# --- flat tensors and bits -------------------------------------------------------------------


def trained_parts(training: Training) -> frozenset[str]:
    """Names of the factors that train, and so come up, under these settings."""
    return {"both": ALL_PARTS, "B": ALL_PARTS - {"A"}, "A": frozenset({"A"})}[training.factors]


def adapter_tensors(adapter: Adapter, parts: frozenset[str] = ALL_PARTS) -> list[Tensor]:
    """The tensors of an adapter in the order in which they travel."""
    modules = adapter.modules.values()
    return [t for factors in modules for part, t in factors.tensors().items() if part in parts]


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers of some tensors in one float32 row."""
    rows = [t.detach().reshape(-1).to("cpu", torch.float32) for t in tensors]
    return torch.cat(rows) if rows else torch.zeros(0)


def unflatten(flat: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Cut a row into named tensors (views).

    Raises: WireError when the row is not a float32 row of exactly these sizes.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    if flat.ndim != 1 or flat.dtype != torch.float32 or flat.numel() != sum(sizes):
        found = f"{flat.dtype} {list(flat.shape)}"
        reason: Reason = "dtype" if flat.dtype != torch.float32 else "shape"
        raise WireError(f"expected float32 [{sum(sizes)}], found {found}", reason)
    parts = torch.split(flat, sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def unflatten_adapter(flat: Tensor, like: Adapter, parts: frozenset[str] = ALL_PARTS) -> Adapter:
    """Cut a row into an adapter of the shapes of ``like``; other parts are those of ``like``."""
    shapes = {
        f"{name}/{part}": tuple(tensor.shape)
        for name, factors in like.modules.items()
        for part, tensor in factors.tensors().items()
        if part in parts
    }
    values = unflatten(flat, shapes)
    modules = {
        name: factors.with_tensors(
            {part: values.get(f"{name}/{part}", t) for part, t in factors.tensors().items()}
        )
        for name, factors in like.modules.items()
    }
    return Adapter(like.form, modules)


def pack_bits(mask: RankMask) -> Tensor:
    """One bit per slot over all modules, [ceil(sum R / 8)] bytes."""
    bits = np.concatenate([held.numpy() for held in mask.values()]) if mask else np.zeros(0, bool)
    return torch.from_numpy(np.packbits(bits))


def unpack_bits(packed: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The masks packed by `pack_bits`; ``sizes`` is R by module.

    Raises: WireError when the bytes are not exactly those of so many slots.
    """
    total = sum(sizes.values())
    if packed.ndim != 1 or packed.dtype != torch.uint8 or packed.numel() != -(-total // 8):
        reason: Reason = "dtype" if packed.dtype != torch.uint8 else "shape"
        raise WireError(f"expected the bits of {total} slots, found {list(packed.shape)}", reason)
    bits = torch.from_numpy(np.unpackbits(packed.numpy(), count=total).astype(bool))
    return dict(zip(sizes, torch.split(bits, list(sizes.values())), strict=True))


def _module_table(adapter: Adapter, mask: RankMask) -> list[list[Any]]:
    """Rows (name, O, I, scale, R) of every module of the bank; O, I and scale 0 where nothing is held."""
    if [name for name, held in mask.items() if bool(held.any())] != list(adapter.modules):
        raise ValueError("mask and adapter must name the held modules in the same order")
    rows: list[list[Any]] = []
    for name, held in mask.items():
        f = adapter.modules.get(name)
        shape = [f.B.shape[0], f.A.shape[1], f.scale] if f is not None else [0, 0, 0.0]
        rows.append([name, *shape, held.numel()])
    return rows


def _adapter_schema(form: Any, table: Sequence[Sequence[Any]], ranks: Mapping[str, int]) -> Adapter:
    """An adapter of the right shapes without numbers (meta tensors)."""
    modules = {}
    for name, out, in_, scale, _ in table:
        rank = ranks[name]
        if rank == 0:
            continue
        B = torch.empty(out, rank, device="meta")
        A = torch.empty(rank, in_, device="meta")
        e = torch.empty(rank, device="meta") if form == "svd" else None
        modules[name] = Factors(B, A, scale, e)
    return Adapter(form, modules)


def _with_drawn_a(schema: Adapter, table: Any, mask: RankMask, draw: Draw) -> Adapter:
    """The schema with A as it was drawn for the whole bank."""
    widths = {name: in_ for name, _, in_, _, _ in table}
    modules = {}
    for name, factors in schema.modules.items():
        slots, in_ = mask[name].numel(), widths[name]
        whole = Factors(torch.empty(0, slots, device="meta"), torch.empty(slots, in_, device="meta"), 1.0)
        bank = fresh_slots(Adapter(schema.form, {name: whole}), draw)
        modules[name] = replace(factors, A=bank.modules[name].A[mask[name]])
    return Adapter(schema.form, modules)


def _decode_folds(meaning: dict[str, Any], tensors: Mapping[str, Tensor]) -> Folds:
    if "folds" not in meaning:
        return Folds()
    schemas = []
    for table in meaning["folds"]["modules"]:
        schemas.append(_adapter_schema("lora", table, {name: slots for name, _, _, _, slots in table}))
    sizes = {str(number): (schema.num_parameters(),) for number, schema in enumerate(schemas)}
    rows = unflatten(tensors["folds"], sizes).values()
    adapters = [unflatten_adapter(row, schema) for row, schema in zip(rows, schemas, strict=True)]
    return Folds(meaning["folds"]["first"], adapters)


def _encode(meaning: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    text = json.dumps(meaning, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sealed(save(tensors, metadata={_METADATA: text}))


def sealed(body: bytes) -> bytes:
    """A message: the digest of its body, and the body. It finds damage, not forgery."""
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() + body


def _unsealed(data: bytes) -> bytes:
    body = data[_DIGEST_BYTES:]
    if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != data[:_DIGEST_BYTES]:
        raise WireError("not a polyrank message, or one that was damaged on its way", "digest")
    return body


def _decode(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return _parsed(_unsealed(data))


def _parsed(body: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        size = int.from_bytes(body[:8], "little")
        meaning = json.loads(json.loads(body[8 : 8 + size])["__metadata__"][_METADATA])
        tensors = load(body)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise WireError(f"not a polyrank message: {error}") from error
    if not isinstance(meaning, dict) or meaning.get("format") != FORMAT:
        raise WireError("not a polyrank message of a known format")
    return meaning, tensors
