"""Laws of dynamic rank allocation (FedARA): budgets, votes, arbitration, bytes, what clients are asked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyrank.adapter import (
    Factors,
    block_numbers,
    full_mask,
    mask_minus,
    num_slots,
    over_bank,
    restrict,
    within,
)
from polyrank.aggregation import Anchored, LayerWise, ReplicationPadding
from polyrank.allocation import Legend, Uniform
from polyrank.assemble import prepare
from polyrank.engine.base import Engine
from polyrank.errors import RunError
from polyrank.gate import decode_update
from polyrank.importance import Scores, highest
from polyrank.messages import Training
from polyrank.round import federated_round, make_task
from polyrank.sampling import SampleCount
from polyrank.state import Capacity, ClientRecord
from polyrank.voting import Voting, best_slots, last_known, strongest, vote_shares
from polyrank.wire import WireError, encode_task, encode_update
from tests.builders import largest_difference, random_adapter, state_of
from tests.small_runs import small_config
from tests.unit.test_methods import rounds, two_tiers
from tests.unit.test_round import federation

EASY = Training(local_steps=2, batch_size=3, learning_rate=0.05)


def voting_federation(voting, count=6, **changes):
    given_ = {"form": "svd", "training": EASY, "rounds": count, "voting": voting, **changes}
    return federation(**given_)


def masks(draw, shapes):
    return {n: torch.tensor(draw(st.lists(st.booleans(), min_size=r, max_size=r))) for n, r in shapes.items()}


@given(
    st.floats(0.5, 6),
    st.integers(1, 40),
    st.sampled_from(["cubic", "linear"]),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
)
@settings(deadline=None)
def test_the_budget_falls_from_everything_to_its_target(target, count, schedule, warm, final):
    bank = random_adapter(0, 6, "svd")
    voting = Voting(target_rank=target, schedule=schedule, warmup_share=warm, final_share=final)
    budgets = [voting.budget(bank, round_, count) for round_ in range(count)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == round(target * 2)
    assert all(b == 12 for b in budgets[: int(warm * count)])


def test_the_budget_worked_by_hand():
    bank = random_adapter(0, 6, "svd")  # two modules, so 12 slots, and 4 in the end
    voting = Voting(target_rank=2, warmup_share=0.2, final_share=0.4)
    # 10 rounds: falls after 2 rounds over 4; x = 0, 0, 1/4, 1/2, 3/4, 1; left = 1, 27/64, 1/8, 1/64, 0
    assert [voting.budget(bank, t, 10) for t in range(10)] == [12, 12, 7, 5, 4, 4, 4, 4, 4, 4]


@given(st.data())
@settings(deadline=None)
def test_a_vote_comes_back_from_its_bits(data):
    held = masks(data.draw, {"a": 5, "b": 3})
    votes = {n: bits & masks(data.draw, {n: len(bits)})[n] for n, bits in held.items()}
    back = over_bank(within(votes, held), held)
    assert all(torch.equal(back[n], bits) for n, bits in votes.items())


def test_shares_worked_by_hand():
    held = [{"a": torch.tensor([True, True, False])}, {"a": torch.tensor([True, True, False])}]
    votes = [{"a": torch.tensor([True, False, False])}, {"a": torch.tensor([True, True, False])}]
    shares = vote_shares({"a": torch.ones(3, dtype=torch.bool)}, held, votes, [3.0, 1.0])["a"]
    assert shares[:2].tolist() == [1.0, 0.25]
    assert torch.isnan(shares[2])


@given(st.data(), st.sampled_from(["threshold", "top"]), st.integers(0, 9))
@settings(deadline=None)
def test_arbitration_only_shrinks_and_keeps_its_promise(data, arbitration, round_):
    bank = random_adapter(1, 4, "svd")
    voting = Voting(target_rank=1.5, arbitration=arbitration)
    active = masks(data.draw, {"block.0.q": 4, "block.1.q": 4})
    shares = {n: torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=4, max_size=4))) for n in active}
    after = voting.arbitrate(bank, active, shares, round_, 10)
    assert num_slots(mask_minus(after, active)) == 0
    budget, before = voting.budget(bank, round_, 10), num_slots(active)
    if arbitration == "top":
        assert num_slots(after) == min(budget, before)
    else:
        passed = sum(int((held & (shares[n] >= 0.5)).sum()) for n, held in active.items())
        assert num_slots(after) == max(passed, min(3, before))
        gone = mask_minus(active, after)
        if any(bool(bits.any()) for bits in gone.values()) and num_slots(after):
            worst_kept = min(float(shares[n][bits].min()) for n, bits in after.items() if bits.any())
            best_gone = max(float(shares[n][bits].max()) for n, bits in gone.items() if bits.any())
            assert worst_kept >= min(best_gone, 0.5)


def test_ties_go_to_the_larger_slot_and_what_nobody_has_trained_goes_first():
    bank = random_adapter(2, 3, "svd", {"a": (3, 3)})
    f = bank.modules["a"]
    f.e.copy_(torch.tensor([1.0, 100.0, 1e-3]))
    active = full_mask(bank)
    even = {"a": torch.tensor([0.5, 0.5, 0.5])}
    assert strongest(bank, active, even, 1)["a"].tolist() == [False, True, False]
    unheld = {"a": torch.tensor([0.9, 0.9, float("nan")])}
    assert strongest(bank, active, unheld, 1)["a"].tolist() == [False, False, True]  # as if all voted
    voting, some = Voting(target_rank=1), {"a": torch.tensor([0.4, 0.9, float("nan")])}
    assert voting.arbitrate(bank, active, some, 9, 10)["a"].tolist() == [False, True, True]
    f.e[2] = 0.0  # never trained
    assert strongest(bank, active, unheld, 2)["a"].tolist() == [True, True, False]
    assert voting.budget(bank, 2, 10) == 2
    assert voting.arbitrate(bank, active, some, 2, 10)["a"].tolist() == [False, True, True]  # there is room
    assert voting.arbitrate(bank, active, some, 9, 10)["a"].tolist() == [False, True, False]
    low = {"a": torch.tensor([0.1, 0.2, float("nan")])}  # the floor is filled by vote before that
    assert voting.arbitrate(bank, active, low, 9, 10)["a"].tolist() == [False, True, False]


def test_what_nobody_held_this_time_keeps_its_last_share():
    before = {"a": torch.tensor([0.2, 0.3, float("nan")])}
    now = {"a": torch.tensor([0.9, float("nan"), float("nan")]), "b": torch.tensor([float("nan")])}
    known = last_known(now, before)
    assert known["a"][:2].tolist() == pytest.approx([0.9, 0.3])
    assert torch.isnan(known["a"][2])
    assert torch.isnan(known["b"][0])


@given(st.data(), st.integers(0, 9))
@settings(deadline=None)
def test_a_client_is_asked_for_as_large_a_part_of_what_it_holds_as_all_are(data, round_):
    state = state_of(random_adapter(1, 6, "svd"), round_)
    state = dataclasses.replace(state, active=masks(data.draw, {"block.0.q": 6, "block.1.q": 6}))
    held = {n: bits & masks(data.draw, {n: 6})[n] for n, bits in state.active.items()}
    voting = Voting(target_rank=1)
    budget, active = voting.budget(state.adapter, round_, 10), num_slots(state.active)
    everything, own = voting.ballot(state, state.active, 10), voting.ballot(state, held, 10)
    if budget >= active:
        assert everything is own is None
        return
    assert everything.budget == budget
    assert own.budget == max(1, round(budget * num_slots(held) / active))
    if num_slots(held) > 1:
        assert own.budget < num_slots(held) or budget * num_slots(held) / active > num_slots(held) - 0.5


def unequal(arbitration, deep):
    """Four clients that go one block deep of two, but for so many, and vote."""
    voting = Voting(target_rank=1, arbitration=arbitration)
    fed, state = voting_federation(voting, count=8, allocation=Legend(), aggregation=LayerWise())
    records = {
        name: ClientRecord(capacity=Capacity(1, 0.01, 0.1, 0.001, 2 if place < deep else 1))
        for place, name in enumerate(state.clients)
    }
    return fed, dataclasses.replace(state, clients=records)


def by_block(mask):
    blocks = block_numbers(mask)
    return [sum(int(bits.sum()) for n, bits in mask.items() if blocks[n] == block) for block in (0, 1)]


@pytest.mark.parametrize("arbitration", ["threshold", "top"])
@pytest.mark.parametrize("deep", [1, 0])
def test_votes_of_shallow_clients_count(arbitration, deep):
    fed, state = unequal(arbitration, deep)
    budgets, sizes = [fed.voting.budget(state.adapter, t, 8) for t in range(8)], []
    for _ in range(8):
        state, _ = federated_round(fed, state)
        sizes.append(num_slots(state.active))
    if arbitration == "top":
        assert sizes == budgets
    else:
        assert budgets[-1] <= sizes[-1] <= 2 * budgets[-1]  # as far as a threshold of half can miss
    assert by_block(state.active)[1] > 0  # those who hold the upper block alone want some of it
    if deep == 0:
        assert by_block(state.active)[0] == 0  # nobody can hold what is below


def test_a_cohort_that_does_not_hold_a_slot_leaves_its_share_as_it_was():
    fed, state = unequal("top", 1)
    for _ in range(2):
        state, _ = federated_round(fed, state)
    lower = [name for name, block in block_numbers(state.active).items() if block == 0]
    before = {name: state.shares[name] for name in lower}
    assert any(bool((known < 1).any()) for known in before.values())
    alone = dataclasses.replace(fed, sampling=SampleCount(count=1))
    while alone.sampling.sample(list(state.clients), state.seed, state.round) == ["c0"]:  # who is deep
        state = dataclasses.replace(state, seed=state.seed + 1)
    after, _ = federated_round(alone, state)
    assert all(torch.equal(after.shares[name], known) for name, known in before.items())


@dataclasses.dataclass
class Deaf:
    """An engine that hears nothing of the clients it asks."""

    engine: Engine
    asked: list[str] = dataclasses.field(default_factory=list)
    pause_s: float = 0.0
    fuse: int = 1

    def clients(self):
        return self.engine.clients()

    def exchange(self, requests):
        self.asked += [client for client, _ in requests]
        return iter(())

    def close(self):
        self.engine.close()


@pytest.mark.parametrize("deep", [2, 1, 0])
def test_a_client_whose_slots_were_all_voted_out_is_replaced(tmp_path, monkeypatch, deep):
    choose = Legend.choose
    settings = ["method=legend+fedara", "voting.target_rank=1", "fleet.name=edge3"]
    experiment = prepare(small_config(tmp_path, "causal", *settings))
    fed, state = experiment.federation, experiment.start
    blocks = block_numbers(state.active)
    active = {name: held & (blocks[name] == 0) for name, held in state.active.items()}
    shares = {name: torch.ones(held.numel(), dtype=torch.float64) for name, held in active.items()}
    clients = {
        name: dataclasses.replace(one, capacity=Capacity(1, 0.01, 0.1, 0.001, 2 if place < deep else 1))
        for place, (name, one) in enumerate(state.clients.items())
    }
    state = dataclasses.replace(state, active=active, shares=shares, clients=clients, round=1)
    planned = []
    monkeypatch.setattr(Legend, "choose", lambda *given: planned.append(1) or choose(*given))
    try:
        if deep == 0:
            with pytest.raises(RunError, match="round 1: no client holds a slot that is still active"):
                federated_round(fed, state)
            return
        _, record = federated_round(fed, state)
        assert {reply.client for reply in record.replies} == set(list(clients)[:deep])
        assert len(planned) == 2  # for the cohort, and for all others at once
        assert all(reply.error is None for reply in record.replies)
        deaf = Deaf(fed.engine)
        with pytest.raises(RunError, match="no client gave a usable update"):
            federated_round(dataclasses.replace(fed, engine=deaf), state)
        assert set(deaf.asked) == set(list(clients)[:deep])  # nor is anybody else asked in their place
    finally:
        fed.engine.close()


@pytest.mark.parametrize("orthogonality", [0.0, 0.1])
def test_a_classifier_whose_slots_were_all_voted_out_trains_its_head_and_has_no_votes_left(orthogonality):
    fed, state = unequal("top", 1)
    training = fed.training.model_copy(update={"orthogonality": orthogonality})
    fed = dataclasses.replace(fed, training=training)
    blocks = block_numbers(state.active)
    active = {name: held & (blocks[name] == 0) for name, held in state.active.items()}
    shares = {name: torch.ones(held.numel(), dtype=torch.float64) for name, held in active.items()}
    after, record = federated_round(fed, dataclasses.replace(state, active=active, shares=shares, round=4))
    assert [reply.slots for reply in record.replies] == [9, 0, 0, 0]
    assert [num_slots(one.votes) for one in record.learned] == [6, 0, 0, 0]
    assert by_block(after.active) == [6, 0]


@pytest.mark.parametrize("allocation", [Uniform(depth=1), Uniform(depth="weakest")])
def test_at_a_fixed_depth_no_slot_is_active_that_nobody_holds(allocation):
    fed, state = unequal("threshold", 0)
    opening = allocation.opening(state)
    assert by_block(opening) == [0, num_slots(state.active) // 2]
    fed = dataclasses.replace(fed, allocation=allocation)
    after, _ = rounds(fed, dataclasses.replace(state, active=opening), 8)
    assert by_block(after.active)[0] == 0
    assert 6 <= num_slots(after.active) < by_block(opening)[1]


def test_a_run_at_a_fixed_depth_opens_with_what_is_held(tmp_path):
    experiment = prepare(small_config(tmp_path, "voting", "allocation.depth=1"))
    experiment.federation.engine.close()
    lower, upper = by_block(experiment.start.active)
    assert (lower, upper > 0) == (0, True)


def test_sensitivity_worked_by_hand():
    part = {
        "B": torch.nn.Parameter(torch.tensor([[[2.0], [4.0]]])),
        "e": torch.nn.Parameter(torch.tensor([[3.0]])),
        "A": torch.nn.Parameter(torch.tensor([[[1.0, -1.0, 1.0]]])),
    }
    scores = Scores("sensitivity", 0.85)
    for _ in range(2):
        for p in part.values():
            p.grad = torch.ones_like(p)
        scores.update({"m": part})
    # I constant: Ib = I (1 - .85^2); U = .85 * .15 * .85 I + .15 * .7225 I = .21675 I
    mean, spread = 0.2775, 0.21675
    of = [mean * spread * i * i for i in (3.0, 1.0)] + [mean * spread * (4 + 16) / 2]
    assert float(scores.of("m", part)[0, 0]) == pytest.approx(sum(of), rel=1e-5)
    last = Scores("gradient", 0.85)
    last.update({"m": part})
    assert float(last.of("m", part)[0, 0]) == pytest.approx(3 + 1 + 3)
    magnitude = Scores("magnitude", 0.85)
    assert float(magnitude.of("m", part)[0, 0]) == 3.0
    del part["e"]  # form lora
    assert float(last.of("m", part)[0, 0]) == pytest.approx(1 + 3)
    assert float(magnitude.of("m", part)[0, 0]) == pytest.approx((20 * 3) ** 0.5)


def test_the_highest_slots_over_all_modules():
    marked = highest({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([5.0, 0.0, 2.0])}, 3)
    assert {n: bits.tolist() for n, bits in marked.items()} == {"a": [False, True], "b": [True, False, True]}


@pytest.mark.parametrize("arbitration", ["threshold", "top"])
@pytest.mark.parametrize("importance", ["sensitivity", "magnitude", "gradient"])
@pytest.mark.parametrize("form", ["svd", "lora"])
def test_a_run_shrinks_to_its_budget_and_never_grows(arbitration, importance, form):
    voting = Voting(target_rank=1, arbitration=arbitration, importance=importance)
    fed, state = voting_federation(voting, form=form)
    sizes, previous = [], state.active
    for _ in range(6):
        state, _ = federated_round(fed, state)
        assert num_slots(mask_minus(state.active, previous)) == 0
        previous = state.active
        sizes.append(num_slots(state.active))
    assert sizes[0] < 18
    if arbitration == "top":
        assert sizes[-1] == 6
        assert sizes == [voting.budget(state.adapter, t, 6) for t in range(6)]
    else:
        assert 6 <= sizes[-1] < 18


def test_a_dropped_module_costs_nothing_on_the_wire_and_in_the_network():
    fed, state = voting_federation(None)
    gone = next(iter(state.active))
    active = {n: bits & (n != gone) for n, bits in state.active.items()}
    active[list(active)[1]][1:] = False
    smaller = dataclasses.replace(state, active=active)
    task = make_task(fed, smaller, fed.allocation.allocate(smaller, ["c0"])["c0"], "c0")
    assert gone not in task.adapter.modules
    sizes = {n: f.B.shape[0] + f.A.shape[1] + 1 for n, f in state.adapter.modules.items()}
    payload = 4 * sum(int(active[n].sum()) * size for n, size in sizes.items())
    head = 4 * sum(t.numel() for t in state.head.values())
    full = make_task(fed, state, state.active, "c0")
    whole = 4 * sum(3 * size for size in sizes.values())
    assert len(encode_task(full)) - len(encode_task(task)) == pytest.approx(whole - payload, abs=40)
    assert len(encode_task(task)) < payload + head + 1_600


def test_sessions_take_blocks_that_were_voted_out_from_store(tmp_path, monkeypatch):
    """Clients that want nothing of the lowest block: once it is dead, they do not compute it again."""
    score = Scores.of
    monkeypatch.setattr(Scores, "of", lambda *given: score(*given) * (".layer.0." not in given[1]))
    settings = ["voting.target_rank=0.5", "rounds=5", "sampling.count=6"]
    experiment = prepare(small_config(tmp_path, "voting", *settings))
    fed, state, told = experiment.federation, experiment.start, []
    for _ in range(5):
        alive = by_block(state.active)[0] > 0
        state, _ = federated_round(fed, state)
        told.append((alive, experiment.prefix.statistics()["fills"]))
    fed.engine.close()
    assert by_block(state.active)[0] == 0
    assert {fills for alive, fills in told if alive} == {0}
    assert {fills for alive, fills in told if not alive} == {6}  # once for every client
    assert experiment.prefix.statistics()["hits"] > 0


def test_the_bytes_of_minilm_are_the_active_slots():
    from polyrank.adapter import new_adapter

    shapes = {
        f"encoder.layer.{i}.attention.self.{m}": (384, 384) for i in range(6) for m in ("query", "value")
    }
    bank = new_adapter(shapes, form="svd", rank=12, scale=1.0, seed=0)
    fed, _ = voting_federation(Voting(target_rank=2))
    state = dataclasses.replace(state_of(bank), round=3)
    draw = torch.Generator().manual_seed(0)
    active = {n: torch.rand(12, generator=draw) < 0.4 for n in shapes}
    state = dataclasses.replace(state, active=active)
    task = make_task(fed, state, active, "c0")
    assert task.ballot is not None
    numbers = 4 * num_slots(active) * (384 + 384 + 1) + 4 * sum(t.numel() for t in state.head.values())
    assert numbers < len(encode_task(task)) < 1.02 * numbers
    update = update_for(task, bank, active)
    votes = -(-num_slots(active) // 8)
    assert numbers + votes < len(encode_update(update, task)) < 1.01 * numbers + votes


def update_for(task, bank, active):
    from polyrank.messages import ClientUpdate

    voted = highest({n: torch.rand(int(bits.sum())) for n, bits in active.items()}, task.ballot.budget)
    metrics = {"loss": 1.0, "last_loss": 1.0, "steps": 1}
    votes = over_bank(voted, active)
    return ClientUpdate(task.round, task.client, active, restrict(bank, active), task.head, 5, metrics, votes)


def test_votes_that_were_not_asked_for_or_are_too_many():
    fed, state = voting_federation(Voting(target_rank=1))
    state = dataclasses.replace(state, round=4)
    task = make_task(fed, state, state.active, "c0")
    update = update_for(task, state.adapter, state.active)
    assert num_slots(decode_update(encode_update(update, task), task).votes) == task.ballot.budget
    greedy = dataclasses.replace(update, votes=state.active)
    with pytest.raises(WireError, match="18 votes, allowed are 6"):
        decode_update(encode_update(greedy, task), task)
    with pytest.raises(WireError, match="votes is missing"):
        decode_update(encode_update(dataclasses.replace(update, votes=None), task), task)


@pytest.mark.parametrize("kind", ["fedara", "adalora"])
def test_a_constant_budget_is_plain_federated_svd(kind):
    plain, _ = rounds(*voting_federation(None), 3)
    voted, _ = rounds(*voting_federation(Voting(kind=kind, target_rank=3)), 3)
    assert largest_difference(plain.adapter, voted.adapter) == 0


def test_adalora_masks_on_the_client_and_lets_everything_travel():
    fed, state = voting_federation(Voting(kind="adalora", target_rank=1, warmup_share=0.0))
    state = dataclasses.replace(state, round=5)
    after, record = federated_round(fed, state)
    assert num_slots(after.active) == 18
    assert {reply.slots for reply in record.replies} == {18}
    task = make_task(fed, state, state.active, "c0")
    from polyrank.session import train

    update = train(task, fed.engine.engine.environments["c0"])
    zero = sum(int((f.e == 0).sum()) for f in update.adapter.modules.values())
    assert zero == 12
    assert update.votes is None


def test_weak_devices_hold_the_most_voted_slots():
    bank = random_adapter(3, 3, "svd")
    shares = {"block.0.q": torch.tensor([0.1, 0.9, 0.8]), "block.1.q": torch.tensor([0.2, 0.0, 0.3])}
    state = state_of(bank)
    assert num_slots(best_slots(state, 1)) == 2
    assert best_slots(state, 1)["block.0.q"].tolist() == [True, False, False]
    voted = dataclasses.replace(state, shares=shares)
    assert best_slots(voted, 1)["block.0.q"].tolist() == [False, True, True]
    assert not best_slots(voted, 1)["block.1.q"].any()


@pytest.mark.parametrize(
    "rule", [ReplicationPadding(), Anchored(space="factor")], ids=["replication", "anchored"]
)
def test_votes_under_tiers(rule):
    voting = Voting(target_rank=1, arbitration="top")
    fed, state = voting_federation(voting, aggregation=rule, allocation=two_tiers(1, 3))
    after, records = rounds(fed, state, 6)
    assert num_slots(after.active) == 6
    assert len({reply.slots for reply in records[0].replies}) == 2
    assert all(torch.isfinite(t).all() for f in after.adapter.modules.values() for t in f.tensors().values())


def test_orthogonality_worked_by_hand():
    from polyrank.session import _skewness

    factors = Factors(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 1.0, torch.ones(2))
    assert float(_skewness(factors)) == 9.0  # (4 - 1)^2
    plain, _ = rounds(*voting_federation(None), 1)
    pulled, _ = rounds(*voting_federation(None, training=EASY.model_copy(update={"orthogonality": 10.0})), 1)
    assert largest_difference(plain.adapter, pulled.adapter) > 1e-3
