"""Differential privacy: the accountant, sensitivity, noise, and a record that never under-counts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import stat

import pytest
import torch
from scipy.stats import norm

from polyrank.accountant import Mechanism
from polyrank.adapter import full_mask, prefix_mask
from polyrank.aggregation import Anchored, FedAvg, ReplicationPadding
from polyrank.allocation import RandomSlotChoice, Tiers, Uniform
from polyrank.assemble import prepare
from polyrank.changes import change_of
from polyrank.charges import CHARGES, KEY, Charges, read_charges
from polyrank.config import make_config
from polyrank.errors import InputError, RunError
from polyrank.ledger import round_row
from polyrank.privacy import Privacy, PrivateMean, Sums, clipped_sum
from polyrank.round import federated_round
from polyrank.sampling import SampleAll, SampleCount, SamplePoisson, SecretSampling, expected_share
from polyrank.state import ClientRecord
from tests.builders import largest_difference, random_adapter, random_head, state_of, update_of
from tests.small_runs import small_config
from tests.unit.test_round import federation

POISSON = SamplePoisson(rate=0.25)
UNIFORM = {"aggregation": {"kind": "fedavg", "weights": "uniform"}}


def state_with(clients: int, rank: int = 3, form: str = "lora"):
    records = {f"c{k}": ClientRecord() for k in range(clients)}
    return dataclasses.replace(state_of(random_adapter(0, rank, form)), clients=records)


def random_update(state, client: str, draw: random.Random):
    """An update of a random size that holds a random number of slots."""
    rank, size = draw.randint(1, 3), 10 ** draw.uniform(-3, 3)
    step = random_adapter(draw.randrange(2**31), 3, state.adapter.form)
    mask = prefix_mask(state.adapter, rank)
    modules = {
        name: f.with_tensors({p: t + size * step.modules[name].tensors()[p] for p, t in f.tensors().items()})
        for name, f in state.adapter.modules.items()
    }
    head = {name: t + size * random_head(draw.randrange(9999))[name] for name, t in state.head.items()}
    return update_of(client, dataclasses.replace(state.adapter, modules=modules), mask, head=head)


def private(state, folder, *, privacy=None, rule=None, allocation=None, share=1.0, sampling=None):
    privacy = privacy or Privacy(epsilon=1e6, noise_multiplier=1.0, noise_seed=0)
    charges = privacy.open(folder, sampling or SampleAll())
    rule = rule or ReplicationPadding(weights="uniform")
    return PrivateMean(privacy, rule, allocation or Uniform(), share, charges)


# --- the accountant ------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "rounds"), [(None, 1), (None, 4), (0.01, 100), (0.25, 10)])
def test_our_epsilon_is_the_accountants(rate, rounds):
    pytest.importorskip("dp_accounting")
    from dp_accounting.pld import privacy_loss_distribution as pld

    one = pld.from_gaussian_mechanism(2.3 if rate else 2.3 / math.sqrt(rounds), sampling_prob=rate or 1.0)
    expected = one.self_compose(rounds if rate else 1).get_epsilon_for_delta(1e-5)
    assert Mechanism(2.3, rate, 1e-5).epsilon(rounds) == pytest.approx(expected, abs=1e-9)
    assert abs(Mechanism(2.31, rate, 1e-5).epsilon(rounds) - expected) > 1e-6  # the control


def test_epsilon_bounds_the_exact_value_of_the_gaussian_from_above():
    pytest.importorskip("dp_accounting")
    mechanism, mu = Mechanism(2.0, None, 1e-5), math.sqrt(3) / 2.0
    found = mechanism.epsilon(3)

    def delta(epsilon):  # Balle & Wang, 2018: three releases are one with deviation 2 / sqrt(3)
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)

    assert delta(found) <= 1e-5 * (1 + 1e-9)
    assert delta(found * 0.999) > 1e-5


def test_a_release_without_credit_for_sampling_costs_more():
    pytest.importorskip("dp_accounting")
    mechanism = Mechanism(1.5, 0.1, 1e-5)
    assert mechanism.epsilon(3) < mechanism.epsilon(2, 1) < mechanism.epsilon(0, 3)
    assert Mechanism(1.5, None, 1e-5).epsilon(3) == mechanism.epsilon(0, 3)


def test_the_budget_says_how_many_rounds_there_are():
    pytest.importorskip("dp_accounting")
    privacy = Privacy(epsilon=1.2, noise_multiplier=8.0)
    count = privacy.affordable(SampleAll(), 20)
    mechanism = privacy.mechanism(SampleAll())
    assert mechanism.epsilon(count) <= 1.2 < mechanism.epsilon(count + 1)
    assert privacy.affordable(SampleAll(), 2) == 2
    with pytest.raises(InputError, match=r"privacy.epsilon = 0.1: one round takes 1.99"):
        Privacy(epsilon=0.1, noise_multiplier=2.0).affordable(SampleAll(), 50)


def test_privacy_without_the_accountant_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"needs the package dp-accounting; pip install 'polyrank\[privacy\]'"
    ):
        Privacy().affordable(SampleAll(), 1)


# --- sensitivity and noise -----------------------------------------------------------------------


def distance(first, second) -> float:
    """Euclidean distance of two sums over everything together."""
    pairs = zip(first.tensors(), second.tensors(), strict=True)
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))


@pytest.mark.parametrize("form", ["lora", "svd"])
def test_one_client_moves_the_sum_by_the_clip_norm_at_most(form):
    draw, most, state = random.Random(0), 0.7, state_with(0, form=form)
    farthest = unclipped = 0.0
    for _ in range(500):  # pairs of neighbours, in each form
        cohort = [random_update(state, f"c{k}", draw) for k in range(draw.randint(1, 5))]
        without = list(cohort)
        lost = without.pop(draw.randrange(len(cohort)))
        farthest = max(farthest, distance(*(clipped_sum(state, c, most) for c in (cohort, without))))
        unclipped = max(unclipped, change_of(lost, state).norm())
    assert 0.999 * most < farthest <= most * (1 + 1e-9)
    assert unclipped > 100 * most  # the control: nothing else holds them down


def test_short_changes_are_added_as_they_are():
    state = state_with(0)
    draw = random.Random(1)
    updates = [random_update(state, "a", draw), random_update(state, "b", draw)]
    sums = clipped_sum(state, updates, 1e9)
    by_hand = sum(u.head["score.bias"].double() - state.head["score.bias"].double() for u in updates)
    assert torch.allclose(sums.head["score.bias"], by_hand)


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.02, False), (0.98, False)])
def test_noise_has_the_variance_that_is_paid_for(factor, passes):
    """Also the control: 2 % more or less of it would not pass."""
    state = state_with(1)
    state = dataclasses.replace(state, adapter=random_adapter(0, 64, shapes={"q": (2000, 2000)}))
    sums = clipped_sum(state, [], 0.5)
    sums.add_noise(factor * 1.5 * 0.5, b"k" * 32, 0)
    numbers = torch.cat([t.flatten() for t in sums.tensors()])
    assert numbers.numel() > 250_000
    assert (float(numbers.var()) == pytest.approx(0.75**2, rel=0.01)) == passes
    assert abs(float(numbers.mean())) < 0.01


def test_the_same_number_gives_the_same_noise():
    state = state_with(1)
    sums = clipped_sum(state, [], 0.5)
    sums.add_noise(0.75, b"k" * 32, 0)
    again, other = (clipped_sum(state, [], 0.5) for _ in range(2))
    again.add_noise(0.75, b"k" * 32, 0)
    other.add_noise(0.75, b"k" * 32, 1)
    assert distance(sums, again) == 0
    assert distance(sums, other) > 1


def test_the_released_model_has_that_noise_over_the_fixed_denominator(tmp_path):
    pytest.importorskip("dp_accounting")
    state = state_with(8)
    state = dataclasses.replace(
        state, adapter=random_adapter(0, 4, shapes={"q": (40_000, 8)}), active={"q": torch.ones(4) > 0}
    )
    tiers = Tiers(tiers=[{"rank": 2, "share": 0.5}, {"rank": 3, "share": 0.25}])  # and 4 on the other quarter
    privacy = Privacy(epsilon=1e6, clip_norm=0.5, noise_multiplier=1.5, noise_seed=0)
    mean = private(state, tmp_path, privacy=privacy, allocation=tiers, share=0.25)
    released = mean.aggregate(state, [])
    moved = released.adapter.modules["q"].B - state.adapter.modules["q"].B
    for slot, holders in enumerate([8, 8, 4, 2]):
        assert float(moved[:, slot].double().var()) == pytest.approx((0.75 / (0.25 * holders)) ** 2, rel=0.02)


def test_the_denominator_is_not_the_cohort(tmp_path):
    """Twice the cohort of equal clients moves the model twice as far."""
    pytest.importorskip("dp_accounting")
    state, draw = state_with(10), random.Random(3)
    one = dataclasses.replace(random_update(state, "c0", draw), mask=full_mask(state.adapter))
    one = dataclasses.replace(one, adapter=random_adapter(5, 3))
    quiet = Privacy(epsilon=1e30, clip_norm=1.0, noise_multiplier=1e-9, noise_seed=0)

    def step(count: int, folder: str) -> tuple[float, float]:
        (tmp_path / folder).mkdir()
        charges = Charges(tmp_path / folder, Mechanism(1.0, None, 1e-5), 1e30, 0)
        mean = PrivateMean(quiet, FedAvg(weights="uniform"), Uniform(), 0.5, charges)
        released = mean.aggregate(state, [one] * count)
        head = released.head["score.weight"] - state.head["score.weight"]
        return largest_difference(released.adapter, state.adapter), float(head.abs().max())

    twice = [2 * far for far in step(2, "two")]
    assert step(4, "four") == pytest.approx(twice, rel=1e-3)


@pytest.mark.parametrize("allocation", [Uniform(rank=2), RandomSlotChoice(rank=1)])
def test_a_slot_that_nobody_may_hold_gets_no_noise(allocation, tmp_path):
    pytest.importorskip("dp_accounting")
    state = state_with(2)
    released = private(state, tmp_path, allocation=allocation).aggregate(state, []).adapter
    masks = allocation.allocate(state, list(state.clients)).values()
    for name, old in state.adapter.modules.items():
        held = torch.stack([mask[name] for mask in masks]).any(dim=0)
        new = released.modules[name]
        assert [bool((new.A[j] != old.A[j]).all()) for j in range(3)] == held.tolist()


def test_anchored_moves_by_the_populations_shares(tmp_path):
    pytest.importorskip("dp_accounting")
    state = state_with(4)
    tiers = Tiers(tiers=[{"rank": 1, "share": 0.5}])
    whole, half = (
        private(state, tmp_path / name, rule=rule, allocation=tiers)
        for name, rule in (
            ("a", ReplicationPadding(weights="uniform")),
            ("b", Anchored(space="factor", kappa=1.0, weights="uniform")),
        )
        if (tmp_path / name).mkdir() is None
    )
    owners, anchored = (mean.aggregate(state, []).adapter.modules["block.0.q"] for mean in (whole, half))
    old = state.adapter.modules["block.0.q"]
    assert torch.allclose(anchored.A[0] - old.A[0], owners.A[0] - old.A[0], atol=1e-6)
    assert torch.allclose(anchored.A[1:] - old.A[1:], (owners.A[1:] - old.A[1:]) / 2, atol=1e-6)


# --- the record ----------------------------------------------------------------------------------


def test_the_same_sum_is_the_same_release_and_another_is_paid_in_full(tmp_path):
    pytest.importorskip("dp_accounting")
    mechanism = Mechanism(1.5, 0.1, 1e-5)
    first = Charges(tmp_path, mechanism, 100.0, None)
    first.charge(0, b"sum of round 0")
    paid = first.charge(1, b"sum of round 1")
    again = Charges(tmp_path, mechanism, 100.0, None)  # the run goes on
    assert again.key == first.key
    assert again.charge(1, b"sum of round 1") == paid
    other = again.charge(1, b"a client failed this time")
    assert (other.number, other.amplified) == (2, False)
    assert other.epsilon == mechanism.epsilon(2, 1)
    assert [row.number for row in read_charges(tmp_path / CHARGES)] == [0, 1, 2]
    assert stat.S_IMODE((tmp_path / KEY).stat().st_mode) == 0o600
    assert len((tmp_path / KEY).read_bytes()) == 32


def test_a_record_of_other_noise_or_another_delta_is_refused(tmp_path):
    """With less noise than the config says now, three rounds would have cost more than it thinks."""
    pytest.importorskip("dp_accounting")
    charges = Charges(tmp_path, Mechanism(1.5, None, 1e-5), 100.0, 0)
    for round_ in range(3):
        charges.charge(round_, b"%d" % round_)
    whole = (tmp_path / CHARGES).read_bytes()
    for mechanism in (Mechanism(15.0, None, 1e-5), Mechanism(1.5, 0.1, 1e-5), Mechanism(1.5, None, 1e-6)):
        with pytest.raises(InputError, match=r"privacy.jsonl = .*: says epsilon 5\.\d+ where 3 releases by"):
            Charges(tmp_path, mechanism, 100.0, 0)
    assert (tmp_path / CHARGES).read_bytes() == whole
    assert Charges(tmp_path, Mechanism(1.5, None, 1e-5), 100.0, 0).made_in() == [0, 1, 2]


def test_the_same_sum_with_other_noise_is_another_release():
    sums = clipped_sum(state_with(0), [], 1.0)
    assert sums.content(0.5) == clipped_sum(state_with(0), [], 1.0).content(0.5)
    assert sums.content(0.5) != sums.content(0.6)


def test_clients_of_a_private_run_share_no_pass(tmp_path):
    """In one, the last bits of a client's change depend on the others, past what the clip norm bounds."""
    pytest.importorskip("dp_accounting")
    fused = []
    for method in ("plain", "private"):
        config = small_config(tmp_path, method)
        open_ = config.model_copy(update={"engine": config.engine.model_copy(update={"fuse": None})})
        fused.append(prepare(open_).federation.engine.fuse)
    assert fused[0] > 1
    assert fused[1] == 1


