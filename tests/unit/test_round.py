"""One round: who takes part, what travels, what is counted, and what a failure does."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from polyrank.adapter import full_mask, new_adapter
from polyrank.aggregation import FedAvg
from polyrank.allocation import Uniform
from polyrank.collect import collect
from polyrank.data.tokens import Tokens
from polyrank.engine.base import Answer
from polyrank.engine.embedded import EmbeddedEngine
from polyrank.errors import RunError
from polyrank.measures import SCORE_NAMES
from polyrank.messages import Training
from polyrank.models.load import read_head
from polyrank.models.targets import resolve_targets
from polyrank.received import Received, Updates
from polyrank.round import Federation, evaluate_clients, federated_round, make_task, training_at
from polyrank.sampling import SampleAll, SampleCount, SampleShare
from polyrank.session import ClientEnv
from polyrank.state import ClientRecord, ServerState
from tests.builders import largest_difference
from tests.conftest import tiny_model
from tests.unit.test_client import tokens


class Recorder:
    """An engine that counts what passes through another one, and can spoil answers."""

    def __init__(self, engine, spoil=None):
        self.engine, self.spoil = engine, spoil or {}
        self.down, self.up, self.pause_s = 0, 0, engine.pause_s

    @property
    def fuse(self):
        return self.engine.fuse

    def clients(self):
        return self.engine.clients()

    def close(self):
        self.engine.close()

    def counted(self, requests):
        for client, request in requests:
            self.down += len(request)
            yield client, request

    def exchange(self, requests):
        for original in self.engine.exchange(self.counted(requests)):
            answer = self.spoil.get(original.client, lambda a: a)(original)
            if answer is not None:
                self.up += len(answer.payload or b"")
                yield answer


def federation(spoil=None, form="lora", **changes):
    model = tiny_model()
    shapes = resolve_targets(model.network, model.blocks, "attention")
    adapter = new_adapter(shapes, form=form, rank=3, scale=2.0, seed=0)
    environments = {
        f"c{i}": ClientEnv(model, tokens(6 + i, seed=i), tokens(4, seed=50 + i)) for i in range(4)
    }
    fed = Federation(
        engine=Recorder(EmbeddedEngine(environments), spoil),
        sampling=SampleAll(),
        allocation=Uniform(),
        aggregation=FedAvg(),
        training=Training(local_steps=2, batch_size=3, learning_rate=0.01),
        rounds=3,
    )
    records = {client: ClientRecord() for client in environments}
    state = ServerState(0, 0, adapter, full_mask(adapter), read_head(model), records)
    return dataclasses.replace(fed, **changes), state


@pytest.mark.parametrize("form", ["lora", "svd"])
def test_a_round_moves_the_model_and_counts_every_byte(form):
    fed, state = federation(form=form)
    after, record = federated_round(fed, state)
    assert after.round == 1
    assert largest_difference(after.adapter, state.adapter) > 1e-4
    assert not torch.equal(after.head["classifier.weight"], state.head["classifier.weight"])
    assert sum(reply.bytes_down for reply in record.replies) == fed.engine.down
    assert sum(reply.bytes_up for reply in record.replies) == fed.engine.up
    assert [reply.client for reply in record.replies] == ["c0", "c1", "c2", "c3"]
    assert [update.num_examples for update in record.learned] == [6, 7, 8, 9]


def test_the_same_state_gives_the_same_bits():
    first, _ = federated_round(*federation())
    second, _ = federated_round(*federation())
    assert largest_difference(first.adapter, second.adapter) == 0


def test_a_failed_client_is_left_out():
    def fail(answer):
        return Answer(answer.client, None, 0.0, "unplugged")

    fed, state = federation({"c1": fail, "c2": lambda answer: None})
    after, record = federated_round(fed, state)
    assert {r.client: r.error for r in record.replies} == {
        "c0": None,
        "c1": "unplugged",
        "c2": "no answer",
        "c3": None,
    }
    pair, pair_state = federation()
    full = full_mask(pair_state.adapter)
    received = Received(lambda client: make_task(pair, pair_state, full, client))
    with contextlib.closing(received):
        collect(pair.engine, ["c0", "c3"], received)
        expected = FedAvg().aggregate(pair_state, Updates(received, ["c0", "c3"]))
    assert largest_difference(after.adapter, expected.adapter) == 0


def test_a_broken_payload_is_refused_with_its_reason():
    fed, state = federation({"c0": lambda answer: dataclasses.replace(answer, payload=answer.payload[:-4])})
    _, record = federated_round(fed, state)
    assert record.replies[0].error.startswith("refused: not a polyrank message")
    assert len(record.learned) == 3


def test_a_round_without_any_update_stops_the_run():
    broken = {f"c{i}": lambda answer: Answer(answer.client, None, 0.0, "loss is nan") for i in range(4)}
    with pytest.raises(RunError, match="round 0: no client gave a usable update .*c0: loss is nan"):
        federated_round(*federation(broken))


def test_a_uniform_rank_below_the_bank_trains_its_slots_only():
    fed, state = federation(allocation=Uniform(rank=1))
    after, record = federated_round(fed, state)
    assert {reply.slots for reply in record.replies} == {6}  # 2 blocks x q, k, v
    for name, factors in after.adapter.modules.items():
        assert torch.equal(factors.A[1:], state.adapter.modules[name].A[1:])
        assert not torch.equal(factors.B[:, 0], state.adapter.modules[name].B[:, 0])


def test_every_client_is_scored_on_its_own_texts():
    fed, state = federation()
    evaluation = evaluate_clients(fed, state, 2, SCORE_NAMES["classification"])
    assert sorted(s.client for s in evaluation.scores) == ["c0", "c1", "c2", "c3"]
    assert all(s.num_examples == 4 and 0 <= s.metrics["accuracy"] <= 1 for s in evaluation.scores)
    assert (evaluation.bytes_down, evaluation.bytes_up) == (fed.engine.down, fed.engine.up)


def test_sampling():
    clients = [f"c{i}" for i in range(20)]
    first = SampleCount(count=5).sample(clients, 0, 0)
    assert first == SampleCount(count=5).sample(clients, 0, 0)
    assert first != SampleCount(count=5).sample(clients, 0, 1)
    assert len(set(first)) == 5
    assert first == [client for client in clients if client in first]
    assert len(SampleShare(share=0.1).sample(clients, 0, 0)) == 2
    assert len(SampleShare(share=0.01).sample(clients, 0, 0)) == 1
    assert SampleAll().sample(clients, 0, 0) == clients
    assert len(SampleCount(count=50).sample(clients, 0, 0)) == 20
    seen = {client for round_ in range(60) for client in SampleCount(count=5).sample(clients, 0, round_)}
    assert seen == set(clients)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627]),
    ],
)
def test_learning_rates_over_rounds(schedule, rates):
    training = Training(learning_rate=1.0, schedule=schedule, warmup_rounds=1)
    assert [training_at(training, r, 5).learning_rate for r in range(5)] == pytest.approx(rates)


def test_tokens_are_not_shared_between_clients():
    fed, _ = federation()
    assert [client.num_examples for client in fed.engine.clients()] == [6, 7, 8, 9]
    assert isinstance(fed.engine.engine.environments["c0"].train, Tokens)
