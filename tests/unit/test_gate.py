"""The gate: a bad reply is refused with its reason, and the model is that of the good clients to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import struct
import time

import pytest
import torch
from safetensors.torch import save

from polyrank.adapter import restrict, within
from polyrank.aggregation import ReplicationPadding
from polyrank.engine.base import Answer
from polyrank.gate import decode_scores, decode_update, most_bytes, outliers
from polyrank.messages import ClientScores, EvaluateTask, Training
from polyrank.round import federated_round, make_task
from polyrank.wire import (
    WireError,
    decode_task,
    encode_scores,
    encode_task,
    encode_update,
    open_reply,
    sealed,
)
from tests.builders import largest_difference, random_adapter, random_head
from tests.peak import Peak
from tests.unit.test_round import federation
from tests.unit.test_wire import train_task

FLOATS = {"adapter": torch.float32, "head": torch.float32}


def spelt(meaning, tensors, metadata=None):
    text = json.dumps(meaning)
    return sealed(save(tensors, {"polyrank": text, **(metadata or {})}))


def changed(meaning=None, tensors=None, drop=()):
    """A reply with some of its meaning or tensors replaced, and a good digest."""

    def spoil(answer):
        told, numbers = open_reply(answer.payload)
        told |= meaning or {}
        numbers = numbers | {name: make(numbers.get(name)) for name, make in (tensors or {}).items()}
        kept = {name: tensor.contiguous() for name, tensor in numbers.items() if name not in drop}
        return dataclasses.replace(answer, payload=spelt(told, kept))

    return spoil


def with_value(value):
    def make(tensor):
        tensor = tensor.clone()
        tensor[3] = value
        return tensor

    return make


def bits(value, count):
    return lambda tensor: torch.full([count], value, dtype=torch.uint8)


def body(answer, data):
    return dataclasses.replace(answer, payload=data)


def claiming(shape):
    """A reply whose adapter is told to be of a shape, with no byte for it."""

    def spoil(answer):
        told = answer.payload[16:]
        header = json.loads(told[8 : 8 + int.from_bytes(told[:8], "little")])
        empty = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        text = json.dumps({"__metadata__": header["__metadata__"], "adapter": empty}).encode()
        return body(answer, sealed(struct.pack("<Q", len(text)) + text))

    return spoil


def giving_up_a_slot(answer):
    """A whole and valid update of all slots but the last, as self-pruning would send it."""
    fed, state = federation()
    task = make_task(fed, state, state.active, answer.client)
    told, _ = open_reply(answer.payload)
    task = dataclasses.replace(task, base=told["base"])
    update = decode_update(answer.payload, task)
    mask = {name: torch.arange(held.numel()) < held.numel() - 1 for name, held in update.mask.items()}
    kept = restrict(update.adapter, within(mask, update.mask))
    return body(answer, encode_update(dataclasses.replace(update, mask=mask, adapter=kept), task))


METRICS = {"loss": 1.0, "last_loss": 1.0, "steps": 2}
BAD = {
    "nan": (changed(tensors={"adapter": with_value(float("nan"))}), "not_finite"),
    "inf": (changed(tensors={"head": with_value(float("inf"))}), "not_finite"),
    "wrong rank": (changed(tensors={"adapter": lambda t: t[: len(t) // 3]}), "shape"),
    "(1, d)": (changed(tensors={"adapter": lambda t: t[None]}), "shape"),
    "scalar": (changed(tensors={"head": lambda t: t[0]}), "shape"),
    "float64": (changed(tensors={"adapter": lambda t: t.double()}), "dtype"),
    "float16": (changed(tensors={"head": lambda t: t.half()}), "dtype"),
    "missing key": (changed(drop=["head"]), "missing"),
    "extra key": (changed(tensors={"more": lambda t: torch.ones(3)}), "extra"),
    "votes nobody asked for": (
        changed(tensors={"votes": lambda t: torch.ones(3, dtype=torch.uint8)}),
        "extra",
    ),
    "mask nobody asked for": (giving_up_a_slot, "extra"),
    "a shape without end": (claiming([0, 2**40, 2**40]), "shape"),
    "too many mask bits": (changed(tensors={"mask": lambda t: torch.ones(9, dtype=torch.uint8)}), "shape"),
    "no slot kept": (changed(tensors={"mask": lambda t: torch.zeros(3, dtype=torch.uint8)}), "empty"),
    "weight -1": (changed({"num_examples": -1}), "examples"),
    "weight 0": (changed({"num_examples": 0}), "examples"),
    "weight nan": (changed({"num_examples": float("nan")}), "examples"),
    "weight 1e12": (changed({"num_examples": 10**12}), "examples"),
    "weight true": (changed({"num_examples": True}), "examples"),
    "weight as text": (changed({"num_examples": "7"}), "examples"),
    "loss nan": (changed({"metrics": {**METRICS, "loss": float("nan")}}), "metrics"),
    "loss 1e300": (changed({"metrics": {**METRICS, "loss": 1e300}}), "metrics"),
    "no steps": (changed({"metrics": {"loss": 1.0, "last_loss": 1.0}}), "metrics"),
    "many metrics": (changed({"metrics": {**METRICS, **{f"m{i}": 1.0 for i in range(20)}}}), "metrics"),
    "long name": (changed({"metrics": {**METRICS, "x" * 100: 1.0}}), "metrics"),
    "all zero": (changed(tensors=dict.fromkeys(FLOATS, torch.zeros_like)), "all_zero"),
    "empty": (lambda a: body(a, b""), "empty"),
    "stale round": (changed({"round": 7}), "round"),
    "round as text": (changed({"round": "0"}), "round"),
    "another client": (changed({"client": "c2"}), "client"),
    "another attempt": (changed({"attempt": 1}), "attempt"),
    "wrong base": (changed({"base": "0" * 16}), "base"),
    "no base": (lambda a: body(a, spelt(*without(a, "base"))), "base"),
    "scores": (changed({"kind": "scores"}), "kind"),
    "another format": (changed({"format": 1}), "header"),
    "extra metadata": (lambda a: body(a, spelt(*open_reply(a.payload), {"more": "x"})), "header"),
    "a flipped bit": (
        lambda a: body(a, a.payload[:-9] + bytes([a.payload[-9] ^ 16]) + a.payload[-8:]),
        "digest",
    ),
    "cut short": (lambda a: body(a, a.payload[:-4]), "digest"),
    "too long": (lambda a: body(a, a.payload + bytes(20_000)), "too_large"),
    "a thousand times the change": (changed(tensors={"adapter": lambda t: 1000 * t}), "norm"),
    "failed": (lambda a: Answer(a.client, None, 0.0, "unplugged"), "failed"),
    "silent": (lambda a: None, "no_answer"),
}


PRUNING = ("too many mask bits", "no slot kept")
"""Those that take a run in which clients may give up slots."""


def without(answer, key):
    meaning, tensors = open_reply(answer.payload)
    return {name: value for name, value in meaning.items() if name != key}, tensors


def spoilt(name, spoil):
    """A round in which c1 sends something bad."""
    if name not in PRUNING:
        return federated_round(*federation({"c1": spoil}))
    training = Training(local_steps=2, batch_size=3, learning_rate=0.01, prune_keep=0.5)
    return federated_round(*federation({"c1": spoil}, training=training, aggregation=ReplicationPadding()))


@pytest.fixture(scope="module")
def good():
    """The state after a round in which c1 gave nothing, by what the round is like."""
    found = {name: spoilt(name, lambda answer: None)[0] for name in ("nan", PRUNING[0])}
    return lambda name: found[PRUNING[0] if name in PRUNING else "nan"]


def assert_same(after, good):
    assert largest_difference(after.adapter, good.adapter) == 0
    assert all(torch.equal(after.head[name], tensor) for name, tensor in good.head.items())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_is_refused_and_the_others_are_averaged(name, good):
    spoil, reason = BAD[name]
    after, record = spoilt(name, spoil)
    assert [(reply.client, reply.reason) for reply in record.replies if reply.reason] == [("c1", reason)]
    assert_same(after, good(name))


def test_what_a_bad_reply_is_kept_from_changing_would_show(good):
    """The control: the same round with c1's honest reply ends elsewhere."""
    for name in ("nan", PRUNING[0]):
        whole, _ = spoilt(name, lambda answer: answer)
        assert largest_difference(whole.adapter, good(name).adapter) > 1e-4


