"""A whole run: go round by round, commit each, leave a run folder behind."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyrank import durable
from polyrank.adapter import num_slots, restrict
from polyrank.assemble import Experiment, prepare
from polyrank.card import write_card
from polyrank.charges import CHARGES, BudgetError, read_charges
from polyrank.checkpoint import STATE_FILE, save_state
from polyrank.client import keep_up
from polyrank.commit import CHECKPOINTS, Manifest, commit, first_manifest
from polyrank.config import Config
from polyrank.errors import InputError, RunError
from polyrank.evaluation import evaluate, majority_rate
from polyrank.export import adapter_sha256, config_digest, export_adapter
from polyrank.ledger import (
    RunFolder,
    client_rows,
    create_run_folder,
    refuse_existing,
    round_row,
    score_rows,
    simulated_totals,
    slot_row,
    versions,
)
from polyrank.measures import MEASURES, SCORE_NAMES
from polyrank.privacy import PrivateMean
from polyrank.report import write_report
from polyrank.round import Federation, evaluate_clients, federated_round
from polyrank.samples import begin_samples, end_samples
from polyrank.sampling import SecretSampling, expected_share
from polyrank.state import ServerState

SCORES = "client_scores.jsonl"
JOURNAL = "journal"


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


def open_folder(experiment: Experiment, out: Path | None) -> RunFolder:
    """Make the run folder and write down everything that is known before the first round."""
    config = experiment.config
    source = "hub" if config.data.source.startswith("hub:") else Path(config.data.source).stem[:60]
    folder = create_run_folder(out, f"{config.method}-{source}")
    folder.write("config.json", config.model_dump(mode="json"))
    describe(experiment, folder)
    return folder


def describe(experiment: Experiment, folder: RunFolder) -> None:
    """What is known before the first round besides the config."""
    folder.write("versions.json", versions())
    folder.write("partition.json", experiment.partition)
    begin_samples(experiment, folder)


def conduct(
    experiment: Experiment, folder: RunFolder, manifest: Manifest | None = None
) -> Iterator[dict[str, Any]]:
    """Run the rounds that are left; yields each round's row once it is committed, then the summary.

    Args:
        manifest: of the checkpoint that ``experiment.start`` was read from; None at the start of a run.
    """
    started = time.perf_counter()
    state, config = experiment.start, experiment.config
    rows = folder.read_rows("rounds.jsonl")
    try:
        federation = in_private(experiment, folder)
        if manifest is None:
            inputs = {**experiment.inputs(), "config": config_digest(folder)}
            manifest = commit(folder, state, first_manifest(inputs), 0.0, config.keep_last)
        for round_ in range(state.round, federation.rounds):
            journal = folder.path / JOURNAL / f"{round_:05d}"
            try:
                state, record = federated_round(federation, state, journal)
            except BudgetError:
                if not rows:
                    raise
                found = evaluate_global(experiment, state)
                rows[-1] |= {f"test_{name}": value for name, value in found.items()}
                break  # a round that was done again took what was left: the run ends with the one before
            due = (round_ + 1) % config.evaluation.every == 0 or round_ + 1 == federation.rounds
            rows.append(round_row(record, evaluate_global(experiment, state) if due else None))
            folder.append("rounds.jsonl", rows[-1:])
            folder.append("clients.jsonl", client_rows(record))
            if config.voting is not None:
                folder.append("slots.jsonl", [slot_row(record)])
            wall_s, started = time.perf_counter() - started, time.perf_counter()
            manifest = commit(folder, state, manifest, wall_s, config.keep_last)
            with durable.disk_errors(journal):
                journal.unlink()
            yield rows[-1]
        yield finish(experiment, folder, state, rows, started - manifest["wall_s"])
    finally:
        experiment.federation.engine.close()
        if experiment.prefix is not None:
            experiment.prefix.drop()
        folder.release()


def in_private(experiment: Experiment, folder: RunFolder) -> Federation:
    """The federation of a run whose config asks for privacy: its noise and its record live in the folder.

    Raises: InputError when the record is not that of the rounds that are done.
    """
    config, fed = experiment.config, experiment.federation
    if config.privacy is None:
        return fed
    charges = config.privacy.open(folder.path, config.sampling)
    if lost := sorted(set(range(experiment.start.round)) - set(charges.made_in())):
        allowed = f"holds no charge of round {lost[0]}, which is done; what was spent is not known any more"
        raise InputError(CHARGES, str(folder.path / CHARGES), allowed)
    share = expected_share(config.sampling, len(experiment.partition["clients"]))
    rule = PrivateMean(config.privacy, config.aggregation, config.allocation, share, charges)
    sampling = SecretSampling(config.sampling, int.from_bytes(charges.key))
    return replace(fed, aggregation=rule, sampling=sampling, private=True)


def evaluate_global(experiment: Experiment, state: ServerState) -> dict[str, float]:
    """Scores of the global model on the test texts."""
    keep_up(experiment.model, state.folds)
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
    """Save the state, export the adapter, write summary and report; returns the summary.

    A run is finished when its summary is there: whatever was written before it is written anew.
    """
    config, last = experiment.config, rows[-1]
    with durable.disk_errors(folder.path):
        save_state(state, folder.path / STATE_FILE)
        durable.drop_folder(folder.path / "adapter")
        (folder.path / SCORES).unlink(missing_ok=True)
        export_adapter(experiment.model, state, folder.path / "adapter")
    summary = {
        "method": config.method,
        "seed": config.seed,
        "rounds": len(rows),
        **{measure.on_test: last[measure.on_test] for measure in MEASURES[config.task]},
        "test_loss": last["test_loss"],
        **_majority(experiment),
        "steps": sum(row["steps"] for row in rows),
        "failed": sum(row["failed"] for row in rows),
        "reasons": dict(sum((Counter(row["reasons"]) for row in rows), Counter())),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "active_slots": num_slots(state.active),
    }
    if config.fleet is not None:
        summary |= simulated_totals(rows)
    if config.privacy is not None:
        spent = read_charges(folder.path / CHARGES)[-1]  # also for a round that was begun and given up
        summary |= {"epsilon": spent.epsilon, "delta": spent.delta}
    if config.robust is not None:
        summary["robust_limits"] = config.robust.limits()
    if config.evaluation.per_client:
        summary |= _score_clients(experiment, folder, state)
    summary |= end_samples(experiment, folder, state)
    if experiment.prefix is not None:
        summary["prefix_cache"] = experiment.prefix.statistics()
    summary["adapter_sha256"] = adapter_sha256(folder.path / "adapter")
    summary["wall_s"] = time.perf_counter() - started
    facts = (summary, folder.read("partition.json"))
    with durable.disk_errors(folder.path):
        write_card(folder.path / "adapter", experiment.model, config, facts)
        durable.sync_folder(folder.path / "adapter")
        durable.sync_folder(folder.path)  # the summary must not be there before what it speaks of
    folder.write("summary.json", summary)
    close_folder(folder)
    return summary


def close_folder(folder: RunFolder) -> None:
    """The last steps of a finished run: what only a resume needs goes, and its report comes."""
    with durable.disk_errors(folder.path):
        for name in (CHECKPOINTS, JOURNAL):
            durable.drop_folder(folder.path / name)
        write_report(folder)


def _majority(experiment: Experiment) -> dict[str, float]:
    if experiment.config.task != "classification":
        return {}
    labels, count = experiment.test.labels, len(experiment.corpus.label_names)
    return {"majority_rate": majority_rate(labels, count)}


def _score_clients(experiment: Experiment, folder: RunFolder, state: ServerState) -> dict[str, float]:
    """Per-client evaluation: a row per client, and the mean and worst of them for the summary."""
    task, size = experiment.config.task, experiment.config.evaluation.batch_size
    lead = MEASURES[task][0]
    evaluation = evaluate_clients(experiment.federation, state, size, SCORE_NAMES[task])
    scores = evaluation.scores
    folder.append(SCORES, score_rows(scores))
    spent: dict[str, float] = {
        "clients_scored": len(scores),
        "evaluation_bytes_down": evaluation.bytes_down,
        "evaluation_bytes_up": evaluation.bytes_up,
    }
    values = [s.metrics[lead.key] for s in scores]
    if not values:
        return spent
    worst = {f"client_{lead.key}_min": min(values)} if lead.rises else {f"client_{lead.key}_max": max(values)}
    return {f"client_{lead.key}_mean": sum(values) / len(values), **worst, **spent}
