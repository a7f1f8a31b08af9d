"""What the methods need of a round: frozen slots, one factor at a time, self-pruning, folds, scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from polyrank.adapter import Adapter, Draw, Factors, delta_weight, full_mask, num_slots, prefix_mask, restrict
from polyrank.aggregation import Anchored, NormWeighted, ReplicationPadding, Stacking, ZeroPadding
from polyrank.allocation import LossBased, RandomSlotChoice, Tiers, Uniform
from polyrank.checkpoint import load_state, save_state
from polyrank.client import catch_up, keep_up
from polyrank.collect import Failures
from polyrank.config import make_config
from polyrank.errors import RunError
from polyrank.evaluation import predict
from polyrank.export import served_adapter
from polyrank.lowrank import installed
from polyrank.messages import Folds, Training
from polyrank.models.load import write_head
from polyrank.recipes import recipes
from polyrank.round import drawn_as, federated_round, make_task
from polyrank.sampling import SampleCount
from polyrank.session import ClientEnv, ClientError, _tail_norm, train
from polyrank.state import Capacity, ClientRecord
from polyrank.wire import decode_task, encode_task
from tests.builders import largest_difference, random_adapter
from tests.conftest import tiny_model
from tests.unit.test_client import task_for, tokens
from tests.unit.test_round import federation


def shapes_of(adapter):
    return {name: (f.B.shape[0], f.A.shape[1]) for name, f in adapter.modules.items()}


def two_tiers(low=1, high=3):
    return Tiers(tiers=[{"rank": low, "share": 0.5}, {"rank": high, "share": 0.5}])


def rounds(fed, state, count):
    records = []
    for _ in range(count):
        state, record = federated_round(fed, state)
        records.append(record)
    return state, records


@pytest.mark.parametrize("name", recipes())
def test_every_method_runs_and_moves_the_model(name):
    config = make_config({"method": name})
    fed, state = federation(form=config.adapter.form)
    shrink = {"tiers": two_tiers(), "loss_based": LossBased(low_rank=1, high_rank=3, high_share=0.5)}
    allocation = shrink.get(config.allocation.kind, config.allocation)
    if isinstance(allocation, RandomSlotChoice):
        allocation = RandomSlotChoice(rank=2)
    training = config.training.model_copy(update={"local_steps": 2, "batch_size": 3})
    voting = config.voting and config.voting.model_copy(update={"target_rank": 2.0})
    fed = dataclasses.replace(
        fed,
        allocation=allocation,
        aggregation=config.aggregation,
        training=training,
        untrained=config.adapter.untrained,
        voting=voting,
        validate=lambda state, update: update.metrics["last_loss"],
    )
    if config.fleet is not None:  # devices are known to be equal
        known = ClientRecord(capacity=Capacity(1.0, 1.0, 0.1, 0.001, max_depth=2))
        state = dataclasses.replace(state, clients=dict.fromkeys(state.clients, known))
    after, records = rounds(fed, state, 3)
    assert sum(reply.bytes_up for record in records for reply in record.replies) == fed.engine.up
    assert all(reply.error is None for record in records for reply in record.replies)
    dropped = num_slots(after.active) < num_slots(state.active)
    assert dropped == (voting is not None and voting.kind == "fedara")
    moved = served_adapter(after)
    reached = {name: float(delta_weight(f).abs().max()) > 0 for name, f in moved.modules.items()}
    top = [name for name in reached if name.startswith("bert.encoder.layer.1.")]
    assert {n for n, there in reached.items() if there} == set(top if name == "fedadapter" else reached)
    assert all(torch.isfinite(delta_weight(f)).all() for f in moved.modules.values())
    assert all(0 <= record.aggregation_error < 2 for record in records)


def test_frozen_slots_take_part_and_do_not_move():
    model = tiny_model()
    task = task_for(model)
    bank = random_adapter(
        3, 2, shapes={n: (f.B.shape[0], f.A.shape[1]) for n, f in task.adapter.modules.items()}
    )
    one = prefix_mask(bank, 1)
    env = ClientEnv(model, tokens(12))
    head = task.head
    frozen = train(dataclasses.replace(task, adapter=bank, trained=one), env)
    absent = train(
        dataclasses.replace(task, adapter=restrict(bank, one), mask=one, trained=one, head=head), env
    )
    assert {f.rank for f in frozen.adapter.modules.values()} == {1}
    assert num_slots(frozen.mask) == num_slots(one)
    assert largest_difference(frozen.adapter, absent.adapter) > 1e-4  # the frozen slots changed the gradients
    with torch.no_grad():
        write_head(model, head)
        with installed(model.network, [bank]):
            both = predict(model, env.train, 4)
        write_head(model, head)
        rest = {name: ~held for name, held in one.items()}
        with installed(model.network, [restrict(bank, one)], 0.0, [restrict(bank, rest)]):
            split = predict(model, env.train, 4)
        with installed(model.network, [Adapter("lora", {})], 0.0, [bank]):
            alone = predict(model, env.train, 4)
    assert torch.allclose(both, split, atol=1e-5)
    assert torch.allclose(both, alone, atol=1e-5)


@pytest.mark.parametrize(("factors", "moves", "stays"), [("B", "B", "A"), ("A", "A", "B")])
@pytest.mark.parametrize("form", ["lora", "svd"])
def test_one_factor_trains_and_travels(factors, moves, stays, form):
    fed, state = federation(form=form)
    bank = random_adapter(
        4, 3, form, {n: (f.B.shape[0], f.A.shape[1]) for n, f in state.adapter.modules.items()}
    )
    state = dataclasses.replace(state, adapter=bank)
    federated_round(fed, state)
    up_of_both = fed.engine.up
    fed, _ = federation(training=Training(local_steps=2, batch_size=3, learning_rate=0.01, factors=factors))
    assert make_task(fed, state, full_mask(bank), "c0").drawn is None  # A is not as drawn: it travels
    fed = dataclasses.replace(fed, training=fed.training.model_copy(update={"factors": "alternate"}))
    after, _ = federated_round(fed, dataclasses.replace(state, round=0 if factors == "B" else 1))
    assert fed.engine.up < 0.75 * up_of_both
    for name, before in bank.modules.items():
        assert torch.allclose(
            after.adapter.modules[name].tensors()[stays], before.tensors()[stays], atol=1e-6
        )
        assert not torch.allclose(after.adapter.modules[name].tensors()[moves], before.tensors()[moves])


@pytest.mark.parametrize("form", ["lora", "svd"])
def test_an_a_that_never_changes_travels_as_its_seed(form):
    fed, state = federation(
        form=form, training=Training(local_steps=2, factors="B"), allocation=Uniform(rank=2)
    )
    mask = fed.allocation.allocate(state, ["c0"])["c0"]
    data = encode_task(make_task(fed, state, mask, "c0", drawn=drawn_as(fed, state)))
    again = decode_task(data)
    assert largest_difference(again.adapter, restrict(state.adapter, mask)) == 0
    plain = dataclasses.replace(fed, training=Training(local_steps=2))
    assert len(data) < 0.8 * len(encode_task(make_task(plain, state, mask, "c0")))


class Recording:
    """An engine that remembers the requests that pass through it."""

    def __init__(self, engine):
        self.engine, self.seen, self.fuse, self.pause_s = engine, [], engine.fuse, engine.pause_s

    def clients(self):
        return self.engine.clients()

    def exchange(self, requests):
        self.seen = list(requests)
        return self.engine.exchange(self.seen)


def test_a_rule_that_dilutes_cannot_move_an_a_that_never_changes():
    training = Training(local_steps=2, batch_size=3, learning_rate=0.01, factors="B")
    fed, state = federation(training=training, aggregation=ZeroPadding(), allocation=two_tiers())
    after, _ = rounds(fed, state, 3)
    for name, before in state.adapter.modules.items():
        assert torch.equal(after.adapter.modules[name].A, before.A)
    assert drawn_as(fed, after) == Draw(state.seed)
    requests = Recording(fed.engine)
    federated_round(dataclasses.replace(fed, engine=requests), after)
    assert all(decode_task(request).drawn == Draw(state.seed) for _, request in requests.seen)


def test_a_client_that_did_not_prune_may_grow():
    training = Training(local_steps=1, batch_size=3, prune_keep=0.9)
    policy = LossBased(low_rank=1, high_rank=3, high_share=0.5, score="client")
    fed, state = federation(training=training, allocation=policy, aggregation=ReplicationPadding())
    _, records = rounds(fed, state, 2)
    assert {reply.slots for reply in records[1].replies} == {6, 18}


def test_a_client_that_holds_more_than_it_trains_may_grow():
    """Frozen slots beside the trained ones are no slots that it gave up."""
    policy = LossBased(low_rank=1, high_rank=3, high_share=0.5, score="client")
    fed, state = federation(allocation=policy, aggregation=ReplicationPadding(), untrained="frozen")
    after, records = rounds(fed, state, 2)
    assert {record.rank_limit for record in after.clients.values()} == {None}
    assert {num_slots(learned.mask) for learned in records[1].learned} == {6, 18}


def test_what_self_pruning_measures_is_on_the_device_of_the_factors():
    far = {"q": Factors(torch.zeros(4, 2, device="meta"), torch.zeros(2, 4, device="meta"), 1.0)}
    assert _tail_norm(Adapter("lora", far), Training(prune_keep=0.5)).device.type == "meta"
    assert float(_tail_norm(Adapter("lora", {}), Training(prune_keep=0.5))) == 0


def test_what_self_pruning_measures_counts_the_sizes_of_slots():
    parts = {"B": torch.ones(4, 2), "A": torch.ones(2, 4)}
    for e, norm in ((None, 4.0), (torch.tensor([9.0, 0.5]), 2.0), (torch.zeros(2), 0.0)):
        adapter = Adapter("lora" if e is None else "svd", {"q": Factors(**parts, scale=1.0, e=e)})
        assert float(_tail_norm(adapter, Training(prune_keep=0.5))) == norm


def test_self_pruning_shortens_a_client_for_good():
    training = Training(local_steps=2, batch_size=3, learning_rate=0.01, prune_keep=0.67, prune_penalty=50.0)
    fed, state = federation(training=training, aggregation=NormWeighted())
    state = dataclasses.replace(state, adapter=random_adapter(3, 3, shapes=shapes_of(state.adapter)))
    after, records = rounds(fed, state, 2)
    first, second = ({reply.slots for reply in record.replies} for record in records)
    assert (first, second) == ({18}, {12})
    assert {record.rank_limit for record in after.clients.values()} == {1}  # 3 -> 2 -> 1
    assert all({int(held.sum()) for held in learned.mask.values()} == {2} for learned in records[0].learned)
    kept = dataclasses.replace(fed, training=training.model_copy(update={"prune_penalty": 0.0}))
    grown = dataclasses.replace(state, adapter=federation()[1].adapter)  # B = 0: no tail can shrink
    assert {reply.slots for reply in rounds(kept, grown, 2)[1][1].replies} == {18}


def test_stacking_brings_every_client_the_folds_it_missed_once():
    fed, state = federation(aggregation=Stacking(), allocation=two_tiers(), sampling=SampleCount(count=2))
    after, records = rounds(fed, state, 4)
    assert len(after.folds) == 4
    seen = dict.fromkeys(after.clients, 0)
    for number, record in enumerate(records):
        for reply in record.replies:
            assert reply.error is None
            seen[reply.client] = number
    assert {c: r.folds for c, r in after.clients.items()} == seen  # folds 0 .. n-1 came with round n's task
    env = fed.engine.engine.environments["c0"]
    base = tiny_model()
    for fold in after.folds:
        catch = [fold.modules[name] for name in fold.modules]
        assert {f.rank for f in catch} <= {2, 4, 6}
    catch_up(base, [], Folds(0, after.folds))
    catch_up(env.model, [], Folds(0, after.folds))
    for name in after.adapter.modules:
        one, two = (m.network.get_submodule(name).weight for m in (base, env.model))
        assert torch.equal(one, two)  # each fold once, in order


def test_a_missing_or_changed_fold_is_found_out():
    model = tiny_model()
    shapes = dict.fromkeys([f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)], (16, 16))
    folds = [random_adapter(i, 2, shapes=shapes) for i in range(3)]
    received = []
    catch_up(model, received, Folds(0, folds[:1]))
    catch_up(model, received, Folds(0, folds[:1]))
    assert len(model.folded) == len(received) == 1
    with pytest.raises(ClientError, match="folds 1 to 1 never came"):
        catch_up(model, received, Folds(2, folds[2:]))
    with pytest.raises(ClientError, match="fold 0 is not the one that came before"):
        catch_up(model, received, Folds(0, folds[1:2]))
    other = []
    with pytest.raises(ClientError, match="the base model holds 1 folds, this client 0"):
        catch_up(model, other, Folds())
    keep_up(model, folds)
    assert len(model.folded) == 3
    keep_up(model, folds)
    assert len(model.folded) == 3
    with pytest.raises(ClientError, match="the base model holds 3 folds"):
        keep_up(model, folds[:2])


def test_a_client_that_lost_its_folds_gets_them_again():
    fed, state = federation(aggregation=Stacking())
    state, _ = rounds(fed, state, 2)
    fresh, _ = federation(aggregation=Stacking())  # as after a restart: every device is empty again
    after, record = federated_round(fresh, state)  # asked again, they get them in the same round
    assert [(r.client, r.attempt) for r in record.replies if r.error is None] == [
        (f"c{i}", 1) for i in range(4)
    ]
    fresh, _ = federation(aggregation=Stacking(), failures=Failures(quorum=0, retries=0))
    with pytest.raises(RunError, match="MissingFoldsError: folds 0 to 0 never came"):
        federated_round(fresh, state)
    engine = fresh.engine.engine
    engine.environments["c0"].folds.extend(fed.engine.engine.environments["c0"].folds[:1])
    engine.environments["c0"].model.folded.extend(fed.engine.engine.environments["c0"].folds[:1])
    after, record = federated_round(fresh, state)
    assert [r.client for r in record.replies if r.error is None] == ["c0"]
    assert {c: r.folds for c, r in after.clients.items()} == {"c0": 2, "c1": 0, "c2": 0, "c3": 0}
    _, record = federated_round(fresh, after)
    assert all(reply.error is None for reply in record.replies)


@pytest.mark.parametrize("form", ["lora", "svd"])
def test_the_served_adapter_is_all_folds_and_the_bank(form):
    fed, state = federation(aggregation=Stacking(), form=form)
    after, _ = rounds(fed, state, 3)
    served = served_adapter(after)
    for name, factors in served.modules.items():
        expected = sum(delta_weight(fold.modules[name]) for fold in after.folds)
        expected = expected + delta_weight(after.adapter.modules[name])
        assert factors.rank <= 16
        assert float((delta_weight(factors) - expected).abs().max()) < 1e-5


def test_a_state_comes_back_from_disk(tmp_path):
    fed, state = federation(aggregation=Stacking(), form="svd")
    after, _ = rounds(fed, state, 2)
    save_state(after, tmp_path / "s.safetensors")
    again = load_state(tmp_path / "s.safetensors")
    assert largest_difference(again.adapter, after.adapter) == 0
    assert again.clients == after.clients
    assert len(again.folds) == 2
    assert largest_difference(again.folds[1], after.folds[1]) == 0
    assert (again.round, again.seed) == (2, 0)
    assert all(torch.equal(again.head[name], t) for name, t in after.head.items())


@pytest.mark.parametrize("score", ["server", "client"])
def test_loss_based_scores_everybody_and_aggregates_the_cohort(score):
    losses = {"c0": 0.3, "c1": 0.1, "c2": 0.2, "c3": 0.4}
    fed, state = federation(
        sampling=SampleCount(count=2),
        allocation=LossBased(low_rank=1, high_rank=3, high_share=0.5, score=score),
        aggregation=ReplicationPadding(),
        validate=lambda state, update: losses[update.client],
    )
    after, record = federated_round(fed, state)
    assert len(record.replies) == 4
    assert len(record.learned) == 2
    assert {reply.slots for reply in record.replies} == {6}
    if score == "server":
        assert {c: r.loss for c, r in after.clients.items()} == losses
        assert fed.allocation.best(after) == {"c1", "c2"}
    else:
        told = {r.client: r.learned.metrics["loss"] for r in record.replies}
        assert {c: r.loss for c, r in after.clients.items()} == told
    _, second = federated_round(fed, after)
    assert len(second.replies) == 2
    best = fed.allocation.best(after)
    assert {r.client: r.slots for r in second.replies} == {
        r.client: 18 if r.client in best else 6 for r in second.replies
    }


def test_mixed_ranks_move_only_what_was_held():
    fed, state = federation(allocation=two_tiers(1, 2), aggregation=Anchored(space="factor"))
    after, _ = federated_round(fed, state)
    for name, factors in after.adapter.modules.items():
        assert torch.equal(factors.A[2], state.adapter.modules[name].A[2])
        assert not torch.equal(factors.B[:, 1], state.adapter.modules[name].B[:, 1])
