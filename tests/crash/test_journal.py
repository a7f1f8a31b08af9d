"""The journal of a round: what was received before a crash is not asked for again, and bits stay the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from polyrank.aggregation import Stacking
from polyrank.received import Note, Received
from polyrank.round import federated_round, make_task
from polyrank.wire import decode_task
from tests.builders import largest_difference
from tests.unit.test_round import federation


class StopsError(Exception):
    pass


class Until:
    """An engine that is cut off after some answers, and remembers whom it asked."""

    def __init__(self, engine, answers):
        self.engine, self.answers, self.asked = engine, answers, []
        self.fuse, self.pause_s = engine.fuse, engine.pause_s

    def clients(self):
        return self.engine.clients()

    def exchange(self, requests):
        def seen():
            for client, request in requests:
                self.asked.append(client)
                yield client, request

        for number, answer in enumerate(self.engine.exchange(seen())):
            if number == self.answers:
                raise StopsError
            yield answer


def interrupted(fuse, answers, path, **changes):
    """One round cut off after some answers and run again; and the same round in one go."""
    fed, state = federation(**changes)
    fused = dataclasses.replace(fed.engine.engine, fuse=fuse)
    whole, whole_record = federated_round(dataclasses.replace(fed, engine=fused), state)
    with pytest.raises(StopsError):
        federated_round(dataclasses.replace(fed, engine=Until(fused, answers)), state, path)
    again = Until(fused, 99)
    after, record = federated_round(dataclasses.replace(fed, engine=again), state, path)
    assert largest_difference(after.adapter, whole.adapter) == 0
    assert all(torch.equal(after.head[name], t) for name, t in whole.head.items())

    def told(record):
        return [(r.client, r.bytes_down, r.bytes_up, r.learned.metrics) for r in record.replies]

    assert told(record) == told(whole_record)
    return again.asked


@pytest.mark.parametrize("answers", [0, 1, 3])
def test_only_what_is_missing_is_asked_for(tmp_path, answers):
    assert interrupted(1, answers, tmp_path / "j") == ["c0", "c1", "c2", "c3"][answers:]


@pytest.mark.parametrize(("answers", "asked"), [(1, 4), (2, 2), (3, 2)])
def test_who_shared_a_pass_is_asked_again_together(tmp_path, answers, asked):
    assert interrupted(2, answers, tmp_path / "j") == ["c0", "c1", "c2", "c3"][4 - asked :]


def test_a_torn_or_flipped_record_is_asked_for_again(tmp_path):
    path = tmp_path / "j"
    fed, state = federation()
    with pytest.raises(StopsError):
        federated_round(dataclasses.replace(fed, engine=Until(fed.engine.engine, 3)), state, path)
    whole = path.read_bytes()
    third = len(whole) // 3
    for data, kept in [(whole[:-1], 2), (whole[: third + 20], 1), (whole[:10], 0), (whole + b"\x00" * 50, 3)]:
        path.write_bytes(data)
        engine = Until(fed.engine.engine, 99)
        federated_round(dataclasses.replace(fed, engine=engine), state, path)
        assert len(engine.asked) == 4 - kept
    flipped = bytearray(whole)
    flipped[third + 300] ^= 4
    path.write_bytes(flipped)
    engine = Until(fed.engine.engine, 99)
    federated_round(dataclasses.replace(fed, engine=engine), state, path)
    assert engine.asked == ["c1", "c2", "c3"]


def test_the_journal_of_another_state_is_not_used(tmp_path):
    fed, state = federation()
    with pytest.raises(StopsError):
        federated_round(dataclasses.replace(fed, engine=Until(fed.engine.engine, 3)), state, tmp_path / "j")
    head = {name: tensor + 1 for name, tensor in state.head.items()}
    engine = Until(fed.engine.engine, 99)
    moved = dataclasses.replace(state, head=head)
    federated_round(dataclasses.replace(fed, engine=engine), moved, tmp_path / "j")
    assert len(engine.asked) == 4


def test_a_payload_comes_back_with_what_it_cost(tmp_path):
    fed, state = federation(aggregation=Stacking())
    tasks = {c: make_task(fed, state, state.active, c) for c in ("c0", "c1")}
    note = Note("c1", 2, 345, 0.25)
    received = Received(tasks.__getitem__, tmp_path / "j")
    received.keep(note, b"some bytes")
    received.close()
    again = Received(tasks.__getitem__, tmp_path / "j")
    assert again.journalled("c1", 2) == (note, b"some bytes")
    assert again.journalled("c1", 1) is again.journalled("c0", 2) is None
    again.close()


def test_tasks_carry_attempt_and_base(tmp_path):
    fed, state = federation()
    requests = {}

    class Reading(Until):
        def exchange(self, given):
            kept = dict(given)
            requests.update({client: decode_task(request) for client, request in kept.items()})
            return self.engine.exchange(kept.items())

    federated_round(dataclasses.replace(fed, engine=Reading(fed.engine.engine, 9)), state)
    assert {task.attempt for task in requests.values()} == {0}
    (base,) = {task.base for task in requests.values()}
    assert len(base) == 16
