"""Several worker processes: the same bits as one process, and no run lost to a dead worker."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch

from polyrank.aggregation import Stacking
from polyrank.assemble import prepare
from polyrank.engine.workers import WorkerEngine
from polyrank.errors import RunError
from polyrank.measures import SCORE_NAMES
from polyrank.messages import Training
from polyrank.round import evaluate_clients, federated_round
from polyrank.session import ClientEnv
from tests.builders import largest_difference
from tests.small_runs import small_config
from tests.unit.test_methods import rounds, two_tiers
from tests.unit.test_round import federation


def with_workers(count, **changes):
    fed, state = federation(**changes)
    engine = WorkerEngine(fed.engine.engine.environments, count)
    return dataclasses.replace(fed, engine=engine), state


@pytest.fixture(params=[1, 2, 3])
def count(request):
    return request.param


@pytest.mark.parametrize(
    "changes", [{}, {"aggregation": Stacking(), "allocation": two_tiers()}], ids=["mean", "fold"]
)
def test_any_number_of_workers_gives_the_same_bits(count, changes):
    alone, _ = rounds(*federation(**changes), 3)
    fed, state = with_workers(count, **changes)
    together, records = rounds(fed, state, 3)
    assert largest_difference(together.adapter, alone.adapter) == 0
    assert all(torch.equal(together.head[name], t) for name, t in alone.head.items())
    assert all(largest_difference(a, b) == 0 for a, b in zip(together.folds, alone.folds, strict=True))
    assert len({worker.process.pid for worker in fed.engine.workers}) == count
    assert [reply.client for reply in records[0].replies] == ["c0", "c1", "c2", "c3"]
    scores = evaluate_clients(fed, together, 2, SCORE_NAMES["classification"]).scores
    assert len(scores) == 4
    fed.engine.close()


def test_what_all_had_from_the_start_keeps_nobody_at_home(tmp_path):
    """FeDeRA begins with a fold, which came to every process with the fork."""
    experiment = prepare(
        small_config(tmp_path, "plain", "method=federa", "adapter.rank=2", "engine.workers=2")
    )
    federated_round(experiment.federation, experiment.start)
    assert all(env.folds for env in experiment.environments.values())
    assert experiment.federation.engine.home == {}
    experiment.federation.engine.close()


def test_a_dead_worker_costs_its_client_one_round():
    fed, state = with_workers(2)
    state, _ = federated_round(fed, state)
    victim = fed.engine.workers[0]
    os.kill(victim.process.pid, signal.SIGKILL)
    victim.process.join()
    state, record = federated_round(fed, state)
    errors = [reply.error for reply in record.replies if reply.error]
    assert errors == ["the worker process died"]
    assert victim not in fed.engine.workers
    _, record = federated_round(fed, state)
    assert all(reply.error is None for reply in record.replies)
    fed.engine.close()


def test_failures_come_back_as_answers_and_bugs_stop_the_run():
    training = Training(optimizer="sgd", learning_rate=1e30, clip_norm=0.0, local_steps=6)
    fed, state = with_workers(2, training=training)
    with pytest.raises(RunError, match="no client gave a usable update .*ClientError: loss is"):
        federated_round(fed, state)
    fed.engine.close()
    broken = {name: ClientEnv(None, env.train) for name, env in fed.engine.environments.items()}
    fed = dataclasses.replace(fed, engine=WorkerEngine(broken, 2), training=Training(local_steps=1))
    with pytest.raises(RunError, match="c.: AttributeError"):
        federated_round(fed, state)
    fed.engine.close()
