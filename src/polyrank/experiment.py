"""A whole run: prepare the federation, go round by round, leave a run folder behind."""

from __future__ import annotations

import atexit
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyrank.adapter import Adapter, embed, fingerprint, full_mask, new_adapter, num_slots, restrict
from polyrank.aggregation import Rule, Stacking
from polyrank.allocation import LossBased, Tiers
from polyrank.checkpoint import STATE_FILE, save_state
from polyrank.client import catch_up
from polyrank.config import Config
from polyrank.data.partition import ClientRows, Natural, share_out
from polyrank.data.source import load_corpus
from polyrank.data.texts import Corpus, Texts
from polyrank.data.tokens import Tokens, tokenize
from polyrank.engine.base import Engine
from polyrank.engine.embedded import EmbeddedEngine
from polyrank.engine.workers import WorkerEngine
from polyrank.errors import InputError, RunError
from polyrank.evaluation import evaluate, majority_rate
from polyrank.export import adapter_sha256, export_adapter
from polyrank.ledger import (
    RunFolder,
    client_rows,
    create_run_folder,
    partition_table,
    refuse_existing,
    round_row,
    score_rows,
    slot_row,
    versions,
)
from polyrank.lowrank import fold, negated, weights_start
from polyrank.messages import ClientUpdate, Folds
from polyrank.models.load import BaseModel, load_base, pick_device, read_head
from polyrank.models.prefix import PrefixCache, can_skip
from polyrank.models.targets import resolve_targets
from polyrank.privacy import PrivateMean
from polyrank.report import write_report
from polyrank.robust import RobustMean
from polyrank.round import Federation, evaluate_clients, federated_round
from polyrank.sampling import SampleCount, SecretSampling, expected_share
from polyrank.seed import seed_for
from polyrank.session import ClientEnv
from polyrank.state import ClientRecord, ServerState


