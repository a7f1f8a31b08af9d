"""Robust mode: hand-worked means, the holders' rule, aligned signs, and attacks on a small problem."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyrank.adapter import Adapter, Factors, delta_weight, full_mask, prefix_mask, restrict
from polyrank.aggregation import Anchored, FedAvg, LayerWise, RandomSlots, ReplicationPadding
from polyrank.changes import change_of
from polyrank.config import make_config
from polyrank.engine.base import Answer
from polyrank.errors import InputError
from polyrank.gate import decode_update
from polyrank.messages import ClientUpdate, Training, TrainTask
from polyrank.robust import Robust, RobustMean, aligned, clip_factors, trimmed_mean
from polyrank.wire import WireError, decode_task, encode_task, encode_update
from studies.robust.attacks import ATTACKS, Liars, bent
from tests.builders import largest_difference, random_adapter, random_head, state_of, update_of

MEANS = [
    ReplicationPadding(weights="uniform"),
    LayerWise(weights="uniform"),
    RandomSlots(weights="uniform"),
    Anchored(space="factor", weights="uniform"),
]
names = pytest.mark.parametrize("rule", MEANS, ids=lambda rule: rule.kind)


def nearby(bank: Adapter, seed: int, size: float = 0.01) -> Adapter:
    """The bank after a small step."""
    rank = next(iter(bank.modules.values())).rank
    modules = {}
    for name, step in random_adapter(seed, rank, bank.form).modules.items():
        old = bank.modules[name].tensors()
        modules[name] = step.with_tensors({part: old[part] + size * t for part, t in step.tensors().items()})
    return Adapter(bank.form, modules)


def cohort(state, ranks, first=1):
    """Honest updates near the served model, of these ranks."""
    updates = []
    for k, rank in enumerate(ranks, first):
        head = {n: t + 0.01 * random_head(k)[n] for n, t in state.head.items()}
        mask = prefix_mask(state.adapter, rank)
        updates.append(update_of(f"c{k}", nearby(state.adapter, k), mask, head=head))
    return updates


def test_a_trimmed_mean_by_hand():
    values = torch.tensor([[1.0, 9.0], [2.0, 0.0], [3.0, 1.0], [4.0, 2.0], [100.0, -7.0]])
    assert torch.equal(trimmed_mean(values, 1), torch.tensor([3.0, 1.0]))
    assert torch.equal(trimmed_mean(values, 2), torch.tensor([3.0, 1.0]))
    assert torch.equal(trimmed_mean(values[:4], 1), torch.tensor([2.5, 1.5]))


def test_long_changes_come_down_to_the_median_whatever_the_rank():
    state = state_of(random_adapter(0, 3))
    changes = [change_of(update, state) for update in cohort(state, [3, 1, 2])]
    longest = dataclasses.replace(changes[1], head={n: 50 * t for n, t in changes[1].head.items()})
    changes = [changes[0], longest, changes[2], changes[0], changes[2]]
    sizes = sorted(change.norm() / change.size() ** 0.5 for change in changes)
    factors = clip_factors(changes)
    assert factors[1] * longest.norm() / longest.size() ** 0.5 == pytest.approx(sizes[2])
    assert [factor < 1 for factor in factors] == [False, True, False, False, False]
    assert clip_factors([change_of(update_of("c", state.adapter, head=state.head), state)]) == [1.0]


@names
def test_without_attackers_equal_clients_are_a_fixed_point(rule):
    state = state_of(random_adapter(0, 3, "svd"))
    news = cohort(state, [3])[0]
    merged = RobustMean(Robust(attackers=1), rule).aggregate(state, [news] * 5)
    assert largest_difference(merged.adapter, news.adapter) < 1e-6
    assert merged.notes == {"clipped": 0, "still_slots": 0}


@names
def test_clients_that_agree_are_not_moved_by_short_lies(rule):
    state = state_of(random_adapter(0, 3))
    honest = cohort(state, [3])[0]
    task = TrainTask(0, "c", 0, honest.mask, honest.mask, state.adapter, state.head, Training())
    updates = [honest] * 5 + [bent("sign_flip", honest, task)] * 2
    robust = RobustMean(Robust(attackers=2), rule).aggregate(state, updates)
    plain = rule.aggregate(state, updates)
    assert largest_difference(robust.adapter, honest.adapter) < 1e-6
    assert largest_difference(plain.adapter, honest.adapter) > 1e-3  # the control
    for name, expected in honest.head.items():
        assert torch.allclose(robust.head[name], expected, atol=1e-6)
        assert not torch.allclose(plain.head[name], expected, atol=1e-3)


@names
@settings(max_examples=10)
@given(st.permutations(range(7)))
def test_the_order_of_clients_does_not_matter(rule, order):
    state = state_of(random_adapter(0, 3))
    updates = cohort(state, [3, 3, 3, 2, 2, 1, 1])
    robust = RobustMean(Robust(attackers=1), rule)
    first = robust.aggregate(state, updates)
    second = robust.aggregate(state, [updates[k] for k in order])
    assert largest_difference(first.adapter, second.adapter) < 1e-6


@names
@pytest.mark.parametrize("form", ["lora", "svd"])
def test_a_slot_with_too_few_holders_stays_as_it_is_to_the_bit(rule, form):
    state = state_of(random_adapter(0, 3, form))
    updates = cohort(state, [3, 3, 2, 2, 2, 1, 1])  # slot 0: 7 holders, slot 1: 5, slot 2: 2
    merged = RobustMean(Robust(attackers=2), rule).aggregate(state, updates)
    for name, old in state.adapter.modules.items():
        new = merged.adapter.modules[name]
        assert torch.equal(new.A[2], old.A[2])
        assert torch.equal(new.B[:, 2], old.B[:, 2])
        assert not torch.equal(new.A[1], old.A[1])
    assert merged.notes["still_slots"] == 2  # slot 2 of both modules
    nobody = RobustMean(Robust(attackers=4), rule).aggregate(state, updates)
    assert largest_difference(nobody.adapter, state.adapter) == 0
    assert all(torch.equal(nobody.head[n], t) for n, t in state.head.items())


@names
@given(size=st.floats(-1e6, 1e6), seed=st.integers(100, 200))
def test_what_liars_send_stays_between_what_honest_clients_sent(rule, size, seed):
    state = state_of(random_adapter(0, 3))
    honest = cohort(state, [3] * 5)
    spoiled = {name: t + size * random_head(seed)[name] for name, t in state.head.items()}
    lies = [update_of(f"x{k}", nearby(state.adapter, seed + k, size), head=spoiled) for k in range(2)]
    robust = RobustMean(Robust(attackers=2), rule).aggregate(state, [*honest, *lies])
    plain = rule.aggregate(state, [*honest, *lies])
    largest = max(largest_difference(update.adapter, state.adapter) for update in honest)
    assert largest_difference(robust.adapter, state.adapter) <= largest * (1 + 1e-5)
    for name, served in state.head.items():
        far = max(float((update.head[name] - served).abs().max()) for update in honest)
        assert float((robust.head[name] - served).abs().max()) <= far * (1 + 1e-5)
    if abs(size) > 1:
        assert largest_difference(plain.adapter, state.adapter) > 5 * largest  # the control


@pytest.mark.parametrize("form", ["lora", "svd"])
@given(st.integers(0, 1000))
def test_aligning_undoes_flipped_signs_and_moves_no_product(form, seed):
    bank = random_adapter(seed, 3, form)
    honest = update_of("c", nearby(bank, seed + 1), prefix_mask(bank, 2))
    task = TrainTask(0, "c", 0, honest.mask, honest.mask, restrict(bank, honest.mask), {}, Training())
    flipped = bent("factor_flip", honest, task)
    for name, factors in honest.adapter.modules.items():
        lie = flipped.adapter.modules[name]
        assert torch.equal(delta_weight(lie), delta_weight(factors))
        assert not torch.equal(lie.B, factors.B)
    assert largest_difference(aligned(honest, bank).adapter, honest.adapter) == 0
    assert largest_difference(aligned(flipped, bank).adapter, honest.adapter) == 0


def test_aligning_leaves_a_factor_alone_whose_partner_did_not_train():
    bank = Adapter("lora", {"q": Factors(torch.ones(2, 1), torch.ones(1, 3), 1.0)})
    turned = Adapter("lora", {"q": Factors(-torch.ones(2, 1), torch.ones(1, 3), 1.0)})
    update = ClientUpdate(0, "c", full_mask(bank), turned, {}, 1, {})
    assert largest_difference(aligned(update, bank).adapter, turned) == 0


# --- attacks on a problem that a person can see through -----------------------------------------

WIDTH, HIGH, LOW, CLIENTS, ROUNDS = 8, 3, 2, 10, 10


class Quadratic:
    """An engine whose clients pull their slots toward a target each, by a few gradient steps.

    The loss of a client is |B A - target_k|^2 with its own slots; the targets scatter around one of rank 2.
    """

    def __init__(self, noise: float = 0.05) -> None:
        draw = torch.Generator().manual_seed(1)
        self.target = torch.randn(WIDTH, LOW, generator=draw) @ torch.randn(LOW, WIDTH, generator=draw) / 2
        self.own = {
            f"c{k}": self.target + noise * torch.randn(WIDTH, WIDTH, generator=draw) for k in range(CLIENTS)
        }

    def answer(self, task: TrainTask) -> bytes:
        factors = task.adapter.modules["q"]
        B, A = factors.B, factors.A
        for _ in range(4):
            off = B @ A - self.own[task.client]
            grad_B, grad_A = 2 * off @ A.T, 2 * B.T @ off
            step = 0.2 / max(1.0, float(grad_B.norm()), float(grad_A.norm()))
            B, A = B - step * grad_B, A - step * grad_A
        learned = Adapter("lora", {"q": Factors(B, A, 1.0)})
        metrics = {"loss": 1.0, "last_loss": 1.0, "steps": 4}
        return encode_update(ClientUpdate(0, task.client, task.trained, learned, {}, 1, metrics), task)

    def exchange(self, requests):
        for client, request in requests:
            yield Answer(client, self.answer(decode_task(request)), 0.0)


def final_loss(rule, attack=None, who="random"):
    """Distance to the target after all rounds, as a share of the distance at the start; 2 liars of 10."""
    draw = torch.Generator().manual_seed(2)
    A = torch.randn(HIGH, WIDTH, generator=draw) / 2
    bank = Adapter("lora", {"q": Factors(torch.zeros(WIDTH, HIGH), A, 1.0)})
    state = dataclasses.replace(state_of(bank), head={})
    problem = Quadratic()
    clients = list(problem.own)
    rank = {client: HIGH if k < 2 else LOW for k, client in enumerate(clients)}
    liars = {"random": ["c4", "c8"], "high_rank": ["c0", "c1"]}[who]
    engine = problem if attack is None else Liars(problem, liars, attack)
    for round_ in range(ROUNDS):
        masks = {client: prefix_mask(state.adapter, rank[client]) for client in clients}
        tasks = {
            c: TrainTask(0, c, round_, m, m, restrict(state.adapter, m), {}, Training())
            for c, m in masks.items()
        }
        updates = []
        for answer in engine.exchange((c, encode_task(t)) for c, t in tasks.items()):
            with contextlib.suppress(WireError) if attack == "nan" else contextlib.nullcontext():
                updates.append(decode_update(answer.payload, tasks[answer.client]))
        state = dataclasses.replace(state, adapter=rule.aggregate(state, updates).adapter)
    far = (delta_weight(state.adapter.modules["q"]) - problem.target).norm() / problem.target.norm()
    return float(far.nan_to_num(1e9, 1e9))


PLAIN = ReplicationPadding(weights="uniform")
ROBUST = RobustMean(Robust(attackers=2), PLAIN)


def test_robust_means_hold_where_plain_means_break():
    """0 is learned and 1 is nothing learned; a point is a hundredth of that."""
    honest = final_loss(PLAIN)
    assert honest < 0.2
    assert final_loss(ROBUST) - honest <= 0.01
    cells = [(attack, who) for attack in ATTACKS for who in ("random", "high_rank")]
    robust = {cell: final_loss(ROBUST, *cell) - honest for cell in cells}
    plain = {cell: final_loss(PLAIN, *cell) - honest for cell in cells}
    assert all(lost <= (0.04 if who == "random" else 0.12) for (_, who), lost in robust.items()), robust
    broken = {attack for (attack, _), lost in plain.items() if lost > 0.2}
    assert {"times_10", "random", "factor_flip"} <= broken, plain  # the control
    assert "nan" not in broken  # refused with or without robust mode


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"aggregation": {"kind": "zero_padding"}},
            "aggregation.kind = 'zero_padding': must average the holders",
        ),
        ({"aggregation": {"kind": "stacking"}}, "aggregation.kind = 'stacking': must average the holders"),
        (
            {"aggregation": {"kind": "anchored", "weights": "uniform"}},
            "aggregation.space = 'product': must be 'factor' under robust",
        ),
        (
            {"aggregation": {"kind": "replication_padding", "fill": "top", "weights": "uniform"}},
            "aggregation.fill = 'top': must be 'cascade' under robust",
        ),
        (
            {"aggregation": {"kind": "fedavg"}},
            "aggregation.weights = 'examples': must be 'uniform' under robust",
        ),
        (
            {"adapter": {"form": "svd"}, "voting": {"kind": "fedara"}},
            "voting = 'fedara': does not go with robust",
        ),
        (
            {
                "aggregation": {"kind": "layer_wise", "weights": "uniform"},
                "allocation": {"kind": "loss_based", "score": "client", "low_rank": 2, "high_rank": 4},
            },
            "allocation.score = 'client': must be 'server' under robust",
        ),
        ({"robust": {"attackers": 0}}, "robust.attackers = 0: must be greater than or equal to 1"),
    ],
)
def test_what_does_not_go_with_robust_mode_is_refused_in_one_line(changes, message):
    uniform = {"aggregation": {"kind": "fedavg", "weights": "uniform"}}
    with pytest.raises(InputError) as refusal:
        make_config({"robust": {}, **uniform, **changes})
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


def test_a_cohort_that_is_too_small_is_refused():
    Robust(attackers=2).check_cohort(5)
    with pytest.raises(InputError, match=r"robust.attackers = 2: needs at least 5 clients .* found 4"):
        Robust(attackers=2).check_cohort(4)


def test_fedavg_goes_with_robust_mode():
    state = state_of(random_adapter(0, 2))
    merged = RobustMean(Robust(), FedAvg(weights="uniform")).aggregate(state, cohort(state, [2] * 4))
    assert largest_difference(merged.adapter, state.adapter) > 0
