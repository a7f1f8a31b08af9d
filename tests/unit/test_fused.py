"""Several clients in one pass: the same result as one after the other, whatever differs between them."""

from __future__ import annotations

import dataclasses
import math
import weakref

import pytest
import torch

from polyrank.adapter import Adapter, full_mask, num_slots, prefix_mask, restrict
from polyrank.client import answer_together
from polyrank.engine.embedded import EmbeddedEngine, groups
from polyrank.fused import Shares, add_padded, add_products, own_heads, stack_factors
from polyrank.gate import decode_update
from polyrank.lowrank import installed
from polyrank.messages import Ballot, Training, TrainTask
from polyrank.models.load import read_head
from polyrank.models.prefix import PrefixCache, can_skip
from polyrank.models.targets import resolve_targets
from polyrank.session import ClientEnv, Trained, train, train_together
from polyrank.wire import WireError, encode_task
from tests.builders import largest_difference, random_adapter
from tests.conftest import SPEAKERS, tiny_model, tiny_speaker
from tests.unit.test_client import prompts, tokens
from tests.unit.test_round import federation

MIXED = {"c0": 3, "c1": 1, "c2": 2, "c3": 3}
UNEQUAL = {"local_epochs": 2, "local_steps": None}
SETTINGS = {
    "clipped": {"clip_norm": 1e-4, "learning_rate": 300.0},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.1},
    "B alone": {"factors": "B"},
    "epochs of unequal length": UNEQUAL,
    "unequal, and still moving": {**UNEQUAL, "momentum": 0.9, "weight_decay": 0.1},
    "self-pruning": {"prune_keep": 0.5, "prune_penalty": 3.0},
}


@pytest.fixture(params=["classification", "causal_lm"])
def model(request):
    return tiny_model() if request.param == "classification" else tiny_speaker()


def cohort(model, form="lora", only="", frozen=False, **settings):
    """Tasks and clients of unequal rank, data and number of modules."""
    shapes = resolve_targets(model.network, model.blocks, "attention")
    shapes = {name: shape for name, shape in shapes.items() if name.endswith(only)}
    bank = random_adapter(3, 3, form, shapes)
    given = {"local_steps": 3, "batch_size": 4, "learning_rate": 0.1, "optimizer": "sgd", **settings}
    training = Training(**given)
    tasks, environments = [], []
    for number, (client, rank) in enumerate(MIXED.items()):
        held = {name: bits.clone() for name, bits in prefix_mask(bank, rank).items()}
        if number == 1:  # this one has a module less
            held[next(iter(held))][:] = False
        seen = full_mask(bank) if frozen else held
        adapter = restrict(bank, seen)
        head = {name: t + 0.01 * number for name, t in read_head(model).items()}
        tasks.append(TrainTask(0, client, 7 + number, seen, held, adapter, head, training))
        draw = tokens if model.task == "classification" else prompts
        environments.append(ClientEnv(model, draw(5 + 3 * number, seed=number)))
    return tasks, environments


def apart(ours, alone):
    heads = max((float((ours.head[n] - t).abs().max()) for n, t in alone.head.items()), default=0.0)
    return max(heads, largest_difference(ours.adapter, alone.adapter))