def test_a_site_survives_a_hostile_shape_too():
    task = train_task()
    told = encode_task(task)[16:]
    size = int.from_bytes(told[:8], "little")
    header, numbers = json.loads(told[8 : 8 + size]), told[8 + size :]
    empty = {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [len(numbers)] * 2}
    text = json.dumps(header | {"more": empty})
    with pytest.raises(WireError, match="not a polyrank message: Stride calculation overflowed"):
        decode_task(sealed(struct.pack("<Q", len(text)) + text.encode() + numbers))


def test_every_reason_is_in_the_matrix():
    from typing import get_args

    from polyrank.messages import Reason

    others = {"unasked", "duplicate", "votes", "slots"}  # below, and in test_voting.py
    assert {reason for _, reason in BAD.values()} | others == set(get_args(Reason))


def test_slots_that_were_not_assigned_are_refused():
    task = train_task(rank=4, held=2)
    task = dataclasses.replace(task, training=Training(prune_keep=0.5))
    update = dataclasses.replace(
        update_for(task), mask={n: torch.ones(4, dtype=torch.bool) for n in task.mask}
    )
    full = dataclasses.replace(update, adapter=random_adapter(0, 4))
    with pytest.raises(WireError, match="not given to train") as refusal:
        decode_update(encode_update(full, task), task)
    assert refusal.value.reason == "slots"


