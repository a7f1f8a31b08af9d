"""A site: its own table of data and limits, what it checks before it joins a run, and what it refuses.

The server's word is never taken for more than the site's own table allows: the model that is loaded is the
one that the table names, texts come from where the table says, and a task that asks for more rank, steps or
memory than the limits is refused before any work. What the server learns is `Joined` and the answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator

from polyrank.client import handle
from polyrank.clock import session_size, workload
from polyrank.cost import WORD, memory_bytes
from polyrank.data.instructions import ENCODERS, KNOWN
from polyrank.data.source import load_file
from polyrank.data.source import read_table as read_file
from polyrank.data.texts import Data, TextColumns, Texts, check_columns
from polyrank.errors import InputError, choices
from polyrank.messages import ClientId, Task, Training, TrainTask
from polyrank.models.load import PACKAGED, BaseModel, TaskName, load_base, pick_device
from polyrank.models.prefix import can_skip, temporary_cache
from polyrank.models.shape import shape_of
from polyrank.models.speaker import Bits, load_speaker
from polyrank.schema import Schema
from polyrank.seed import seed_for
from polyrank.session import ClientEnv, ClientError
from polyrank.tables import as_input_error, read_toml
from polyrank.wire import decode_task, task_bytes

_log = logging.getLogger("polyrank")
Count = Annotated[int, Field(ge=1)]
_LONGEST_LABEL = 40
MAX_TEXTS = 10**8
"""A site's own word for how many texts it has decides its weight in a mean, so there is an end to it."""


class SiteModel(Schema):
    """The base model as it lies on this site."""

    name: str = PACKAGED
    """``minilm`` (packaged), a local folder, or a hub id; the server's own name for it does not matter."""
    sha256: str | None = None
    """Of the weight files: ``cat *.safetensors | sha256sum`` in the model's folder. None: any."""


class SiteData(Schema):
    """The site's own texts."""

    source: str
    """A .csv, .tsv, .parquet or .jsonl file; a relative path counts from the table's folder."""
    text: TextColumns | str = ("text",)
    label: str = "label"
    prompt: TextColumns | str | None = None
    """For a language model; without any of these, the columns are found by their usual names."""
    response: str | None = None
    messages: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        check_columns(self.prompt, self.response, self.messages)
        return self

    @property
    def columns(self) -> Data:
        """The same as a run has it."""
        return Data(**self.model_dump())


class Limits(Schema):
    """The most that a server may ask for."""

    max_rank: Count = 64
    """Slots of one module, trained or frozen."""
    max_steps: Count = 10_000
    """Local steps of one session."""
    max_memory_gb: Annotated[float, Field(gt=0)] = 16.0
    """Memory that a session is estimated to take (`cost.py`), base model included."""