@pytest.mark.parametrize("form", ["lora", "svd"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_fused_equals_one_by_one(model, form, settings):
    tasks, environments = cohort(model, form, **settings)
    together = train_together(tasks, environments)
    moved = 0.0
    for task, env, ours in zip(tasks, environments, together, strict=True):
        alone = train(task, env)
        assert apart(ours, alone) < 1e-5
        assert {n: bits.tolist() for n, bits in ours.mask.items()} == {
            n: bits.tolist() for n, bits in alone.mask.items()
        }
        assert ours.metrics["steps"] == alone.metrics["steps"]
        assert math.isclose(ours.metrics["loss"], alone.metrics["loss"], rel_tol=1e-5)
        if settings.get("prune_keep") is None:
            start = restrict(task.adapter, {n: bits[task.mask[n]] for n, bits in task.trained.items()})
            moved = max(moved, largest_difference(ours.adapter, start))
    assert settings.get("prune_keep") is not None or moved > 1e-4


@pytest.mark.parametrize("form", ["lora", "svd"])
def test_fused_equals_one_by_one_with_adam(model, form):
    """Adam divides a gradient by its own size, so the factors compared are those whose gradient is no
    rounding noise: in this model that leaves out queries and keys."""
    only = "value" if model.task == "classification" else "v_proj"
    tasks, environments = cohort(model, form, only, optimizer="adamw", learning_rate=0.01)
    for ours, task, env in zip(train_together(tasks, environments), tasks, environments, strict=True):
        assert apart(ours, train(task, env)) < 1e-5


@pytest.mark.parametrize("family", ["bert", "albert", "deberta", "gpt2", "llama", "roberta"])
def test_fused_equals_one_by_one_on_every_path(family):
    fused_is_one_by_one(tiny_model(family))


@pytest.mark.parametrize("speaker", SPEAKERS)
def test_fused_equals_one_by_one_for_every_language_model(speaker):
    fused_is_one_by_one(tiny_speaker(speaker))


def fused_is_one_by_one(model):
    tasks, environments = cohort(model, frozen=True)
    for ours, task, env in zip(train_together(tasks, environments), tasks, environments, strict=True):
        assert apart(ours, train(task, env)) < 1e-5


def test_fused_from_a_stored_prefix(model, tmp_path):
    model = dataclasses.replace(model, skips=can_skip(model))
    assert model.skips
    cache = PrefixCache(tmp_path, 10**8)
    tasks, environments = cohort(model)
    upper = f"{model.blocks[-1]}."
    tasks = [
        dataclasses.replace(
            task,
            mask={n: bits & n.startswith(upper) for n, bits in task.mask.items()},
            trained={n: bits & n.startswith(upper) for n, bits in task.trained.items()},
            adapter=Adapter("lora", {n: f for n, f in task.adapter.modules.items() if n.startswith(upper)}),
        )
        for task in tasks
    ]
    stored = [dataclasses.replace(env, prefix=cache) for env in environments]
    for ours, task, env in zip(train_together(tasks, stored), tasks, environments, strict=True):
        assert apart(ours, train(task, env)) < 1e-5
    assert cache.statistics()["fills"] == len(tasks)


def test_one_client_that_explodes_leaves_the_others_alone():
    model = tiny_model()
    tasks, environments = cohort(model)
    broken = {n: torch.full_like(t, math.nan) for n, t in tasks[1].head.items()}
    tasks[1] = dataclasses.replace(tasks[1], head=broken)
    requests = [encode_task(task) for task in tasks]
    answers = answer_together([*requests, b"no task"], [*environments, environments[0]])
    assert str(answers[1]) == "loss is nan at local step 1"
    assert isinstance(answers[4], WireError)
    for place in (0, 2, 3):
        ours = decode_update(answers[place], tasks[place])
        assert apart(ours, train(tasks[place], environments[place])) < 1e-5


def test_who_draws_random_numbers_trains_alone(model):
    tasks, environments = cohort(model, adapter_dropout=0.3)
    answers = answer_together([encode_task(task) for task in tasks], environments)
    for answer, task, env in zip(answers, tasks, environments, strict=True):
        assert apart(decode_update(answer, task), train(task, env)) == 0


@pytest.mark.parametrize("fuse", [2, 3, 8])
def test_a_fused_round_is_the_round(fuse):
    from polyrank.round import federated_round

    fed, state = federation()
    alone, _ = federated_round(fed, state)
    engine = EmbeddedEngine(fed.engine.engine.environments, fuse)
    fused, record = federated_round(dataclasses.replace(fed, engine=engine), state)
    assert largest_difference(fused.adapter, alone.adapter) < 1e-5
    assert [reply.client for reply in record.replies] == ["c0", "c1", "c2", "c3"]


def test_too_little_memory_for_a_group_is_no_failure(monkeypatch):
    from polyrank.engine import embedded

    sizes, filled = [], []

    def scarce(requests, environments):
        sizes.append(len(requests))
        assert not filled or filled[-1]() is None  # the next try has the room
        batch = torch.zeros(9)
        filled.append(weakref.ref(batch))
        if len(requests) > 1:
            raise torch.OutOfMemoryError("too much")
        return answer_together(requests, environments)

    monkeypatch.setattr(embedded, "answer_together", scarce)
    tasks, environments = cohort(tiny_model())
    engine = EmbeddedEngine(dict(zip(MIXED, environments, strict=True)), 4)
    answers = list(engine.exchange((task.client, encode_task(task)) for task in tasks))
    assert sizes == [4, 1, 1, 1, 1]
    assert all(answer.error is None for answer in answers)


def test_shares_of_a_ragged_batch():
    shares = Shares()
    shares.begin([[2, 3], [], [4]])
    assert shares.of(3, 3) == [2, 0, 1]  # texts
    assert shares.of(9, 3) == [5, 0, 4]  # tokens
    assert shares.of(12, 3) == [8, 0, 4]  # with padding
    rows = torch.arange(18.0).view(9, 2)
    spread = shares.spread(rows, [5, 0, 4])
    assert spread.shape == (3, 5, 2)
    assert torch.equal(spread[0], rows[:5])
    assert torch.equal(spread[2, :4], rows[5:])
    assert torch.equal(shares.join(spread, [5, 0, 4]), rows)


@pytest.mark.parametrize("form", ["lora", "svd"])
@pytest.mark.parametrize("lengths", [[[2, 3], [], [4]], [[2], [2], [2]], [[7]]])
def test_products_client_by_client_and_padded_are_the_same(form, lengths):
    count, rows = len(lengths), sum(map(sum, lengths))
    shares, draw = Shares(), torch.Generator().manual_seed(3)
    shares.begin(lengths)
    shapes = [(rows, 5), (rows, 6), (count, 5, 2), (count, 2), (count, 2, 6)]
    values = [torch.randn(*s, generator=draw, dtype=torch.float64, requires_grad=True) for s in shapes]
    if form == "lora":
        values[3] = None
    first, second = (add(*values, 0.7, shares) for add in (add_products, add_padded))
    assert torch.allclose(first, second, atol=1e-12)
    place = torch.randn(rows, 5, generator=draw, dtype=torch.float64)
    needed = [value for value in values if value is not None]
    gradients = [torch.autograd.grad(out, needed, place) for out in (first, second)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    own = torch.tensor([client for client, texts in enumerate(lengths) for _ in range(sum(texts))])
    y, x, B, e, A = values
    for row, client in enumerate(own):
        held = A[client] @ x[row] if e is None else e[client] * (A[client] @ x[row])
        assert torch.allclose(first[row], y[row] + 0.7 * B[client] @ held)


def test_stacked_factors_end_in_zeros():
    bank = random_adapter(3, 3, "svd", {"m": (4, 5)}).modules["m"]
    small = restrict(Adapter("svd", {"m": bank}), {"m": torch.tensor([True, False, False])}).modules["m"]
    stacked = stack_factors([bank, None, small])
    shapes = {part: tuple(t.shape) for part, t in stacked.items()}
    assert shapes == {"B": (3, 4, 3), "e": (3, 3), "A": (3, 3, 5)}
    assert torch.equal(stacked["B"][0], bank.B)
    assert float(stacked["A"][1].abs().max()) == 0
    assert float(stacked["B"][2, :, 1:].abs().max()) == 0


def test_groups_follow_the_order_of_the_requests_alone():
    requests = [(str(i), b"") for i in range(5)]
    found = [[client for client, _ in group] for group in groups(iter(requests), 2)]
    assert found == [["0", "1"], ["2", "3"], ["4"]]


@pytest.mark.parametrize("kind", ["fedara", "adalora"])
def test_everybody_votes_for_a_number_of_its_own(kind):
    model = tiny_model()
    tasks, environments = cohort(model, form="svd")
    tasks = [
        dataclasses.replace(task, ballot=Ballot(2 + place, "sensitivity", 0.85, kind == "adalora"))
        for place, task in enumerate(tasks)
    ]
    together = train_together(tasks, environments)
    for place, (task, env, one) in enumerate(zip(tasks, environments, together, strict=True)):
        (alone,) = train_together([task], [env])
        assert largest_difference(one.adapter, alone.adapter) < 1e-5
        if kind == "fedara":
            assert num_slots(one.votes) == 2 + place
            assert all(torch.equal(one.votes[n], bits) for n, bits in alone.votes.items())
        else:
            assert sum(int((f.e != 0).sum()) for f in one.adapter.modules.values()) == 2 + place


def test_a_slot_that_adalora_masks_may_come_back():
    model = tiny_model()
    (task, *_), (env, *_) = cohort(model, "svd", optimizer="adamw", learning_rate=0.05, batch_size=1)
    start = {n: dataclasses.replace(f, e=torch.zeros_like(f.e)) for n, f in task.adapter.modules.items()}
    task = dataclasses.replace(
        task, adapter=Adapter("svd", start), ballot=Ballot(3, "sensitivity", 0.85, masks=True)
    )

    def kept(steps):
        after = dataclasses.replace(task, training=task.training.model_copy(update={"local_steps": steps}))
        modules = train(after, env).adapter.modules
        return torch.cat([factors.e != 0 for factors in modules.values()])

    by_steps = [kept(steps) for steps in (1, 6, 12)]
    assert all(int(held.sum()) == 3 for held in by_steps)
    assert not all(torch.equal(held, by_steps[0]) for held in by_steps)
    first = torch.arange(len(by_steps[0])) < 3
    assert not torch.equal(by_steps[0], first)  # what no gradient spoke for goes by its place


def test_what_does_not_train_gets_no_gradient():
    model = tiny_model()
    tasks, _ = cohort(model)
    shares, training = Shares(), tasks[0].training.model_copy(update={"factors": "B"})
    starts = [task.adapter for task in tasks]
    heads = [task.head for task in tasks]
    with (
        installed(model.network, starts, shares=shares) as layers,
        own_heads(model.network, model.head_modules, heads, shares) as own,
    ):
        chosen = Trained(layers, own, starts, shares).parameters(training)
        assert len(chosen) == len(layers) + len(own)
        assert not any(layer.A.requires_grad for layer in layers.values())
        assert all(p.requires_grad for p in chosen)


def test_who_may_share_a_pass():
    from polyrank.client import _group

    model = tiny_model()
    (first, second, *_), (env, *_) = cohort(model)
    assert _group(0, first, env) == _group(1, second, env)
    asked = dataclasses.replace(second, ballot=Ballot(3, "sensitivity", 0.85))
    assert _group(0, first, env) != _group(1, asked, env)
    fewer = dataclasses.replace(first, ballot=Ballot(2, "sensitivity", 0.85))
    assert _group(0, fewer, env) == _group(1, asked, env)
    within = f"{model.blocks[0]}.output.dense"  # a trained layer there would see packed rows
    below = "bert.embeddings.position_embeddings"  # one there gets positions alone, the same for all texts
    for layer in (within, below):
        apart_ = dataclasses.replace(
            env, model=dataclasses.replace(model, head_modules=[layer, "classifier"])
        )
        assert _group(0, first, apart_) != _group(1, second, apart_)