def update_for(task):
    from tests.builders import update_of

    update = update_of(task.client, random_adapter(8, 4), task.mask, 10, random_head(5))
    return dataclasses.replace(update, round=task.round)


@pytest.mark.parametrize("second", ["the same", "another"])
def test_the_first_of_two_answers_counts(second):
    class Twice:
        def __init__(self, engine):
            self.engine, self.fuse, self.pause_s = engine, engine.fuse, engine.pause_s

        def clients(self):
            return self.engine.clients()

        def exchange(self, requests):
            for answer in self.engine.exchange(requests):
                yield answer
                if answer.client == "c1":
                    yield answer if second == "the same" else BAD["nan"][0](answer)
            yield Answer("stranger\x1b[2J", b"hello", 0.0)

    fed, state = federation()
    whole, _ = federated_round(fed, state)
    after, record = federated_round(dataclasses.replace(fed, engine=Twice(fed.engine)), state)
    assert_same(after, whole)
    reasons = [(reply.client, reply.reason) for reply in record.replies if reply.reason]
    assert reasons == [("c1", "duplicate"), ("stranger [2J", "unasked")]
    assert [r.client for r in record.replies if r.learned is not None] == ["c0", "c1", "c2", "c3"]


def test_the_norm_bound_by_hand():
    assert outliers({"a": 1.0, "b": 2.0, "c": 51.0}, 25) == {
        "c": "changed 25.5 times the median of its cohort"
    }
    assert outliers({"a": 1.0, "b": 2.0, "c": 50.0}, 25) == {}
    assert outliers({"a": 1.0, "b": 2.0, "c": float("inf")}, 25).keys() == {"c"}
    assert outliers({"a": 1.0, "b": 2.0, "c": 51.0}, 0) == {}
    assert outliers({"a": 1.0, "b": 51.0}, 25) == {}
    assert outliers({"a": 0.0, "b": 0.0, "c": 1.0}, 25) == {}


def test_scores_pass_the_same_gate():
    bank = random_adapter(0, 2)
    task = EvaluateTask(4, "c", {}, bank, random_head(1), 16)
    scores = ClientScores(4, "c", 12, {"loss": 0.5})
    assert decode_scores(encode_scores(scores), task, {"loss"}) == scores
    for data, reason in [
        (b"", "empty"),
        (bytes(20_000), "too_large"),
        (encode_scores(dataclasses.replace(scores, round=3)), "round"),
        (encode_scores(dataclasses.replace(scores, metrics={"loss": 1e12})), "metrics"),
        (encode_scores(dataclasses.replace(scores, metrics={})), "metrics"),
        (encode_scores(dataclasses.replace(scores, metrics={"loss": 0.5, "client": 1.0})), "metrics"),
        (spelt(open_reply(encode_scores(scores))[0], {"more": torch.ones(2)}), "extra"),
    ]:
        with pytest.raises(WireError) as refusal:
            decode_scores(data, task, {"loss"})
        assert refusal.value.reason == reason