@dataclass(frozen=True)
class Experiment:
    """A federation that is ready to run, with what the server keeps for itself."""

    config: Config
    corpus: Corpus
    clients: list[ClientRows]
    model: BaseModel
    test: Tokens
    federation: Federation
    start: ServerState
    prefix: PrefixCache | None


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: its folder and the keys of its summary.json."""

    path: Path
    summary: Mapping[str, Any]


def run(config: Config | None = None, out: str | Path | None = None) -> Result:
    """Run one config from start to end.

    Args:
        out: a folder that does not exist yet; without one, ``runs/METHOD-DATA-N``.

    Raises:
        InputError: the config, the data or the model cannot be used; nothing was overwritten.
        RunError: the run cannot go on.
    """
    target = None if out is None else Path(out)
    refuse_existing(target)
    experiment = prepare(config or Config())
    folder = open_folder(experiment, target)
    rows = list(conduct(experiment, folder))
    return Result(folder.path, rows[-1])


def prepare(config: Config) -> Experiment:
    """Load data and model, share the data out, and set the federation up."""
    torch.set_num_threads(config.engine.threads)
    device = pick_device(config.device)
    group = config.partition.column if isinstance(config.partition, Natural) else None
    corpus = load_corpus(config.data, config.seed, group)
    aside = config.evaluation.holdout_share if config.evaluation.per_client else 0.0
    corpus, kept = _keep_for_server(corpus, config)
    clients = share_out(corpus.train, len(corpus.label_names), config.partition, config.seed, aside)
    table = config.model
    model = load_base(table.name, corpus.label_names, config.seed, device, table.base_dtype)
    model = replace(model, skips=can_skip(model))
    shapes = resolve_targets(model.network, model.blocks, config.adapter.targets)
    width = min(min(shape) for shape in shapes.values())
    if config.adapter.rank > width:
        allowed = f"at most the width of the narrowest adapted map, {width}"
        raise InputError("adapter.rank", config.adapter.rank, allowed)
    adapter, folds = _bank(config, model, shapes)
    encoded = tokenize(corpus.train, model.tokenizer, config.model.max_length)
    if isinstance(config.sampling, SampleCount) and config.sampling.count > len(clients):
        raise InputError("sampling.count", config.sampling.count, f"at most the {len(clients)} clients")
    if isinstance(config.allocation, Tiers):
        config.allocation.ranks([rows.client for rows in clients], config.seed)  # refuses unknown names
    cache = _prefix_cache(config)
    environments = {
        rows.client: ClientEnv(
            model,
            encoded.select(rows.train),
            encoded.select(rows.holdout) if rows.holdout else None,
            list(model.folded),
            cache,
        )
        for rows in clients
    }
    federation = Federation(
        engine=_engine(config, environments, device),
        sampling=config.sampling,
        allocation=config.allocation,
        aggregation=_rule(config, len(clients)),
        training=config.training,
        rounds=_rounds(config),
        untrained=config.adapter.untrained,
        voting=config.voting,
        validate=None if kept is None else _validation(config, model, kept),
    )
    test = tokenize(corpus.test, model.tokenizer, config.model.max_length)
    records = {rows.client: ClientRecord(len(folds)) for rows in clients}
    start = ServerState(0, config.seed, adapter, full_mask(adapter), read_head(model), records, folds)
    return Experiment(config, corpus, clients, model, test, federation, start, cache)


def _bank(
    config: Config, model: BaseModel, shapes: Mapping[str, tuple[int, int]]
) -> tuple[Adapter, list[Adapter]]:
    """The slots that a run begins with, and the fold by which the frozen weights lose them, if any."""
    table = config.adapter
    adapter = new_adapter(shapes, form=table.form, rank=table.rank, scale=table.scale, seed=config.seed)
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


def _engine(config: Config, environments: Mapping[str, ClientEnv], device: torch.device) -> Engine:
    """One process, or several where the machine can fork and the CPU does the work."""
    wanted, fuse = config.engine.workers or (os.cpu_count() or 1), _fuse(config, environments, device)
    if config.engine.threads > 1:  # a fork of a process that already ran several threads would hang
        wanted = 1
    if device.type == "cpu" and sys.platform == "linux" and min(wanted, len(environments)) > 1:
        return WorkerEngine(environments, min(wanted, len(environments)), fuse)
    return EmbeddedEngine(environments, fuse)


def _fuse(config: Config, environments: Mapping[str, ClientEnv], device: torch.device) -> int:
    """How many clients share a pass: on a CPU it pays where a step is smaller than about 500 tokens."""
    if isinstance(config.aggregation, Stacking):
        return 1  # each client stays with the worker that has its folds
    if config.engine.fuse is not None:
        return config.engine.fuse
    texts = sum(len(env.train) for env in environments.values())
    tokens = sum(int(env.train.starts[-1]) for env in environments.values())
    step = config.training.batch_size * tokens / max(1, texts)
    return max(1, min(64, int((32_768 if device.type == "cuda" else 512) / step)))


def _prefix_cache(config: Config) -> PrefixCache | None:
    """A cache in a temporary folder that goes with the process, or None where there is no room for one."""
    if config.engine.prefix_gb == 0:
        return None
    folder = Path(tempfile.mkdtemp(prefix="polyrank-prefix-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return PrefixCache(folder, int(config.engine.prefix_gb * 1e9), config.engine.prefix_dtype)


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
    data = tokenize(kept, model.tokenizer, config.model.max_length)

    def loss(state: ServerState, update: ClientUpdate) -> float:
        catch_up(model, [], Folds(0, state.folds))
        adapter = update.adapter
        if config.adapter.untrained == "frozen":  # the client's model also holds what it did not train
            adapter = restrict(embed(adapter, update.mask, state.adapter), state.active)
        return evaluate(model, adapter, update.head, data, config.evaluation.batch_size)["loss"]

    return loss


def open_folder(experiment: Experiment, out: Path | None) -> RunFolder:
    """Make the run folder and write down everything that is known before the first round."""
    config = experiment.config
    source = "hub" if config.data.source.startswith("hub:") else Path(config.data.source).stem
    folder = create_run_folder(out, f"{config.method}-{source}")
    folder.write("config.json", config.model_dump(mode="json"))
    folder.write("versions.json", versions())
    folder.write("partition.json", partition_table(experiment.corpus, experiment.clients))
    return folder


def conduct(experiment: Experiment, folder: RunFolder) -> Iterator[dict[str, Any]]:
    """Run all rounds; yields each round's row as it is written, then the summary."""
    started = time.perf_counter()
    state, config = experiment.start, experiment.config
    federation = in_private(experiment, folder)
    rows: list[dict[str, Any]] = []
    try:
        for round_ in range(federation.rounds):
            state, record = federated_round(federation, state)
            due = (round_ + 1) % config.evaluation.every == 0 or round_ + 1 == federation.rounds
            rows.append(round_row(record, evaluate_global(experiment, state) if due else None))
            folder.append("rounds.jsonl", rows[-1:])
            folder.append("clients.jsonl", client_rows(record))
            if config.voting is not None:
                folder.append("slots.jsonl", [slot_row(record)])
            yield rows[-1]
        yield finish(experiment, folder, state, rows, started)
    finally:
        experiment.federation.engine.close()


