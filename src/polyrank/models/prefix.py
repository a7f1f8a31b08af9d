"""The frozen prefix: what enters the lowest adapted block, computed once per text and kept.

Blocks below the lowest adapter are the same function in every step, round and session, so their output on a
client's texts is stored in a memory-mapped file, [sum T, H], one row per token, that all worker processes
share. In a step the first block hands the stored rows out, the blocks up to the adapter pass them on, and
the model runs as always from there. The key of a file is what its content depends on: token ids, depth,
and the updates folded into the weights.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from polyrank.data.tokens import Tokens
from polyrank.durable import Lock, disk_errors, is_held, lock
from polyrank.errors import InputError
from polyrank.models.frozen import DTYPES
from polyrank.models.layout import layout_of
from polyrank.models.load import BaseModel, logits_of
from polyrank.models.packing import difference, told

_BATCH = 32


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """Files of block inputs in one folder, the least recently used of which make room for new ones."""

    folder: Path
    budget_bytes: int
    dtype: Literal["fp32", "bf16"] = "fp32"
    held: Lock | None = None

    def hidden(self, model: BaseModel, data: Tokens, depth: int) -> Tensor:
        """What enters block ``depth`` for every token of ``data``, [sum T, H]; computed when not there.

        Raises: RunError when the disk has no room for it.
        """
        path = self.folder / _key(model, data, depth, self.dtype)
        shape = (int(data.starts[-1]), int(model.network.config.hidden_size))
        with contextlib.suppress(FileNotFoundError, RuntimeError):
            rows = self._map(path, shape)
            os.utime(path)
            self._tell("hit")
            return rows
        self._make_room(shape[0] * shape[1] * DTYPES[self.dtype].itemsize)
        unfinished, numbers = path.with_suffix(f".{os.getpid()}"), shape[0] * shape[1]
        _reserve(unfinished, numbers * DTYPES[self.dtype].itemsize)
        target = torch.from_file(str(unfinished), True, numbers, dtype=DTYPES[self.dtype]).view(shape)
        compute_prefix(model, data, depth, target)
        unfinished.rename(path)
        self._tell("fill")
        return target

    def statistics(self) -> dict[str, int]:
        """How often rows were found, computed and thrown out, and the bytes that are kept now."""
        events = self.folder / "events"
        counts = Counter(events.read_text().split() if events.exists() else [])
        kept = sum(size for _, size, _ in self._files())
        return {"hits": counts["hit"], "fills": counts["fill"], "evictions": counts["evict"], "bytes": kept}

    def drop(self) -> None:
        """Free its room on the disk; who still has a file mapped keeps it until the end."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.held is not None:
            self.held.release()

    def _map(self, path: Path, shape: tuple[int, int]) -> Tensor:
        if path.stat().st_size != shape[0] * shape[1] * DTYPES[self.dtype].itemsize:
            raise FileNotFoundError(path)
        return torch.from_file(str(path), False, shape[0] * shape[1], dtype=DTYPES[self.dtype]).view(shape)

    def _make_room(self, num_bytes: int) -> None:
        files = sorted(self._files())
        kept = sum(size for _, size, _ in files)
        for _, size, path in files:
            if kept + num_bytes <= self.budget_bytes:
                return
            path.unlink(missing_ok=True)  # whoever has it mapped keeps it until the session ends
            self._tell("evict")
            kept -= size

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Last use in nanoseconds, size and path of every finished file."""
        for path in self.folder.glob("*.rows"):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                yield found.st_mtime_ns, found.st_size, path

    def _tell(self, event: str) -> None:
        with contextlib.suppress(OSError), (self.folder / "events").open("a") as file:
            file.write(f"{event}\n")  # no statistic is worth a run


def _reserve(path: Path, num_bytes: int) -> None:
    """A file whose every byte has its place on the disk: writing into a mapped hole of a full disk is fatal.

    Raises: RunError when the disk does not take it.
    """
    with disk_errors(path):
        try:
            with path.open("wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError:
            path.unlink(missing_ok=True)
            raise


def temporary_cache(room_gb: float, dtype: Literal["fp32", "bf16"]) -> PrefixCache | None:
    """A cache in a temporary folder that goes with the process, or None where there is no room for one.

    A process that was killed leaves its folder behind; its lock is free, and the next one takes it away.
    """
    if room_gb == 0:
        return None
    made = Path(tempfile.mkdtemp(prefix="polyrank-new-"))
    held = lock(made)
    folder = made.rename(made.with_name(made.name.replace("-new-", "-cache-", 1)))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for other in folder.parent.glob("polyrank-cache-*"):
        with contextlib.suppress(InputError, OSError):
            if other.stat().st_uid == os.getuid() and not is_held(other):
                shutil.rmtree(other, ignore_errors=True)
    return PrefixCache(folder, int(room_gb * 1e9), dtype, held)


def lowest_block(blocks: Sequence[str], modules: Iterable[str]) -> int:
    """Index of the first block that holds one of these modules; the last block when none does."""
    names = list(modules)
    for index, block in enumerate(blocks):
        if any(name.startswith(f"{block}.") for name in names):
            return index
    return len(blocks) - 1


def usable_depth(model: BaseModel, modules: Iterable[str], data: Tokens, cache: PrefixCache | None) -> int:
    """Blocks that can be skipped for these modules, 0 where nothing can be cached."""
    if cache is None or not model.skips:
        return 0
    depth = lowest_block(model.blocks, [*modules, *model.head_modules])
    size = int(data.starts[-1]) * int(model.network.config.hidden_size) * DTYPES[cache.dtype].itemsize
    return depth if size <= cache.budget_bytes else 0


def forward_from(
    model: BaseModel, data: Sequence[Tokens], depth: int, cache: PrefixCache | None
) -> Callable[[Sequence[Sequence[int]], Mapping[str, Tensor]], Tensor]:
    """Logits from block ``depth`` upward of a batch, given its rows of each set of texts and its inputs."""
    if depth == 0 or cache is None:
        return lambda rows, inputs: logits_of(model, inputs)
    stored = [cache.hidden(model, own, depth) for own in data]

    def logits(rows: Sequence[Sequence[int]], inputs: Mapping[str, Tensor]) -> Tensor:
        places = [torch.from_numpy(own.where(part)) for own, part in zip(data, rows, strict=True)]
        hidden = torch.cat([kept[place] for kept, place in zip(stored, places, strict=True)])
        shaped = _shaped(model, hidden.to(model.device), inputs["attention_mask"])
        with _skipping(model, depth, shaped):
            return logits_of(model, inputs)

    return logits


def compute_prefix(model: BaseModel, data: Tokens, depth: int, out: Tensor) -> None:
    """Fill ``out`` [sum T, H] with what enters block ``depth``.

    Always in the same batches of neighbours in length, so that a file has the same bits whoever fills it.
    """
    order = np.argsort(data.lengths, kind="stable")
    with torch.inference_mode():
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH].tolist()
            inputs, _ = data.batch(rows, model.device)
            entering = _entering(model, inputs, depth)
            mask = inputs["attention_mask"].bool()
            real = entering[mask] if entering.shape[:2] == mask.shape else entering[0]
            out[torch.from_numpy(data.where(rows))] = real.to(out.dtype).cpu()


def can_skip(model: BaseModel) -> bool:
    """Whether this model gives the same logits from a stored prefix as from the start."""
    return not why_not_skip(model)


def trains_below(model: BaseModel) -> bool:
    """Whether a layer below the blocks trains, as one of the embeddings that the checkpoint lacks."""
    inside = f"{model.network.base_model_prefix}."
    names = [name for name, _ in model.network.named_modules()]
    early = [name for name in names[: names.index(model.blocks[0])] if name.startswith(inside)]
    return any(name in early for name in model.head_modules)


def why_not_skip(model: BaseModel) -> str:
    """What keeps a stored prefix from standing in for the first blocks, empty when nothing does."""
    if trains_below(model):
        return "a layer below its blocks is trained"
    if len(model.blocks) < 2:
        return "it has one block"
    if not hasattr(model.network.config, "hidden_size"):
        return "its config names no hidden_size"
    depths = sorted({1, len(model.blocks) - 1})
    return next(filter(None, (_apart(model, depth) for depth in depths)), "")


def probe_texts(model: BaseModel, lengths: Sequence[int]) -> Tokens:
    """Texts of so many tokens each, for probes; of a language model all but the first token is learned."""
    total, config = sum(lengths), model.network.config
    ids = np.arange(total, dtype=np.int32) % (config.vocab_size - 4) + 3
    responses = np.ones(len(lengths), dtype=np.int64) if model.task == "causal_lm" else None
    labels = np.zeros(len(lengths), dtype=np.int64)
    return Tokens(ids, None, np.cumsum([0, *lengths]), labels, int(config.pad_token_id or 0), responses)


def _apart(model: BaseModel, depth: int) -> str:
    """How logits from a prefix up to ``depth`` are not those from the start, empty when they are."""
    data = probe_texts(model, (6, 3))
    inputs, _ = data.batch([0, 1], model.device)
    try:
        with torch.inference_mode():
            rows = torch.empty(9, int(model.network.config.hidden_size))
            compute_prefix(model, data, depth, rows)
            plain = logits_of(model, inputs)
            with _skipping(model, depth, _shaped(model, rows.to(model.device), inputs["attention_mask"])):
                return difference(plain, logits_of(model, inputs))
    except Exception as error:  # whatever a foreign model does on the probe, it only means the plain path
        return told(error)


def _key(model: BaseModel, data: Tokens, depth: int, dtype: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in (data.ids, data.starts, *([] if data.types is None else [data.types])):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update("/".join([str(depth), dtype, *model.folded]).encode())
    return f"{digest.hexdigest()}.rows"


class _Reached(Exception):  # noqa: N818
    """The forward pass has come to the block it was wanted for."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _entering(model: BaseModel, inputs: Mapping[str, Tensor], depth: int) -> Tensor:
    """The input of block ``depth``: [1, N, H] on the packed path, [B, T, H] otherwise."""

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached(args[0])

    watch = model.network.get_submodule(model.blocks[depth]).register_forward_pre_hook(stop, prepend=True)
    try:
        logits_of(model, inputs)
    except _Reached as reached:
        return reached.hidden
    finally:
        watch.remove()
    raise RuntimeError(f"the forward pass never came to block {depth}")