# --- hostile bytes -----------------------------------------------------------------------------


def mutated(data, draw):
    """A few random edits, with a good digest half of the time, so that they reach the checks behind it."""
    edited = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place, kind = draw.randrange(len(edited)), draw.randrange(4)
        if draw.random() < 0.7:
            place = min(place, draw.randrange(600), len(edited) - 1)  # where the header is
        if kind == 0:
            edited[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del edited[place : place + draw.randint(1, 40)]
        elif kind == 2:
            edited[place:place] = draw.randbytes(draw.randint(1, 40))
        else:
            edited[place : place + 8] = draw.choice(
                [b"\xff" * 8, bytes(8), b'{"a":[[[', b"1e999999", b"-9999999"]
            )
        edited = edited or bytearray(b"x")
    return sealed(bytes(edited[16:])) if draw.random() < 0.5 else bytes(edited)


def is_quick(data, task):
    """Does reading it take under 50 CPU-ms? The best of three: what Python collects meanwhile is no bomb."""
    for _ in range(3):
        start = time.thread_time()
        with contextlib.suppress(WireError):
            decode_update(data, task, 10)
        if time.thread_time() - start < 0.05:
            return True
    return False


def attack(count, seed):
    task = train_task()
    update = update_for(task)
    data, draw = encode_update(update, task), random.Random(seed)
    accepted, told, peak = 0, set(), Peak()
    for _ in range(count):
        hostile = mutated(data, draw)
        assert is_quick(hostile, task)
        try:
            found = decode_update(hostile, task, 10)
        except WireError as refusal:
            told.add((refusal.reason, len(str(refusal)) < 600))
        else:
            accepted += 1
            again = encode_update(found, task)
            assert open_reply(again)[0] == open_reply(hostile)[0]  # it is what was sent, in every field
            assert all(torch.equal(t, open_reply(hostile)[1][n]) for n, t in open_reply(again)[1].items())
            if hostile[:16] == data[:16]:
                assert hostile == data, "a changed message passed under its old digest"
    assert all(short for _, short in told)
    assert len(told) > 5  # many checks were reached
    assert peak.grown_kib() < 4 * 1024
    return accepted


def test_ten_thousand_hostile_updates():
    accepted = attack(10_000, 0)
    assert 0 < accepted < 2_000  # numbers that were changed and sealed again are what that client sent


def test_without_the_digest_a_changed_message_would_pass(monkeypatch):
    """The control of the two around it."""
    monkeypatch.setattr("polyrank.wire._unsealed", lambda data: data[16:])
    with pytest.raises(AssertionError, match="a changed message passed under its old digest"):
        attack(10_000, 0)


@pytest.mark.slow
def test_a_million_hostile_updates():
    attack(1_000_000, 1)


def bombs():
    """Small messages that ask for much: memory, time, or depth; each says besides what an honest one says."""
    honest = encode_update(update_for(train_task()), train_task())[16:]
    size = int.from_bytes(honest[:8], "little")
    header, numbers = json.loads(honest[8 : 8 + size]), honest[8 + size :]
    metadata = {"__metadata__": header["__metadata__"]}

    def told(table, data=b""):
        text = json.dumps(metadata | table).encode() if isinstance(table, dict) else table
        return sealed(struct.pack("<Q", len(text)) + text + data)

    def tensor(shape, offsets, dtype="F32"):
        return {"adapter": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}

    def meaning(text):
        return told(json.dumps({"__metadata__": {"polyrank": text}}).encode())

    first, last = header["adapter"]["data_offsets"]
    flags = {**header["adapter"], "dtype": "BOOL", "shape": [last - first]}
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [last, last]}
    yield "shape of a terabyte", "shape", told(tensor([2**38], [0, 2**40]))
    yield "shape that overflows", "shape", told(tensor([2**32, 2**32], [0, 0]))
    yield "nothing of a shape without end", "shape", told(tensor([0, 2**40, 2**40], [0, 0]))
    yield "negative shape", "shape", told(tensor([-1], [0, 4]))
    yield "a shape that is true", "shape", told(tensor([True], [0, 4]), bytes(4))
    yield "offsets past the end", "header", told(tensor([1], [2**40, 2**40 + 4]))
    yield "offsets backwards", "header", told(tensor([1], [4, 0]), bytes(8))
    yield "a shape of 2000 ones", "shape", told(tensor([1] * 2000, [0, 4]), bytes(4))
    yield "60 tensors", "extra", told(header | {f"t{i}": empty for i in range(60)}, numbers)
    yield (
        "tensors that overlap",
        "header",
        told(tensor([2], [0, 8]) | {"head": tensor([2], [4, 12])["adapter"]}, bytes(12)),
    )
    yield "a hole between tensors", "header", told(tensor([1], [4, 8]), bytes(8))
    yield "bytes after the tensors", "header", told(header, numbers + bytes(40))
    yield "an unknown dtype", "header", told(tensor([1], [0, 4], "F1024"), bytes(4))
    yield "bool for float", "dtype", told(header | {"adapter": flags}, numbers)
    yield "a header longer than the message", "header", sealed(struct.pack("<Q", 8000) + b"{}")
    yield "a header of 2^63 bytes", "header", sealed(struct.pack("<Q", 2**63) + b"{}")
    yield "a header of 100 MB", "header", sealed(struct.pack("<Q", 10**8) + b"{}")
    yield "10 MB of digest", "too_large", bytes(10**7)
    yield "deep lists", "header", told(b"[" * 7000)
    yield "deep tables", "header", told(b'{"a":' * 1500)
    yield "deep meaning", "header", meaning("[" * 7000)
    yield "a number of 5000 digits", "header", meaning("9" * 5000)
    yield "a number past all floats", "kind", meaning('{"format": 2, "kind": 1e99999999}')
    yield (
        "the same key twice",
        "header",
        told(b'{"__metadata__":{"polyrank":"{}"},"__metadata__":{"polyrank":"{}"}}'),
    )
    yield "meaning that is a list", "header", meaning("[1, 2]")
    yield "half a character", "header", told(b'{"__metadata__":{"polyrank":"\xff\xfe"}}')
    yield "metadata that is no table", "header", told(b'{"__metadata__": 3}')