def test_a_line_that_was_never_finished_is_cut_off(tmp_path):
    pytest.importorskip("dp_accounting")
    charges = Charges(tmp_path, Mechanism(1.5, None, 1e-5), 100.0, 0)
    charges.charge(0, b"0")
    whole = (tmp_path / CHARGES).read_bytes()
    for cut in range(len(whole)):
        (tmp_path / CHARGES).write_bytes(whole + whole[:cut])
        assert len(read_charges(tmp_path / CHARGES)) == 1
        assert (tmp_path / CHARGES).read_bytes() == whole
    for damaged in (whole + whole, b"x" + whole, whole.replace(b"round", b"rount")):
        (tmp_path / CHARGES).write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged; what was spent is not known"):
            read_charges(tmp_path / CHARGES)


def test_nothing_is_released_past_the_budget(tmp_path):
    pytest.importorskip("dp_accounting")
    mechanism = Mechanism(2.0, None, 1e-5)
    charges = Charges(tmp_path, mechanism, mechanism.epsilon(2), 0)
    charges.charge(0, b"0")
    charges.charge(1, b"1")
    with pytest.raises(RunError, match="round 2 would take epsilon to .*; nothing of it was released"):
        charges.charge(2, b"2")
    assert len(read_charges(tmp_path / CHARGES)) == 2