def in_private(experiment: Experiment, folder: RunFolder) -> Federation:
    """The federation of a run whose config asks for privacy: its noise and its record live in the folder."""
    config, fed = experiment.config, experiment.federation
    if config.privacy is None:
        return fed
    charges = config.privacy.open(folder.path, config.sampling)
    share = expected_share(config.sampling, len(experiment.clients))
    rule = PrivateMean(config.privacy, config.aggregation, config.allocation, share, charges)
    sampling = SecretSampling(config.sampling, int.from_bytes(charges.key))
    return replace(fed, aggregation=rule, sampling=sampling, private=True)


def evaluate_global(experiment: Experiment, state: ServerState) -> dict[str, float]:
    """Scores of the global model on the test texts."""
    catch_up(experiment.model, [], Folds(0, state.folds))
    adapter = restrict(state.adapter, state.active)
    size = experiment.config.evaluation.batch_size
    found = evaluate(experiment.model, adapter, state.head, experiment.test, size, experiment.prefix)
    if not math.isfinite(found["loss"]):
        raise RunError(f"round {state.round - 1}: the global model's test loss is {found['loss']}")
    return found


def finish(
    experiment: Experiment,
    folder: RunFolder,
    state: ServerState,
    rows: list[dict[str, Any]],
    started: float,
) -> dict[str, Any]:
    """Save the state, export the adapter, write summary and report; returns the summary."""
    config, last = experiment.config, rows[-1]
    save_state(state, folder.path / STATE_FILE)
    export_adapter(experiment.model, state, folder.path / "adapter")
    summary = {
        "method": config.method,
        "seed": config.seed,
        "rounds": len(rows),
        "test_accuracy": last["test_accuracy"],
        "test_macro_f1": last["test_macro_f1"],
        "test_loss": last["test_loss"],
        "majority_rate": majority_rate(experiment.test.labels, len(experiment.corpus.label_names)),
        "steps": sum(row["steps"] for row in rows),
        "failed": sum(row["failed"] for row in rows),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "active_slots": num_slots(state.active),
    }
    if config.privacy is not None:
        summary |= {"epsilon": last["epsilon"], "delta": last["delta"]}
    if config.robust is not None:
        summary["robust_limits"] = config.robust.limits()
    if config.evaluation.per_client:
        summary |= _score_clients(experiment, folder, state)
    if experiment.prefix is not None:
        summary["prefix_cache"] = experiment.prefix.statistics()
    summary["adapter_sha256"] = adapter_sha256(folder.path / "adapter")
    summary["wall_s"] = time.perf_counter() - started
    folder.write("summary.json", summary)
    write_report(folder)
    return summary


def _score_clients(experiment: Experiment, folder: RunFolder, state: ServerState) -> dict[str, float]:
    """Per-client evaluation: a row per client, and the mean and worst accuracy for the summary."""
    size = experiment.config.evaluation.batch_size
    evaluation = evaluate_clients(experiment.federation, state, size)
    scores = evaluation.scores
    folder.append("client_scores.jsonl", score_rows(scores))
    spent: dict[str, float] = {
        "evaluation_bytes_down": evaluation.bytes_down,
        "evaluation_bytes_up": evaluation.bytes_up,
    }
    accuracies = [s.metrics["accuracy"] for s in scores]
    if not accuracies:
        return spent
    mean = sum(accuracies) / len(accuracies)
    return {"client_accuracy_mean": mean, "client_accuracy_min": min(accuracies), **spent}
