"""What a run needs before its first round: data, model, clients, engine, and a state to start from."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from polyrank.adapter import Adapter, RankMask, embed, fingerprint, full_mask, new_adapter, restrict
from polyrank.aggregation import FOLDING, Rule
from polyrank.allocation import Legend, LossBased, Tiers, Uniform
from polyrank.client import keep_up
from polyrank.clock import Clock, make_clock
from polyrank.collect import Failures
from polyrank.config import Config, Embedded, Flare
from polyrank.data.instructions import ENCODERS
from polyrank.data.partition import ClientRows, Iid, Natural, share_out
from polyrank.data.source import load_corpus, load_file, load_instructions, subsampled
from polyrank.data.texts import Corpus, Texts, corpus_digest
from polyrank.data.tokens import TextSizes, Tokens
from polyrank.engine.base import Engine
from polyrank.engine.dropout import Dropout
from polyrank.engine.embedded import EmbeddedEngine
from polyrank.engine.workers import WorkerEngine
from polyrank.errors import InputError
from polyrank.evaluation import evaluate
from polyrank.grouping import why_alone
from polyrank.ledger import partition_table, site_table
from polyrank.lowrank import fold, negated, weights_start
from polyrank.messages import ClientId, ClientUpdate
from polyrank.models.load import BaseModel, load_base, pick_device, read_head
from polyrank.models.prefix import PrefixCache, can_skip, temporary_cache
from polyrank.models.shape import shape_of
from polyrank.models.speaker import load_speaker
from polyrank.models.targets import lies_in, resolve_targets
from polyrank.robust import RobustMean
from polyrank.round import Federation, make_task
from polyrank.sampling import SampleCount, expected_share
from polyrank.seed import seed_for
from polyrank.session import ClientEnv
from polyrank.site import Terms, terms_of
from polyrank.state import ClientRecord, ServerState
from polyrank.voting import best_slots


class Network(Protocol):
    """The way to real sites."""

    def open(self, terms: Terms) -> tuple[Engine, Mapping[ClientId, TextSizes]]:
        """An engine over the sites that agree with the terms, and how much text each has.

        Raises: InputError where a site does not agree.
        """
        ...


@dataclass(frozen=True)
class Experiment:
    """A federation that is ready to run, with what the server keeps for itself."""

    config: Config
    corpus: Corpus
    partition: Mapping[str, Any]
    model: BaseModel
    test: Tokens
    federation: Federation
    start: ServerState
    prefix: PrefixCache | None
    environments: Mapping[str, ClientEnv]

    def inputs(self) -> dict[str, str]:
        """Fingerprints of what the result depends on besides the config."""
        return {"data": corpus_digest(self.corpus), "model": self.model.digest}


def prepare(config: Config, network: Network | None = None) -> Experiment:
    """Load data and model, share the data out, and set the federation up.

    Args:
        network: brings real sites, which have their texts already; without it, all clients are simulated.
    """
    torch.set_num_threads(config.engine.threads)
    device = pick_device(config.device)
    if isinstance(config.engine, Flare) and network is None:
        raise InputError("engine.kind", "flare", "the run is started by `polyrank run` with engine.kit")
    aside = config.evaluation.holdout_share if config.evaluation.per_client else 0.0
    corpus, kept = _corpus(config)
    clients = [] if network else _share_out(corpus, config, aside)
    model = load_model(config, corpus.label_names, device)
    model = replace(model, skips=can_skip(model), recomputes=config.model.gradient_checkpointing)
    shapes = _adapted(config, model)
    adapter, folds = _bank(config, model, shapes)
    cache = temporary_cache(config.engine.prefix_gb, config.engine.prefix_dtype)
    environments = _environments(config, corpus, clients, model, cache)
    if network is None:
        fuse = _fuse(config, environments, shapes)
        engine, partition = _engine(config, environments, device, fuse), partition_table(corpus, clients)
        texts: Mapping[ClientId, TextSizes] = {name: env.train.sizes for name, env in environments.items()}
    else:
        engine, texts = network.open(_terms(config, corpus, model, aside))
        partition = site_table(corpus, engine.clients())
    _enough_clients(config, len(texts))
    federation = Federation(
        engine=engine,
        failures=config.failures,
        sampling=config.sampling,
        allocation=config.allocation,
        aggregation=_rule(config, len(texts)),
        training=config.training,
        rounds=_rounds(config),
        untrained=config.adapter.untrained,
        voting=config.voting,
        validate=None if kept is None else _validation(config, model, kept),
        clock=_clock(config, model, texts),
    )
    test = _encode(config, model, corpus.test)
    opening = ServerState(0, config.seed, adapter, full_mask(adapter), read_head(model), {}, folds)
    start = _start(config, federation, opening, len(folds) if network is None else 0)
    return Experiment(config, corpus, partition, model, test, federation, start, cache, environments)


def _adapted(config: Config, model: BaseModel) -> Mapping[str, tuple[int, int]]:
    """The adapted maps and their (O, I): those of the targets that do not train in full anyway."""
    found = resolve_targets(model.network, model.blocks, config.adapter.targets)
    shapes = {name: shape for name, shape in found.items() if not lies_in(name, model.head_modules)}
    if not shapes:
        allowed = "needs a map whose weights the checkpoint holds; those it lacks are trained in full"
        raise InputError("adapter.targets", config.adapter.targets, allowed)
    width = min(min(shape) for shape in shapes.values())
    if config.adapter.rank > width:
        allowed = f"at most the width of the narrowest adapted map, {width}"
        raise InputError("adapter.rank", config.adapter.rank, allowed)
    return shapes


def load_model(config: Config, labels: Sequence[str], device: torch.device) -> BaseModel:
    """The base model of a run.

    Raises: InputError when it cannot be loaded.
    """
    table = config.model
    if config.task == "causal_lm":
        return load_speaker(table.name, device, table.base_dtype, table.quantize)
    return load_base(table.name, labels, config.seed, device, table.base_dtype)


def _corpus(config: Config) -> tuple[Corpus, Texts | None]:
    """The run's texts, and those that the server keeps for itself; real sites keep their train texts.

    A language model has labels only where the partition goes by them.
    """
    data, partition = config.data, config.partition
    if isinstance(config.engine, Flare):
        assert data.test is not None
        names = data.labels or ("texts",)
        test = load_file(Path(data.test), "data.test", data, names, config.task)
        return subsampled(Corpus(test.select([]), test, names), data, config.seed), None
    group = partition.column if isinstance(partition, Natural) else None
    if config.task == "classification":
        return _keep_for_server(load_corpus(data, config.seed, group), config)
    skewed = None if isinstance(partition, Iid | Natural) else partition.kind
    return _keep_for_server(load_instructions(data, config.seed, group, skewed), config)


def _encode(config: Config, model: BaseModel, texts: Texts) -> Tokens:
    return ENCODERS[config.task](texts, model.tokenizer, config.model.max_length)


def _share_out(corpus: Corpus, config: Config, aside: float) -> list[ClientRows]:
    return share_out(corpus.train, len(corpus.label_names), config.partition, config.seed, aside)


def _environments(
    config: Config,
    corpus: Corpus,
    clients: Sequence[ClientRows],
    model: BaseModel,
    cache: PrefixCache | None,
) -> dict[ClientId, ClientEnv]:
    """What each simulated device keeps between sessions."""
    if not clients:
        return {}
    encoded = _encode(config, model, corpus.train)

    def environment(rows: ClientRows) -> ClientEnv:
        aside = encoded.select(rows.holdout) if rows.holdout else None
        return ClientEnv(model, encoded.select(rows.train), aside, list(model.folded), cache)

    return {rows.client: environment(rows) for rows in clients}


def _terms(config: Config, corpus: Corpus, model: BaseModel, aside: float) -> Terms:
    """What the sites have to agree with."""
    rest = {
        "task": config.task,
        "max_length": config.model.max_length,
        "base_dtype": config.model.base_dtype,
        "quantize": config.model.quantize,
        "prefix_dtype": config.engine.prefix_dtype,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "holdout_share": aside,
    }
    return terms_of(model, tuple(corpus.label_names), config.seed, rest)


def _enough_clients(config: Config, count: int) -> None:
    if isinstance(config.sampling, SampleCount) and config.sampling.count > count:
        raise InputError("sampling.count", config.sampling.count, f"at most the {count} clients")


def _start(config: Config, fed: Federation, state: ServerState, folds: int) -> ServerState:
    """The state before the first round: what each device says of itself, and the slots in use.

    Args:
        folds: how many of the state's folds the devices have already.

    Raises: InputError when a tier names what is not there, or a device has no room for its largest session.
    """
    records = {client.id: ClientRecord(folds) for client in fed.engine.clients()}
    if fed.clock is not None:
        frozen = fed.untrained == "frozen"
        for client, record in records.items():
            capacity = fed.clock.register(client, state.adapter, config.training, frozen)
            device = fed.clock.roster.device_of(client)
            records[client] = replace(record, device=device, capacity=capacity)
    if isinstance(config.allocation, Tiers):
        devices = {client: record.device for client, record in records.items()}
        config.allocation.ranks(list(records), config.seed, devices)  # refuses unknown names
    state = replace(state, clients=records)
    if config.voting is not None and isinstance(config.allocation, Legend | Uniform):
        state = replace(state, active=config.allocation.opening(state))
    if fed.clock is not None and config.fleet is not None and not config.fleet.ignore_memory:
        _refuse_what_does_not_fit(fed, fed.clock, state)
    return state


def _refuse_what_does_not_fit(fed: Federation, clock: Clock, state: ServerState) -> None:
    """Look at the first plan, and at the largest that may come later."""
    clients, last = list(state.clients), replace(state, round=fed.rounds - 1)
    _refuse_sessions(fed, clock, state, fed.allocation.allocate(state, clients), "")
    plan = fed.allocation.allocate(last, clients)
    if isinstance(fed.allocation, LossBased):  # nobody knows yet whose loss will be the least
        plan = dict.fromkeys(clients, best_slots(last, fed.allocation.max_rank))
    _refuse_sessions(fed, clock, last, plan, " later in the run")


def _refuse_sessions(
    fed: Federation, clock: Clock, state: ServerState, plan: Mapping[ClientId, RankMask], when: str
) -> None:
    for client, record in state.clients.items():
        priced = clock.price(make_task(fed, state, plan[client], client), record, 0, 0)
        if not priced.fits:
            needs, has = (f"{size / 1e9:.2f} GB" for size in (priced.cost.memory_bytes, priced.limit_bytes))
            allowed = (
                f"cannot fit: {client} ({priced.device}) needs {needs} for {priced.depth} blocks{when}, and "
                f"may take {has}; adapt fewer blocks, lower training.batch_size, or set fleet.ignore_memory"
            )
            raise InputError("allocation.kind", fed.allocation.kind, allowed)


def _clock(config: Config, model: BaseModel, texts: Mapping[ClientId, TextSizes]) -> Clock | None:
    """The clock of the simulated devices, or None where none are simulated."""
    if config.fleet is None:
        return None
    return make_clock(config.fleet, shape_of(model), texts, config.seed, config.engine.prefix_gb > 0)


def _bank(
    config: Config, model: BaseModel, shapes: Mapping[str, tuple[int, int]]
) -> tuple[Adapter, list[Adapter]]:
    """The slots that a run begins with, and the fold by which the frozen weights lose them, if any."""
    table = config.adapter
    columns = config.training.sparse_rounds > 0
    adapter = new_adapter(
        shapes, form=table.form, rank=table.rank, scale=table.scale, seed=config.seed, columns=columns
    )
    if table.start == "zero":
        return adapter, []
    adapter = weights_start(model.network, adapter)
    away = negated(adapter)
    fold(model.network, away)
    model.folded.append(fingerprint(away))
    return adapter, [away]


def _rule(config: Config, num_clients: int) -> Rule:
    """The aggregation rule of the run, with robust means where the config asks for them."""
    if config.robust is None:
        return config.aggregation
    config.robust.check_cohort(round(expected_share(config.sampling, num_clients) * num_clients))
    return RobustMean(config.robust, config.aggregation)


def _rounds(config: Config) -> int:
    """Rounds of the run: all that were asked for, or those that the privacy budget pays for."""
    if config.privacy is None:
        return config.rounds
    return config.privacy.affordable(config.sampling, config.rounds)


def _engine(config: Config, environments: Mapping[str, ClientEnv], device: torch.device, fuse: int) -> Engine:
    """One process, or several where the machine can fork and the CPU does the work."""
    assert isinstance(config.engine, Embedded)
    if config.failures.dropout > 0:
        steady = config.model_copy(update={"failures": Failures()})
        return Dropout(_engine(steady, environments, device, fuse), config.failures.dropout, config.seed)
    wanted = config.engine.workers or (os.cpu_count() or 1)
    if config.engine.threads > 1:  # a fork of a process that already ran several threads would hang
        wanted = 1
    if device.type == "cpu" and sys.platform == "linux" and min(wanted, len(environments)) > 1:
        return WorkerEngine(environments, min(wanted, len(environments)), fuse)
    return EmbeddedEngine(environments, fuse)


def _fuse(
    config: Config, environments: Mapping[str, ClientEnv], shapes: Mapping[str, tuple[int, int]]
) -> int:
    """How many clients share a pass: on a CPU it pays where a step is smaller than about 500 tokens."""
    assert isinstance(config.engine, Embedded)
    if isinstance(config.aggregation, FOLDING):
        return 1  # each client stays with the worker that has its folds
    if config.privacy is not None:
        return 1  # in a shared pass the last bits of one client's change depend on the others' texts
    model, fuse = next(iter(environments.values())).model, config.engine.fuse
    if fuse is None:
        texts = sum(len(env.train) for env in environments.values())
        tokens = sum(int(env.train.starts[-1]) for env in environments.values())
        step = config.training.batch_size * tokens / max(1, texts)
        fuse = max(1, min(64, int((32_768 if model.device.type == "cuda" else 512) / step)))
    if fuse == 1 or not (reason := why_alone(model, shapes)):
        return fuse
    if config.engine.fuse is None:
        return 1
    allowed = f"must be 1: {model.source} gives clients in one pass other results ({reason})"
    raise InputError("engine.fuse", fuse, allowed)


def _keep_for_server(corpus: Corpus, config: Config) -> tuple[Corpus, Texts | None]:
    """Keep some train texts with the server, where the config says so or the policy needs them."""
    policy, train = config.allocation, corpus.train
    needed = 200 if isinstance(policy, LossBased) and policy.score == "server" else 0
    kept = config.evaluation.validation_texts or needed
    if kept == 0:
        return corpus, None
    order = np.random.default_rng(seed_for(config.seed, "validation")).permutation(len(train)).tolist()
    if len(train) <= kept:
        raise InputError("evaluation.validation_texts", kept, f"less than the {len(train)} train texts")
    rest = train.select(sorted(order[kept:]))
    return Corpus(rest, corpus.test, corpus.label_names), train.select(sorted(order[:kept]))


def _validation(
    config: Config, model: BaseModel, kept: Texts
) -> Callable[[ServerState, ClientUpdate], float]:
    """The loss of one client's model on the server's own texts."""
    data = _encode(config, model, kept)

    def loss(state: ServerState, update: ClientUpdate) -> float:
        keep_up(model, state.folds)
        adapter = update.adapter
        if config.adapter.untrained == "frozen":  # the client's model also holds what it did not train
            adapter = restrict(embed(adapter, update.mask, state.adapter), state.active)
        return evaluate(model, adapter, update.head, data, config.evaluation.batch_size)["loss"]

    return loss
