"""Messages as bytes: exact, small, and refused when they are anything else."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save

from polyrank import wire
from polyrank.adapter import Adapter, full_mask, prefix_mask, restrict
from polyrank.gate import decode_scores, decode_update
from polyrank.messages import ClientScores, EvaluateTask, Folds, Training, TrainTask
from polyrank.wire import (
    WireError,
    decode_task,
    encode_scores,
    encode_task,
    encode_update,
    sealed,
)
from tests.builders import largest_difference, random_adapter, random_head, update_of


def train_task(form="lora", rank=4, held=2, shapes=None):
    bank = random_adapter(3, rank, form, **({"shapes": shapes} if shapes else {}))
    mask = prefix_mask(bank, held)
    training = Training(local_steps=3, learning_rate=0.5)
    return TrainTask(2, "client-1", 77, mask, mask, restrict(bank, mask), random_head(0), training)


@pytest.mark.parametrize("form", ["lora", "svd"])
def test_a_task_comes_back_exactly(form):
    task = train_task(form)
    again = decode_task(encode_task(task))
    assert isinstance(again, TrainTask)
    assert (again.round, again.client, again.seed) == (2, "client-1", 77)
    assert again.training == task.training
    assert largest_difference(again.adapter, task.adapter) == 0
    assert all(torch.equal(again.mask[n], m) for n, m in task.mask.items())
    assert all(torch.equal(again.head[n], t) for n, t in task.head.items())
    assert [f.scale for f in again.adapter.modules.values()] == [2.0, 2.0]


def test_a_module_without_slots_does_not_travel():
    task = train_task()
    mask = {**task.mask, "block.1.q": torch.zeros(4, dtype=torch.bool)}
    lean = dataclasses.replace(
        task,
        mask=mask,
        trained=mask,
        adapter=restrict(
            task.adapter, {**full_mask(task.adapter), "block.1.q": torch.zeros(2, dtype=torch.bool)}
        ),
    )
    again = decode_task(encode_task(lean))
    assert list(again.adapter.modules) == ["block.0.q"]
    assert not bool(again.mask["block.1.q"].any())


def test_an_evaluation_comes_back_exactly():
    bank = random_adapter(0, 2)
    task = EvaluateTask(4, "c", full_mask(bank), bank, random_head(1), 16)
    again = decode_task(encode_task(task))
    assert isinstance(again, EvaluateTask)
    assert (again.round, again.client, again.batch_size) == (4, "c", 16)
    scores = ClientScores(4, "c", 12, {"loss": 0.5})
    assert decode_scores(encode_scores(scores), task, {"loss"}) == scores


def test_equal_messages_are_equal_bytes():
    assert encode_task(train_task()) == encode_task(train_task())


def test_the_payload_is_four_bytes_a_number_and_the_overhead_is_small():
    shapes = {f"bert.encoder.layer.{i}.attention.self.{m}": (384, 384) for i in range(6) for m in "qkv"}
    task = train_task(rank=8, held=8, shapes=shapes)
    numbers = task.adapter.num_parameters() + sum(t.numel() for t in task.head.values())
    assert numbers == 18 * 8 * (384 + 384) + 8
    down, up = len(encode_task(task)), len(encode_update(reply_to(task), task))
    assert 0 < up - 4 * numbers < 500
    assert 0 < down - 4 * numbers < 18 * 70 + 1_500
    assert (down - 4 * numbers) / down < 0.02


def reply_to(task):
    update = update_of(task.client, task.adapter)
    return dataclasses.replace(update, round=task.round, mask=task.mask)


def test_an_update_is_read_against_its_task():
    task = train_task("svd")
    update = reply_to(task)
    again = decode_update(encode_update(update, task), task)
    assert largest_difference(again.adapter, update.adapter) == 0
    assert again.num_examples == 10
    assert again.metrics == update.metrics


def test_wrong_replies_are_refused():
    task = train_task()
    good = reply_to(task)
    for change, reason in [
        ({"round": 3}, "round is 3, expected 2"),
        ({"client": "other"}, "client is 'other'"),
        ({"num_examples": 0}, "num_examples is 0"),
        ({"num_examples": -1}, "num_examples is -1"),
        ({"num_examples": 2.5}, "num_examples is 2.5"),
        ({"metrics": {"loss": "low"}}, "metrics must be finite numbers"),
        ({"metrics": {"loss": 10**400}}, "metrics must be finite numbers"),
        ({"metrics": {"loss": True}}, "metrics must be finite numbers"),
        ({"metrics": {"loss": 1.0}}, "metrics lack last_loss, steps"),
        ({"num_examples": 10**30}, "registered were 99"),
    ]:
        with pytest.raises(WireError, match=reason):
            decode_update(encode_update(dataclasses.replace(good, **change), task), task, 99)
    larger = dataclasses.replace(good, adapter=random_adapter(0, 3))
    with pytest.raises(WireError, match=r"expected float32 \[28\], found torch.float32 \[42\]"):
        decode_update(encode_update(larger, task), task)
    head = {name: torch.full_like(t, float("nan")) for name, t in good.head.items()}
    with pytest.raises(WireError, match="tensor head holds a number that is not finite"):
        decode_update(encode_update(dataclasses.replace(good, head=head), task), task)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_found_among_many(value):
    task = train_task()
    update = reply_to(task)
    name = list(update.adapter.modules)[-1]
    spoilt = update.adapter.modules[name].A.clone()
    spoilt[1, 1] = value
    factors = dataclasses.replace(update.adapter.modules[name], A=spoilt)
    update = dataclasses.replace(update, adapter=Adapter("lora", {**update.adapter.modules, name: factors}))
    with pytest.raises(WireError, match="tensor adapter holds a number that is not finite"):
        decode_update(encode_update(update, task), task)


def test_a_reply_in_float64_or_without_a_tensor_is_refused():
    task = train_task()
    meaning = {
        "format": 2,
        "kind": "update",
        "round": 2,
        "client": "client-1",
        "attempt": 0,
        "base": "",
        "num_examples": 1,
        "metrics": {"loss": 1.0, "last_loss": 1.0, "steps": 1},
    }
    metadata = {"polyrank": json.dumps(meaning)}
    wide = save({"adapter": torch.zeros(28, dtype=torch.float64), "head": torch.zeros(8)}, metadata)
    with pytest.raises(WireError, match="expected float32"):
        decode_update(sealed(wide), task)
    with pytest.raises(WireError, match="tensor head is missing"):
        decode_update(sealed(save({"adapter": torch.zeros(28)}, metadata)), task)


@pytest.mark.parametrize("data", [b"", b"\x00" * 8, b"hello, server, this is no message", b"\xff" * 64])
def test_noise_is_refused(data):
    with pytest.raises(WireError):
        decode_task(data)


def test_a_task_with_a_lying_header_is_refused():
    good = encode_task(train_task())
    assert good.count(b"[3,4") == 0
    lying = good.replace(b'\\"block.0.q\\",3,4', b'\\"block.0.q\\",3,9')
    assert lying != good
    with pytest.raises(WireError, match="damaged on its way"):
        decode_task(lying)
    lying = sealed(lying[16:])
    with pytest.raises(WireError, match="expected float32"):
        decode_task(lying)


@pytest.mark.parametrize("slots", [10**13, -4])
def test_a_fold_with_a_lying_header_takes_no_memory(slots):
    bank = random_adapter(3, 4)
    task = dataclasses.replace(train_task(), folds=Folds(0, [bank]))
    meaning, tensors = wire._decode(encode_task(task))
    for row in meaning["folds"]["modules"][0]:
        row[4] = slots
    with pytest.raises(WireError):
        decode_task(wire._encode(meaning, tensors))