def killed(folder, moment):
    """A round cut off at some moment: whether its sum had its noise by then, and what is charged."""
    state, noise = state_with(3), Sums.add_noise
    mean = private(state, folder)

    def noted(sums, *given):
        (folder / "noised").touch()
        return die() if moment == "in the noise" else noise(sums, *given)

    child = os.fork()
    if child == 0:
        try:
            Sums.add_noise = noted
            if moment == "before the charge":
                Charges.charge = die
            mean.aggregate(state, [])
            die()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    return (folder / "noised").exists(), [charge.epsilon for charge in read_charges(folder / CHARGES)]


@pytest.mark.parametrize(
    ("moment", "noised", "charged"),
    [("before the charge", False, 0), ("in the noise", True, 1), ("after the release", True, 1)],
)
def test_a_killed_run_has_never_released_more_than_it_charged(moment, noised, charged, tmp_path):
    pytest.importorskip("dp_accounting")
    expected = Mechanism(1.0, None, 1e-5).epsilon(1)
    assert killed(tmp_path, moment) == (noised, [expected] * charged)


def test_noise_before_the_charge_would_be_found_out(tmp_path, monkeypatch):
    """The control: a sum that has its noise is a release, and this one was never charged."""
    pytest.importorskip("dp_accounting")

    def hasty(state, updates, most):
        sums = clipped_sum(state, updates, most)
        sums.add_noise(1.0, b"k" * 32, 0)
        return sums

    monkeypatch.setattr("polyrank.privacy.clipped_sum", hasty)
    assert killed(tmp_path, "before the charge") == (True, [])


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


