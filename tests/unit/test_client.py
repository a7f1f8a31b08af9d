"""The client: what it trains, what it leaves alone, and what stops it."""

from __future__ import annotations

import dataclasses
from itertools import chain

import numpy as np
import pytest
import torch

from polyrank.adapter import full_mask, new_adapter, restrict
from polyrank.client import answer_together, handle
from polyrank.data.tokens import Tokens
from polyrank.engine.embedded import EmbeddedEngine
from polyrank.messages import EvaluateTask, Training, TrainTask
from polyrank.models.load import read_head
from polyrank.models.targets import resolve_targets
from polyrank.session import ClientEnv, ClientError, batches, train
from polyrank.wire import WireError, encode_task
from tests.builders import largest_difference
from tests.conftest import tiny_model, tiny_speaker


def tokens(count, seed=0, classes=3, longest=9):
    """Random examples of unequal length whose label can be read off their ids."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(3, longest, count)
    labels = draw.integers(0, classes, count)
    rows = [draw.integers(10, 30, n) + 20 * y for n, y in zip(lengths, labels, strict=True)]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Tokens(np.concatenate(rows).astype(np.int32), None, starts, labels.astype(np.int64), 0)


def prompts(count, seed=0):
    """The same with no label but a response, which begins anywhere after the first token."""
    data = tokens(count, seed)
    draw = np.random.default_rng(seed + 100)
    return dataclasses.replace(data, responses=draw.integers(1, data.lengths))


def task_for(model, form="lora", only="", **training):
    shapes = resolve_targets(model.network, model.blocks, "attention")
    shapes = {name: shape for name, shape in shapes.items() if name.endswith(only)}
    adapter = new_adapter(shapes, form=form, rank=2, scale=2.0, seed=0)
    settings = Training(**{"local_steps": 4, "batch_size": 4, "learning_rate": 0.02, **training})
    return TrainTask(0, "c", 11, full_mask(adapter), full_mask(adapter), adapter, read_head(model), settings)


@pytest.mark.parametrize("form", ["lora", "svd"])
def test_training_learns_and_leaves_the_base_alone(family, form):
    model = tiny_model(family)
    task = task_for(model, form, local_steps=30)
    frozen = {n: p.clone() for n, p in model.network.named_parameters() if n not in task.head}
    update = train(task, ClientEnv(model, tokens(16)))
    assert update.metrics["steps"] == 30
    assert update.metrics["last_loss"] < 1.05
    assert largest_difference(update.adapter, task.adapter) > 1e-3
    after = dict(model.network.named_parameters())
    assert all(torch.equal(after[name], before) for name, before in frozen.items())
    assert not any(p.requires_grad for p in after.values())


def test_sessions_do_not_leak_into_each_other():
    model = tiny_model()
    env, task = ClientEnv(model, tokens(16)), task_for(model, adapter_dropout=0.3, base_dropout=True)
    first = train(task, env)
    train(dataclasses.replace(task, seed=5), env)
    torch.manual_seed(123)
    again = train(task, env)
    assert largest_difference(first.adapter, again.adapter) == 0
    assert not model.network.training


def test_dropout_and_seed_matter():
    model = tiny_model()
    env, task = ClientEnv(model, tokens(16)), task_for(model)
    plain = train(task, env)
    dropped = train(
        dataclasses.replace(task, training=task.training.model_copy(update={"adapter_dropout": 0.5})), env
    )
    other = train(dataclasses.replace(task, seed=5), env)
    assert largest_difference(plain.adapter, dropped.adapter) > 0
    assert largest_difference(plain.adapter, other.adapter) > 0


def test_one_sgd_step_by_hand():
    """With B = 0 the first step moves B by lr * gradient and cannot move A."""
    model = tiny_model()
    data = tokens(4)
    task = task_for(model, optimizer="sgd", local_steps=1, clip_norm=0.0, learning_rate=0.5)
    update = train(task, ClientEnv(model, data))
    from polyrank.lowrank import installed

    with installed(model.network, [task.adapter]) as layers:
        order = next(iter(batches(4, task.training, task.seed)))
        inputs, labels = data.batch(order, model.device)
        model.network.load_state_dict(dict(task.head), strict=False)
        torch.nn.functional.cross_entropy(model.network(**inputs).logits, labels).backward()
        for name, layer in layers.items():
            moved = update.adapter.modules[name]
            assert torch.allclose(moved.B, -0.5 * layer.B.grad, atol=1e-7)
            assert torch.equal(moved.A, task.adapter.modules[name].A)


def test_clipping_bounds_the_step():
    model = tiny_model()
    env = ClientEnv(model, tokens(8))
    common = {"optimizer": "sgd", "local_steps": 1, "learning_rate": 1.0, "batch_size": 8}
    task = task_for(model, clip_norm=1e-3, **common)
    update = train(task, env)
    squares = sum(
        float((update.adapter.modules[n].tensors()[p] - t).square().sum())
        for n, f in task.adapter.modules.items()
        for p, t in f.tensors().items()
    ) + sum(float((update.head[n] - t).square().sum()) for n, t in task.head.items())
    assert squares**0.5 == pytest.approx(1e-3, rel=0.01)


def test_batches_cover_every_example_once_an_epoch():
    plan = list(batches(10, Training(batch_size=4, local_epochs=2), 0))
    assert [len(rows) for rows in plan] == [4, 4, 2, 4, 4, 2]
    assert sorted(chain(*plan[:3])) == sorted(chain(*plan[3:])) == list(range(10))
    assert plan[:3] != plan[3:]
    assert len(list(batches(10, Training(batch_size=4), 0))) == 3
    assert [len(rows) for rows in batches(3, Training(batch_size=4, local_steps=5), 0)] == [3] * 5


def test_a_loss_that_explodes_is_an_error_and_not_an_update():
    model = tiny_model()
    env = ClientEnv(model, tokens(8))
    task = task_for(model, optimizer="sgd", learning_rate=1e30, clip_norm=0.0, local_steps=6)
    with pytest.raises(ClientError, match="loss is (nan|inf) at local step"):
        handle(encode_task(task), env)
    (answer,) = EmbeddedEngine({"c": env}).exchange([("c", encode_task(task))])
    assert answer.payload is None
    assert answer.error.startswith("ClientError: loss is")
    assert not any(p.requires_grad for p in model.network.parameters())


def test_a_task_with_nothing_to_train_is_an_error_of_this_client_alone():
    model = tiny_speaker()
    whole = dataclasses.replace(task_for(model), head={})
    none = {name: torch.zeros_like(held) for name, held in whole.mask.items()}
    idle = dataclasses.replace(whole, mask=none, trained=none, adapter=restrict(whole.adapter, none))
    env = ClientEnv(model, prompts(6))
    first, second = answer_together([encode_task(idle), encode_task(whole)], [env, env])
    assert isinstance(first, ClientError)
    assert str(first) == "the task has nothing to train: no slot and no head"
    assert isinstance(second, bytes)


def test_requests_that_are_no_tasks():
    env = ClientEnv(tiny_model(), tokens(4))
    with pytest.raises(WireError):
        handle(b"no task", env)
    task = task_for(env.model)
    ask = EvaluateTask(0, "c", task.mask, task.adapter, task.head, 2)
    with pytest.raises(ClientError, match="keeps no examples aside"):
        handle(encode_task(ask), env)
