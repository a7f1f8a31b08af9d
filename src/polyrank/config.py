"""The config of a run: one closed tree of tables, from TOML, from `--set`, or from Python.

Order of precedence, weakest first: defaults, the method's recipe, the file, `--set`.
"""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from polyrank.adapter import Form
from polyrank.aggregation import (
    FOLDING,
    HOLDERS,
    PRODUCT_SPACE,
    Aggregation,
    Anchored,
    FedAvg,
    ReplicationPadding,
    Residual,
    Stacking,
)
from polyrank.allocation import Allocation, LossBased, ProgressiveDepth, Tiers, Uniform
from polyrank.clock import FleetTable
from polyrank.collect import Failures
from polyrank.data.partition import Dirichlet, Partition
from polyrank.data.texts import Data
from polyrank.errors import InputError
from polyrank.evaluation import Evaluation
from polyrank.messages import Training
from polyrank.models.load import PACKAGED, Dtype, TaskName
from polyrank.models.speaker import Bits
from polyrank.privacy import Privacy
from polyrank.recipes import recipe
from polyrank.robust import Robust
from polyrank.round import Untrained
from polyrank.sampling import SampleCount, SamplePoisson, Sampling
from polyrank.schema import Schema
from polyrank.tables import as_input_error, read_toml
from polyrank.voting import Voting

Count = Annotated[int, Field(ge=1)]


class Model(Schema):
    """The base model: ``minilm`` (packaged), a local folder, or a hub id."""

    name: str = PACKAGED
    max_length: Annotated[int, Field(ge=4)] = 64
    """Texts are cut to so many tokens."""
    base_dtype: Dtype = "fp32"
    """How the frozen weights multiply; bf16 is faster on a CPU with units for it. Those of a language model
    are also stored in it; adapter, loss and optimiser stay fp32."""
    quantize: Bits | None = None
    """causal_lm: frozen weights of 8 bits (CUDA or CPU) or 4 (nf4, CUDA), by the extra ``quantized``."""
    gradient_checkpointing: bool = False
    """Keep only what enters each block, and compute the rest again for the backward pass."""


class AdapterTable(Schema):
    """The slot bank on the server."""

    form: Form = "lora"
    rank: Count = 8
    """R, the slots of every module."""
    scale: Annotated[float, Field(gt=0)] = 2.0
    """Multiplies the product; PEFT's ``lora_alpha`` is scale x rank."""
    start: Literal["zero", "weights"] = "zero"
    """``weights``: the largest singular values of the adapted weights, which the frozen part then lacks."""
    untrained: Untrained = "absent"
    """What a client does with active slots that it does not train: nothing, or hold them frozen."""
    targets: Literal["attention", "all-linear"] | tuple[str, ...] = "attention"


class Embedded(Schema):
    """All clients on this machine."""

    kind: Literal["embedded"] = "embedded"
    workers: Count | None = None
    """Processes that train clients side by side; without a number, one per core (on a GPU, one). Any
    number gives the same bits."""
    prefix_gb: Annotated[float, Field(ge=0)] = 2.0
    """Room on disk for what enters the lowest adapted block where that is not the first; 0 for none."""
    prefix_dtype: Literal["fp32", "bf16"] = "fp32"
    fuse: Count | None = None
    """Clients whose steps go through the base model in one pass; without a number, as many as fill one:
    512 tokens on a CPU, 32,768 on a GPU; one under privacy. Equal to one by one up to rounding."""
    threads: Count = 1
    """Threads of torch in each of them; the same number gives the same bits."""


class Flare(Schema):
    """Real sites over a real network, through NVIDIA FLARE (extra ``flare``); see docs/network.md."""

    kind: Literal["flare"] = "flare"
    kit: str
    """Folder of the administrator's start-up kit, which `polyrank provision` makes."""
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that a site may take for one request; later it has failed."""
    prefix_gb: Annotated[float, Field(ge=0)] = 2.0
    """As for embedded clients, for the server's own scoring; every site sets its own."""
    prefix_dtype: Literal["fp32", "bf16"] = "fp32"
    threads: Count = 1


Engine = Annotated[Embedded | Flare, Field(discriminator="kind")]