# --- sampling and refusals -----------------------------------------------------------------------


def test_poisson_samples_are_independent_draws():
    clients = [f"c{k}" for k in range(400)]
    cohorts = [POISSON.sample(clients, 0, round_) for round_ in range(300)]
    assert cohorts[0] == POISSON.sample(clients, 0, 0)
    sizes = torch.tensor([len(cohort) for cohort in cohorts]).double()
    assert float(sizes.mean()) == pytest.approx(100, rel=0.02)
    assert float(sizes.var()) == pytest.approx(75, rel=0.25)  # n q (1 - q); 0 for cohorts of fixed size
    assert SamplePoisson(rate=1.0).sample(clients, 0, 0) == clients
    assert expected_share(POISSON, 7) == 0.25
    assert expected_share(SampleCount(count=3), 12) == 0.25
    assert expected_share(SampleAll(), 12) == 1.0


def test_cohorts_of_a_private_run_do_not_follow_from_its_seed():
    clients = [f"c{k}" for k in range(40)]
    first, second = (SecretSampling(POISSON, secret).sample(clients, 0, 0) for secret in (1, 2**200))
    assert first != second
    assert first == SecretSampling(POISSON, 1).sample(clients, 99, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aggregation": {"kind": "norm_weighted"}}, "aggregation.kind = 'norm_weighted': must average"),
        ({"aggregation": {"kind": "svd_redistribution"}}, "aggregation.kind = 'svd_redistribution': must av"),
        ({"aggregation": {"kind": "fedavg"}}, "aggregation.weights = 'examples': must be 'uniform'"),
        ({"robust": {}}, "robust.attackers = 1: does not go with privacy"),
        (
            {"adapter": {"form": "svd"}, "voting": {"kind": "fedara"}},
            "voting = 'fedara': does not go with privacy",
        ),
        (
            {
                "aggregation": {"kind": "layer_wise", "weights": "uniform"},
                "allocation": {"kind": "loss_based", "low_rank": 2, "high_rank": 4},
            },
            "allocation.kind = 'loss_based': does not go with privacy",
        ),
        (
            {"aggregation": {"kind": "layer_wise", "weights": "uniform"}, "training": {"prune_keep": 0.5}},
            "training.prune_keep = 0.5: does not go with privacy",
        ),
        ({"evaluation": {"per_client": True}}, "evaluation.per_client = True: must be false under privacy"),
        ({"engine": {"fuse": 2}}, "engine.fuse = 2: must be 1 under privacy: in a shared pass"),
        ({"privacy": None, "sampling": {"kind": "poisson"}}, "sampling.kind = 'poisson': needs a [privacy]"),
        ({"privacy": {"delta": 1}}, "privacy.delta = 1: must be less than 1"),
        ({"privacy": {"noise_multiplier": 0}}, "privacy.noise_multiplier = 0: must be greater than 0"),
    ],
)
def test_what_does_not_go_with_privacy_is_refused_in_one_line(changes, message):
    with pytest.raises(InputError) as refusal:
        make_config({"privacy": {}, **UNIFORM, **changes})
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)
    assert json.loads(json.dumps(make_config({"privacy": {}, **UNIFORM}).model_dump(mode="json")))


def test_a_round_without_a_client_still_releases_noise(tmp_path):
    pytest.importorskip("dp_accounting")
    nobody = SamplePoisson(rate=1e-12)
    fed, state = federation()
    with pytest.raises(RunError, match="no client gave a usable update"):
        federated_round(dataclasses.replace(fed, sampling=nobody), state)
    mean = private(state, tmp_path, share=0.25)
    fed = dataclasses.replace(fed, sampling=nobody, aggregation=mean, private=True)
    after, record = federated_round(fed, state)
    assert record.replies == []
    assert largest_difference(after.adapter, state.adapter) > 0.1
    row = round_row(record, None)
    assert row["epsilon"] == Mechanism(1.0, None, 1e-5).epsilon(1)
    assert "train_loss" not in row