@pytest.mark.parametrize(("name", "reason", "data"), list(bombs()), ids=[name for name, *_ in bombs()])
def test_a_bomb_is_refused(name, reason, data):
    task = train_task()
    peak = Peak()
    with pytest.raises(WireError) as refusal:
        decode_update(data, task)
    assert peak.grown_kib() < 4 * 1024
    assert is_quick(data, task)
    assert refusal.value.reason == reason


def test_a_slow_answer_is_noticed(monkeypatch):
    """The control of what is said here about time: once slow is no matter, slow each time is."""
    slow = [0.06, 0, 0.06, 0.06, 0.06]

    def decode(*_):
        until = time.thread_time() + slow.pop(0)
        while time.thread_time() < until:
            pass

    monkeypatch.setitem(globals(), "decode_update", decode)
    assert is_quick(b"", None)
    assert not is_quick(b"", None)


def test_memory_that_is_taken_and_given_back_is_noticed():
    """The control of what is said here about memory."""
    bytes(b"x" * (200 << 20))  # a peak of the past hides nothing
    peak = Peak()
    bytes(b"x" * (64 << 20))
    assert peak.grown_kib() > 60 * 1024


def test_the_size_limit_leaves_room_for_every_honest_answer():
    for form in ("lora", "svd"):
        task = train_task(form)
        update = dataclasses.replace(update_for(task), adapter=random_adapter(8, 2, form))
        assert len(encode_update(update, task)) < most_bytes(task)