class SiteTable(Schema):
    """What ``polyrank join --data`` reads."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Count = 1
    """Threads of torch; the same number as elsewhere gives the same bits."""
    prefix_gb: Annotated[float, Field(ge=0)] = 2.0
    """Room on disk for what enters the lowest adapted block; 0 for none."""
    model: SiteModel = SiteModel()
    data: SiteData
    limits: Limits = Limits()


class Terms(Schema):
    """What the server says about a run when a site joins; a site takes part only where it agrees.

    Args:
        digest: of base model and head, as they are after loading.
        tokenizer: digest of the tokenizer.
        seed: from which the head is drawn, and the texts that are kept aside.
        holdout_share: share of a site's texts that it keeps aside for evaluation.
    """

    task: TaskName = "classification"
    model: str
    digest: str
    tokenizer: str
    labels: tuple[str, ...]
    seed: int
    max_length: int
    base_dtype: Literal["fp32", "bf16"] = "fp32"
    quantize: Bits | None = None
    prefix_dtype: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    holdout_share: float = 0.0


class Joined(Schema):
    """What a site says of itself.

    Args:
        num_tokens: of the train texts.
        num_taught: labels of these, or tokens of responses.
        pid: of the process that answers.
        loads: how often that process has loaded the base model.
    """

    num_examples: Annotated[Count, Field(le=MAX_TEXTS)]
    num_tokens: Annotated[Count, Field(le=10**6 * MAX_TEXTS)]
    num_taught: Annotated[Count, Field(le=10**6 * MAX_TEXTS)]
    num_holdout: Annotated[int, Field(ge=0, le=MAX_TEXTS)]
    device: Annotated[str, Field(max_length=200)]
    threads: int
    pid: int
    loads: int


@dataclass
class Site:
    """One site's process: the base model is loaded when it first joins, and stays."""

    table: SiteTable
    loads: int = 0
    env: ClientEnv | None = None
    terms: Terms | None = None

    def join(self, name: ClientId, terms: Terms) -> Joined:
        """Check that this site and the server mean the same, and get ready.

        Raises: InputError, one line for both sides, where they do not.
        """
        if self.env is None or terms != self.terms:
            torch.set_num_threads(self.table.threads)
            self.env, self.terms = self._environment(name, terms), terms
        env, device = self.env, self.env.model.device
        kept = 0 if env.holdout is None else len(env.holdout)
        shown = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}"
        told = (*env.train.sizes, kept, shown, self.table.threads, os.getpid())
        return Joined.model_validate(dict(zip(Joined.model_fields, (*told, self.loads), strict=True)))

    def answer(self, request: bytes) -> bytes:
        """What the client answers, after the limits are checked.

        Raises:
            WireError: the request is not a task.
            ClientError: the task asks for too much, or could not be done.
        """
        if self.env is None:
            raise ClientError("the site has not joined this run")
        limits = self.table.limits
        _at_most("memory in GB", task_bytes(request) / 1e9, "max_memory_gb", limits.max_memory_gb)
        refuse_too_much(decode_task(request), self.env, limits)
        return handle(request, self.env)

    def leave(self) -> None:
        """Free the room on disk that the site has taken."""
        if self.env is not None and self.env.prefix is not None:
            self.env.prefix.drop()

    def _environment(self, name: ClientId, terms: Terms) -> ClientEnv:
        texts = read_texts(self.table.data, terms)  # a defect is told before a model is loaded
        wanted = self.table.model
        shown, device = Path(wanted.name).name, pick_device(self.table.device)
        with _shown_as(shown):
            model = _load(wanted.name, terms, device)
        self.loads += 1
        model = replace(model, skips=can_skip(model), recomputes=terms.gradient_checkpointing)
        if wanted.sha256 is not None and (found := weights_sha256(model.source)) != wanted.sha256:
            raise InputError("model.sha256", found, f"of the weights of {shown}: expected {wanted.sha256}")
        agree("model.name", model.digest, terms.digest, f"base model {terms.model}")
        agree("model.name", tokenizer_digest(model.tokenizer), terms.tokenizer, f"tokenizer of {terms.model}")
        train, holdout = kept_aside(len(texts), terms, name)
        with _shown_as(shown):
            encoded = ENCODERS[terms.task](texts, model.tokenizer, terms.max_length)
        cache = temporary_cache(self.table.prefix_gb, terms.prefix_dtype)
        aside = encoded.select(holdout) if holdout else None
        return ClientEnv(model, encoded.select(train), aside, list(model.folded), cache)


def read_table(path: Path, device: str | None = None) -> SiteTable:
    """A site's table; relative paths in it count from its own folder.

    Args:
        device: takes the place of the table's, where given.

    Raises: InputError, which names the key, the value and what is allowed.
    """
    given: Mapping[str, Any] = read_toml(path, "--data")
    try:
        table = SiteTable.model_validate({**given} if device is None else {**given, "device": device})
    except ValidationError as error:
        raise as_input_error(error, SiteTable) from None
    source = str(path.parent.resolve() / table.data.source)
    return table.model_copy(update={"data": table.data.model_copy(update={"source": source})})


def _load(name: str, terms: Terms, device: torch.device) -> BaseModel:
    """The base model of a run, as the site's table names it."""
    if terms.task == "causal_lm":
        return load_speaker(name, device, terms.base_dtype, terms.quantize)
    return load_base(name, terms.labels, terms.seed, device, terms.base_dtype)


def read_texts(data: SiteData, terms: Terms) -> Texts:
    """The site's texts, under the labels of the run, or with their responses.

    Raises: InputError when the file, a column or a label is not as it should be.
    """
    try:
        return load_file(Path(data.source), "data.source", data.columns, terms.labels, terms.task)
    except InputError as error:
        columns = (*_names(data.text), data.label, *_names(data.prompt), data.response, data.messages)
        shown = Path(data.source).name if error.value == data.source else error.value
        if isinstance(shown, str) and shown not in columns and len(shown) > _LONGEST_LABEL:
            shown = "(a longer text)"  # as where the label's column is given as that of the texts
        raise _for_the_server(error, shown) from None


@contextlib.contextmanager
def _shown_as(name: str) -> Iterator[None]:
    """What goes wrong with the model in here is told of a model of this name."""
    try:
        yield
    except InputError as error:
        raise _for_the_server(error, name) from None