class Config(Schema):
    """One run. ``Config()`` is the quick start; every key can be set by name."""

    method: str = "fedit"
    seed: Annotated[int, Field(ge=0)] = 0
    rounds: Count = 6
    task: TaskName = "classification"
    """``causal_lm``: learn responses to prompts, token by token, instead of labels."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    model: Model = Model()
    adapter: AdapterTable = AdapterTable()
    data: Data = Data()
    partition: Partition = Dirichlet()
    training: Training = Training()
    sampling: Sampling = SampleCount()
    allocation: Allocation = Uniform()
    aggregation: Aggregation = FedAvg()
    voting: Voting | None = None
    """Clients vote on which slots stay (FedARA); nothing: all slots stay active."""
    robust: Robust | None = None
    """Means that a few lying clients cannot move far; nothing: every update counts as it came."""
    privacy: Privacy | None = None
    """Differential privacy for clients; nothing: what they send shows in the model as it is."""
    evaluation: Evaluation = Evaluation()
    engine: Engine = Embedded()
    fleet: FleetTable | None = None
    """Devices whose time, energy and memory are simulated; nothing: none are."""
    failures: Failures = Failures()
    keep_last: Count = 2
    """Checkpoints that stay until the run is finished; a damaged one is passed over for the one before."""

    @model_validator(mode="before")
    @classmethod
    def _with_recipe(cls, given: Any) -> Any:
        """Lay the given keys over the method's recipe, and give kindless tables their default kind."""
        if not isinstance(given, Mapping):
            return given
        method = given.get("method", cls.model_fields["method"].default)
        merged = merge(recipe(method).config, given)
        if merged.get("task") == "causal_lm":
            merged = merge({"partition": {"kind": "iid"}, "model": {"max_length": 512}}, merged)
        for name, field in cls.model_fields.items():
            kind = getattr(field.default, "kind", None)
            if kind is not None and isinstance(merged.get(name), Mapping):
                merged[name] = {"kind": kind, **merged[name]}
        if isinstance(merged.get("engine"), Mapping) and merged["engine"]["kind"] == "flare":
            apart = Embedded.model_fields.keys() - Flare.model_fields.keys()  # one file serves both engines
            merged["engine"] = {key: value for key, value in merged["engine"].items() if key not in apart}
        return merged

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        rank = self.allocation.max_rank
        if rank is not None and rank > self.adapter.rank:
            key = {"tiers": "tiers", "loss_based": "high_rank"}.get(self.allocation.kind, "rank")
            if isinstance(self.allocation, LossBased) and self.allocation.low_rank == rank:
                key = "low_rank"
            raise InputError(f"allocation.{key}", rank, f"at most adapter.rank, {self.adapter.rank}")
        moving = isinstance(self.aggregation, PRODUCT_SPACE) or (
            isinstance(self.aggregation, Anchored) and self.aggregation.space == "product"
        )
        if self.training.factors != "both" and moving:
            allowed = f"must be 'both' under aggregation {self.aggregation.kind!r}, which mixes B and A"
            raise InputError("training.factors", self.training.factors, allowed)
        if self.training.sparse_rounds > 0:
            self._starts_sparse(moving)
        same_for_all = self.allocation.kind in ("uniform", "progressive_depth")
        equals = isinstance(self.aggregation, FedAvg | Residual)
        if equals and not (same_for_all and self.training.prune_keep is None):
            kind = f"{self.allocation.kind} or self-pruning"
            allowed = f"needs equal ranks; for allocation by {kind} take e.g. 'replication_padding'"
            raise InputError("aggregation.kind", self.aggregation.kind, allowed)
        if self.training.prune_keep is not None and self.allocation.kind == "random_slots":
            allowed = "does not go with allocation.kind = 'random_slots'"
            raise InputError("training.prune_keep", self.training.prune_keep, allowed)
        if self.voting is not None:
            self._votes_fit(self.voting, moving)
        if self.fleet is None:
            self._needs_no_fleet()
        if self.robust is not None:
            self._robust_fits()
        if self.privacy is not None:
            self._privacy_fits()
        elif isinstance(self.sampling, SamplePoisson):
            allowed = "needs a [privacy] table; a cohort may be empty, and nothing else knows what to do then"
            raise InputError("sampling.kind", "poisson", allowed)
        self._model_fits()
        self._adapter_fits()
        if self.training.prune_penalty > 0 and self.training.prune_keep is None:
            raise InputError("training.prune_penalty", self.training.prune_penalty, "needs prune_keep")
        return self

    def _starts_sparse(self, moving: bool) -> None:
        """Refuse what has no B to train alone, or would mix it with A."""
        rounds, table = self.training.sparse_rounds, self.adapter
        if rounds >= self.rounds:
            raise InputError("training.sparse_rounds", rounds, f"must be below rounds = {self.rounds}")
        if table.form != "lora" or table.start != "zero" or self.training.factors != "both":
            allowed = "needs adapter.form = 'lora', adapter.start = 'zero' and training.factors = 'both'"
            raise InputError("training.sparse_rounds", rounds, allowed)
        if moving:
            allowed = f"must be 0 under aggregation {self.aggregation.kind!r}, which mixes B and A"
            raise InputError("training.sparse_rounds", rounds, allowed)

    def _adapter_fits(self) -> None:
        """Refuse an adapter of nothing, and slots that took over weights which somebody would then lack."""
        policy = self.allocation
        if self.adapter.targets == ():
            raise InputError("adapter.targets", [], "name at least one linear map")
        if self.training.factors == "A" and self.adapter.start == "zero":
            raise InputError("training.factors", "A", "needs adapter.start = 'weights': 0 * A has no slope")
        if self.training.orthogonality > 0 and self.adapter.form != "svd":
            allowed = "needs adapter.form = 'svd', whose slots have a size apart from their directions"
            raise InputError("training.orthogonality", self.training.orthogonality, allowed)
        if self.adapter.start != "weights":
            return
        if self.voting is not None or isinstance(self.aggregation, Stacking):
            allowed = "must be 'zero' under [voting] and 'stacking': a slot would take weights with it"
            raise InputError("adapter.start", "weights", allowed)
        everything = isinstance(policy, Uniform) and policy.rank is None and policy.depth is None
        if everything and self.training.prune_keep is None:
            return
        if self.adapter.untrained == "absent":
            allowed = "must be 'zero' where clients hold a part of the slots, or adapter.untrained 'frozen'"
            raise InputError("adapter.start", "weights", allowed)
        if not isinstance(self.aggregation, HOLDERS):
            allowed = f"must be 'zero' where {self.aggregation.kind} takes what a client does not train for 0"
            raise InputError("adapter.start", "weights", allowed)

    def _model_fits(self) -> None:
        """Refuse what would add to weights of few bits."""
        bits, folds = self.model.quantize, isinstance(self.aggregation, FOLDING)
        if self.task == "causal_lm" and self.model.base_dtype == "bf16" and folds:
            allowed = f"must be 'fp32' under {self.aggregation.kind}, whose folds bf16 would round away"
            raise InputError("model.base_dtype", "bf16", allowed)
        if bits is None:
            return
        if self.task != "causal_lm":
            raise InputError("model.quantize", bits, "goes with task = 'causal_lm' alone")
        if self.adapter.start != "zero" or folds:
            allowed = "needs adapter.start = 'zero' and a rule that folds nothing into the frozen weights"
            raise InputError("model.quantize", bits, allowed)

    @model_validator(mode="after")
    def _leaves_texts_with_sites(self) -> Self:
        """Refuse what would need the sites' texts on the server."""
        if self.engine.kind != "flare":
            return self
        given: dict[str, object] = {"data.test": self.data.test}
        if self.task == "classification":
            given["data.labels"] = self.data.labels
        for key, value in given.items():
            if value is None:
                allowed = "must be given for engine.kind = 'flare': it reads test texts, never a site's"
                raise InputError(key, value, allowed)
        if self.partition.kind != "natural":
            allowed = "must be 'natural' for engine.kind = 'flare': every site has its own texts"
            raise InputError("partition.kind", self.partition.kind, allowed)
        by_loss = isinstance(self.allocation, LossBased) and self.allocation.score == "server"
        if self.evaluation.validation_texts or by_loss:
            allowed = "takes train texts, of which the server has none with engine.kind = 'flare'"
            raise InputError("evaluation.validation_texts", self.evaluation.validation_texts, allowed)
        return self

    def _needs_no_fleet(self) -> None:
        """Refuse a policy that goes by devices where none are known."""
        policy = self.allocation
        by_device = isinstance(policy, Tiers) and any(tier.device for tier in policy.tiers)
        weakest = isinstance(policy, Uniform) and policy.depth == "weakest"
        if policy.kind == "legend" or by_device or weakest:
            raise InputError("fleet", None, f"must be given for allocation.kind = {policy.kind!r} by device")

    def _votes_fit(self, voting: Voting, moving: bool) -> None:
        """Refuse what would make votes meaningless: a slot must keep its place, and a mask needs its e."""
        if voting.target_rank >= self.adapter.rank:
            allowed = f"must be below adapter.rank = {self.adapter.rank}, or all slots stay and nobody votes"
            raise InputError("voting.target_rank", voting.target_rank, allowed)
        if voting.kind == "adalora" and self.adapter.form != "svd":
            allowed = "must be 'svd' for voting.kind = 'adalora', which masks e"
            raise InputError("adapter.form", self.adapter.form, allowed)
        if isinstance(self.allocation, ProgressiveDepth):
            allowed = "does not go with [voting]: blocks that nobody has trained yet would be voted out first"
            raise InputError("allocation.kind", self.allocation.kind, allowed)
        for key, plain in (("factors", "both"), ("prune_keep", None), ("sparse_rounds", 0)):
            if (value := getattr(self.training, key)) != plain:
                allowed = f"must be {plain!r} under [voting]: a slot keeps its place, and all of it trains"
                raise InputError(f"training.{key}", value, allowed)
        if moving:
            allowed = "must keep slots apart for voting, e.g. 'fedavg' or 'replication_padding'"
            raise InputError("aggregation.kind", self.aggregation.kind, allowed)

    def _robust_fits(self) -> None:
        """Refuse what a few liars could steer past the trimmed means."""
        self._averages_holders("robust")
        if self.voting is not None:
            raise InputError("voting", self.voting.kind, "does not go with robust: votes are not trimmed")
        if isinstance(self.allocation, LossBased) and self.allocation.score == "client":
            allowed = "must be 'server' under robust: clients could lie themselves into the high rank"
            raise InputError("allocation.score", "client", allowed)

    def _privacy_fits(self) -> None:
        """Refuse every way past the noise by which a client's data could reach the model or the records."""
        self._averages_holders("privacy")
        if self.robust is not None:
            allowed = "does not go with privacy: medians and trimmed means have no bounded sensitivity"
            raise InputError("robust.attackers", self.robust.attackers, allowed)
        if self.voting is not None:
            allowed = "does not go with privacy: votes are made from the clients' data, without noise"
            raise InputError("voting", self.voting.kind, allowed)
        if isinstance(self.allocation, LossBased):
            allowed = "does not go with privacy: losses of clients would decide ranks, without noise"
            raise InputError("allocation.kind", "loss_based", allowed)
        if self.training.prune_keep is not None:
            allowed = "does not go with privacy: clients would choose their slots by their data"
            raise InputError("training.prune_keep", self.training.prune_keep, allowed)
        if self.fleet is not None:
            allowed = "does not go with privacy: who comes late goes by how many texts a client has"
            raise InputError("fleet", self.fleet.name, allowed)
        if self.engine.kind == "embedded" and (self.engine.fuse or 1) > 1:
            allowed = "must be 1 under privacy: in a shared pass one client's last bits depend on the others"
            raise InputError("engine.fuse", self.engine.fuse, allowed)
        if self.evaluation.per_client:
            allowed = "must be false under privacy: scores on clients' own texts carry no noise"
            raise InputError("evaluation.per_client", True, allowed)

    def _averages_holders(self, mode: str) -> None:
        """Refuse rules other than means over the holders of each slot in which all clients weigh the same."""
        rule = self.aggregation
        if not isinstance(rule, HOLDERS):
            some = "fedavg, replication_padding, layer_wise, random_slots or anchored in factor space"
            allowed = f"must average the holders of each slot under {mode}: {some}"
            raise InputError("aggregation.kind", rule.kind, allowed)
        if isinstance(rule, Anchored) and rule.space == "product":
            raise InputError("aggregation.space", "product", f"must be 'factor' under {mode}")
        if isinstance(rule, ReplicationPadding) and rule.fill == "top":
            raise InputError("aggregation.fill", "top", f"must be 'cascade' under {mode}")
        if rule.weights != "uniform":
            allowed = f"must be 'uniform' under {mode}: sample counts are the clients' own word"
            raise InputError("aggregation.weights", rule.weights, allowed)


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``under``, table by table; a table of another ``kind`` replaces the whole."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            kinds = {str(table["kind"]) for table in (below, value) if "kind" in table}
            merged[key] = merge(below, value) if len(kinds) < 2 else dict(value)
        else:
            merged[key] = value
    return merged


def load_config(path: Path | None = None, settings: Sequence[str] = ()) -> Config:
    """The config of a file (or the defaults) with ``key=value`` settings laid over it.

    Raises: InputError, which names the key, the value and what is allowed.
    """
    given: Mapping[str, Any] = {} if path is None else read_toml(path)
    for setting in settings:
        given = merge(given, _setting(setting))
    return make_config(given)


def make_config(given: Mapping[str, Any]) -> Config:
    """Raises: InputError, which names the key, the value and what is allowed."""
    try:
        return Config.model_validate(dict(given))
    except ValidationError as error:
        raise as_input_error(error, Config) from None


def _setting(text: str) -> dict[str, Any]:
    """``a.b=1`` as ``{"a": {"b": 1}}``; what is not a TOML value is a string."""
    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > 9:
        raise InputError("--set", text, "must look like key=value, e.g. training.learning_rate=1e-3")
    try:
        value: Any = tomllib.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):
        value = raw
    for part in reversed(parts):
        value = {part: value}
    return typing.cast("dict[str, Any]", value)