def _shaped(model: BaseModel, rows: Tensor, attention_mask: Tensor) -> Tensor:
    """Rows [N, H] as the blocks expect them: [1, N, H] where they run packed, [B, T, H] otherwise."""
    rows = rows.to(model.network.dtype)
    return rows[None] if model.packs else layout_of(attention_mask).pad(rows[None])


class _Feed(nn.Module):
    """Stands in for a block below the adapter: hands stored rows out, or passes its input on."""

    def __init__(self, block: nn.Module, hidden: Tensor | None) -> None:
        super().__init__()
        self.hidden = hidden
        returns = type(block).forward.__annotations__.get("return")
        self.pair = str(returns).startswith("tuple")  # DeBERTa's blocks also return attention weights or None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor, None]:
        hidden = hidden_states if self.hidden is None else self.hidden
        return (hidden, None) if self.pair else hidden


@contextlib.contextmanager
def _skipping(model: BaseModel, depth: int, hidden: Tensor) -> Iterator[None]:
    """The network whose first ``depth`` blocks are replaced by what they would have computed."""
    names = model.blocks[:depth]
    blocks = [model.network.get_submodule(name) for name in names]
    try:
        for index, (name, block) in enumerate(zip(names, blocks, strict=True)):
            model.network.set_submodule(name, _Feed(block, hidden if index == 0 else None))
        yield
    finally:
        for name, block in zip(names, blocks, strict=True):
            model.network.set_submodule(name, block)