def _for_the_server(error: InputError, shown: object) -> InputError:
    """The same without what only the site may know: paths, and rows of its file in the words of a library.

    Args:
        shown: stands for the value.
    """
    _log.error("polyrank: %s", error)
    allowed = error.allowed if error.__cause__ is None else "cannot be used; the site's own log says why"
    return InputError(error.key, shown, allowed)


def check_readable(table: SiteTable) -> None:
    """Say what is wrong with the data before the server is asked; what the run is about it tells later.

    Raises: InputError when the file or one of its columns is not there.
    """
    data = table.data
    found = read_file(Path(data.source), "data.source").column_names
    named = {"data.prompt": data.prompt, "data.response": data.response, "data.messages": data.messages}
    spoken = [(key, name) for key, columns in named.items() for name in _names(columns)]
    if not spoken and any(set(columns.names) <= set(found) for columns in KNOWN):
        return
    plain = [*(("data.text", name) for name in data.columns.text_columns), ("data.label", data.label)]
    for key, name in spoken or plain:
        if name not in found:
            raise InputError(key, name, f"no such column; {choices(name, found)}")


def _names(columns: TextColumns | str | None) -> Sequence[str]:
    return [columns] if isinstance(columns, str) else columns or ()


def kept_aside(count: int, terms: Terms, name: ClientId) -> tuple[list[int], list[int]]:
    """The rows that train, and those kept aside for evaluation, as `share_out` draws them.

    Raises: InputError when none would be left to train on.
    """
    mixed = np.random.default_rng(seed_for(terms.seed, "holdout", name)).permutation(count).tolist()
    aside = max(1, round(terms.holdout_share * count)) if terms.holdout_share > 0 else 0
    if count <= aside:
        raise InputError("data.source", count, f"texts, {aside} of them for evaluation; it needs one more")
    return sorted(mixed[aside:]), sorted(mixed[:aside])


def refuse_too_much(task: Task, env: ClientEnv, limits: Limits) -> None:
    """Raises: ClientError when a task asks for more than the site allows."""
    held = {name: int(mask.sum()) for name, mask in task.mask.items()}
    folded = [factors.rank for fold in task.folds.adapters for factors in fold.modules.values()]
    _at_most("rank", max([*held.values(), *folded], default=0), "max_rank", limits.max_rank)
    if isinstance(task, TrainTask):
        steps, _ = session_size(len(env.train), task.training)
        _at_most("local steps", steps, "max_steps", limits.max_steps)
        texts, training = env.train, task.training
        ranks = {name: int(mask.sum()) for name, mask in task.trained.items()}
    else:  # one pass over the texts kept aside, without anything that trains
        texts, training = env.holdout or env.train, Training(batch_size=task.batch_size)
        ranks = {}
    frozen = {name: held[name] - ranks.get(name, 0) for name in held}
    work = workload(shape_of(env.model), texts.sizes, training, ranks, frozen, env.prefix is not None)
    folds = WORD * sum(fold.num_parameters() for fold in task.folds.adapters)
    _at_most("memory in GB", (memory_bytes(work) + folds) / 1e9, "max_memory_gb", limits.max_memory_gb)


def _at_most(what: str, asked: float, key: str, limit: float) -> None:
    if asked > limit:
        raise ClientError(f"refused: {what} {asked:g} is more than limits.{key}, {limit:g}")


def agree(key: str, here: str, there: str, what: str) -> None:
    """Raises: InputError when site and server do not hold the same."""
    if here != there:
        raise InputError(key, f"{here[:12]}...", f"the {what} differs from the server's, {there[:12]}...")


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of all that decides which ids a text gets; how it was called last does not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map]
    else:
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [rules, special, min(tokenizer.model_max_length, 2**31)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def weights_sha256(source: str) -> str:
    """sha256 of a model's weight files in the order of their names, as ``cat *.safetensors | sha256sum``.

    Raises: InputError when there are none.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, local_files_only=True))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError("model.sha256", folder.name, "the model's folder holds no *.safetensors file")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def terms_of(model: BaseModel, labels: tuple[str, ...], seed: int, rest: Mapping[str, Any]) -> Terms:
    """The server's terms: its own model, tokenizer and labels, and the settings in ``rest``."""
    name = Path(model.source).name
    tokenizer = tokenizer_digest(model.tokenizer)
    return Terms(model=name, digest=model.digest, tokenizer=tokenizer, labels=labels, seed=seed, **rest)
