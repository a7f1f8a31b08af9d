"""Laws of aggregation rules: every rule, crossed with every law that it claims."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyrank.adapter import (
    Adapter,
    Factors,
    delta_weight,
    full_mask,
    new_adapter,
    prefix_mask,
    restrict,
)
from polyrank.aggregation import (
    Anchored,
    FedAvg,
    LayerWise,
    NormWeighted,
    RandomSlots,
    RankPartition,
    ReplicationPadding,
    Residual,
    Stacking,
    SvdRedistribution,
    ZeroPadding,
)
from polyrank.aggregation.base import client_weights
from polyrank.aggregation.error import aggregation_error
from tests.builders import (
    SHAPES,
    largest_difference,
    random_adapter,
    random_head,
    slot_mean,
    state_of,
    update_of,
)

RANK = 4
FACTOR_RULES = [
    ZeroPadding(),
    NormWeighted(),
    ReplicationPadding(),
    ReplicationPadding(fill="top"),
    LayerWise(),
    Anchored(space="factor"),
    Anchored(space="factor", kappa=0.0),
    RandomSlots(),
]
PRODUCT_RULES = [
    Stacking(),
    SvdRedistribution(),
    RankPartition(),
    Anchored(),
    Anchored(kappa=0.0),
    Anchored(kappa=1.0),
]
MIXED_RANK_RULES = [*FACTOR_RULES, *PRODUCT_RULES]
EQUAL_RANK_RULES = (FedAvg, Residual)
RULES = [*(rule() for rule in EQUAL_RANK_RULES), *MIXED_RANK_RULES]
EQUALS_FEDAVG = [rule for rule in FACTOR_RULES if not isinstance(rule, NormWeighted)]


def named(rule):
    return "-".join(str(v) for k, v in rule.model_dump().items() if k != "weights")


def over(rules):
    return pytest.mark.parametrize("rule", rules, ids=named)


seeds = st.lists(st.integers(0, 10_000), min_size=1, max_size=5, unique=True)
forms = st.sampled_from(["lora", "svd"])
counts = st.integers(1, 50)
ranks = st.lists(st.integers(1, RANK), min_size=5, max_size=5)


def updates_from(seeds, form, ranks=(RANK,) * 5):
    """One client per seed, with the first so many slots of a random adapter."""
    updates = []
    for seed, rank in zip(seeds, ranks, strict=False):
        adapter = random_adapter(seed, RANK, form)
        mask, count = prefix_mask(adapter, rank), 1 + seed % 7
        updates.append(update_of(f"c{seed}", adapter, mask, count, random_head(seed)))
    return updates


def served(merged, name):
    """The dense product that the next round starts from, with what was folded into the base."""
    parts = [merged.adapter.modules[name]]
    if merged.fold is not None and name in merged.fold.modules:
        parts.append(merged.fold.modules[name])
    return sum(delta_weight(part) for part in parts)


def distance(first, second):
    """Largest difference of two served products, relative to the larger one."""
    worst = 0.0
    for name in SHAPES:
        one, two = served(first, name), served(second, name)
        worst = max(worst, float((one - two).abs().max() / (1 + one.abs().max())))
    return worst


@over(RULES)
@given(seeds, forms, ranks, st.randoms())
def test_the_order_of_clients_changes_nothing(rule, seeds, form, ranks, shuffler):
    ranks = [RANK] * 5 if isinstance(rule, EQUAL_RANK_RULES) else ranks
    state, updates = state_of(random_adapter(1, RANK, form)), updates_from(seeds, form, ranks)
    mixed = list(updates)
    shuffler.shuffle(mixed)
    first, second = rule.aggregate(state, updates), rule.aggregate(state, mixed)
    assert distance(first, second) < 1e-4
    assert all(float((second.head[n] - t).abs().max()) < 1e-5 for n, t in first.head.items())


@over([rule for rule in RULES if not isinstance(rule, NormWeighted)])
@given(seeds, forms, ranks, counts, counts)
def test_splitting_a_client_in_two_changes_nothing(rule, seeds, form, ranks, left, right):
    ranks = [RANK] * 5 if isinstance(rule, EQUAL_RANK_RULES) else ranks
    state, updates = state_of(random_adapter(1, RANK, form)), updates_from(seeds, form, ranks)
    whole = dataclasses.replace(updates[0], num_examples=left + right)
    sizes = [("l", left), ("r", right)]
    parts = [dataclasses.replace(whole, client=name, num_examples=n) for name, n in sizes]
    together = rule.aggregate(state, [whole, *updates[1:]])
    apart = rule.aggregate(state, [*parts, *updates[1:]])
    assert distance(together, apart) < 1e-4


@over(RULES)
@given(st.integers(0, 10_000), st.integers(1, 5), forms)
def test_full_clients_that_train_nothing_leave_everything_as_it_is(rule, seed, clients, form):
    bank = random_adapter(seed, RANK, form)
    state = state_of(bank)
    updates = [update_of(f"c{i}", bank, num_examples=i + 1, head=state.head) for i in range(clients)]
    merged = rule.aggregate(state, updates)
    if isinstance(rule, (SvdRedistribution, RankPartition, Anchored, Stacking)) and not (
        isinstance(rule, Anchored) and rule.space == "factor"
    ):
        for name in SHAPES:
            before = delta_weight(bank.modules[name])
            assert float((served(merged, name) - before).abs().max() / before.abs().max()) < 1e-4
    else:
        assert largest_difference(merged.adapter, bank) < 1e-5
        assert all(
            torch.allclose(served(merged, n), delta_weight(bank.modules[n]), atol=1e-4) for n in SHAPES
        )
    assert all(float((merged.head[n] - t).abs().max()) < 1e-6 for n, t in state.head.items())


@over(EQUALS_FEDAVG)
@given(seeds, forms)
def test_equal_ranks_give_fedavg(rule, seeds, form):
    state, updates = state_of(random_adapter(1, RANK, form)), updates_from(seeds, form)
    expected = FedAvg().aggregate(state, updates)
    assert largest_difference(rule.aggregate(state, updates).adapter, expected.adapter) < 1e-5


@over(FACTOR_RULES)
@given(seeds, forms, ranks)
def test_a_slot_that_nobody_holds_is_unchanged(rule, seeds, form, ranks):
    bank = random_adapter(1, RANK, form)
    updates = updates_from(seeds, form, ranks)
    merged = rule.aggregate(state_of(bank), updates).adapter
    highest = max(ranks[: len(updates)])
    tail = {name: torch.arange(RANK) >= highest for name in SHAPES}
    assert largest_difference(restrict(merged, tail), restrict(bank, tail)) == 0


@given(seeds, forms, ranks)
def test_replication_by_cascade_is_the_mean_over_owners(seeds, form, ranks):
    bank, updates = random_adapter(1, RANK, form), updates_from(seeds, form, ranks)
    weights = client_weights(updates, "examples")
    merged = ReplicationPadding().aggregate(state_of(bank), updates).adapter
    for name, factors in merged.modules.items():
        for slot in range(RANK):
            own = [(u, w) for u, w in zip(updates, weights, strict=True) if u.mask[name][slot]]
            if own:
                mass = sum(w for _, w in own)
                A = sum(w / mass * u.adapter.modules[name].A[slot] for u, w in own)
                B = sum(w / mass * u.adapter.modules[name].B[:, slot] for u, w in own)
                assert float((factors.A[slot] - A).abs().max()) < 1e-5
                assert float((factors.B[:, slot] - B).abs().max()) < 1e-5


@given(seeds, forms, st.integers(1, RANK - 1), st.lists(st.booleans(), min_size=5, max_size=5))
def test_two_ranks_make_top_and_cascade_the_same(seeds, form, low, is_high):
    """And both are the paper's two steps, written out."""
    ranks = [RANK if high else low for high in is_high]
    state, updates = state_of(random_adapter(1, RANK, form)), updates_from(seeds, form, ranks)
    cascade = ReplicationPadding().aggregate(state, updates).adapter
    top = ReplicationPadding(fill="top").aggregate(state, updates).adapter
    assert largest_difference(cascade, top) < 1e-5
    weights = client_weights(updates, "examples")
    high = [(u, w) for u, w, most in zip(updates, weights, is_high, strict=False) if most]
    for (name, factors), part in itertools.product(top.modules.items(), ("B", "A")):
        if not high:
            continue
        mass = sum(w for _, w in high)
        full = sum(w / mass * getattr(u.adapter.modules[name], part) for u, w in high)  # X_H
        mean = torch.zeros_like(full)
        for update, weight in zip(updates, weights, strict=True):
            own = getattr(update.adapter.modules[name], part)
            padded = full.clone()  # X~_k: what a client lacks is that of X_H
            padded[: own.shape[0], : own.shape[1]] = own
            mean += weight * padded
        assert torch.allclose(getattr(factors, part), mean, atol=1e-5)


# --- product space ---------------------------------------------------------------------------


def dense_reference(rule, bank, updates, name):
    """The rule's formula with dense matrices and float64."""
    weights = client_weights(updates, "examples")
    old = bank.modules[name]
    total = torch.zeros(old.B.shape[0], old.A.shape[1], dtype=torch.float64)
    for slot in range(RANK):
        own = [(u, w) for u, w in zip(updates, weights, strict=True) if u.mask[name][slot]]
        mass = sum(w for _, w in own)
        term = sum((w * slot_term(u.adapter.modules[name], slot) for u, w in own), torch.zeros_like(total))
        if isinstance(rule, (Stacking, SvdRedistribution)):
            total += term
        elif isinstance(rule, RankPartition):
            total += term / mass if own else 0
        else:
            eta = mass**rule.kappa if own else 0.0
            total += (eta * term / mass if own else 0) + (1 - eta) * slot_term(old, slot)
    if isinstance(rule, Stacking):
        return total
    U, s, Vh = torch.linalg.svd(total)
    keep = min(RANK, s.numel())
    return U[:, :keep] @ torch.diag(s[:keep]) @ Vh[:keep]


def slot_term(factors, slot):
    e = 1.0 if factors.e is None else factors.e[slot].double()
    return factors.scale * e * torch.outer(factors.B[:, slot].double(), factors.A[slot].double())


@over(PRODUCT_RULES)
@given(seeds, forms, ranks)
def test_product_rules_equal_the_dense_reference(rule, seeds, form, ranks):
    bank, updates = random_adapter(1, RANK, form), updates_from(seeds, form, ranks)
    merged = rule.aggregate(state_of(bank), updates)
    for name in SHAPES:
        expected = dense_reference(rule, bank, updates, name)
        error = (served(merged, name) - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-4


@over(PRODUCT_RULES)
@given(seeds, ranks, st.sampled_from([0.25, 3.0, 16.0]))
def test_the_scale_is_absorbed(rule, seeds, ranks, factor):
    def rescaled(adapter):
        modules = {
            name: Factors(f.B / factor, f.A, f.scale * factor, f.e) for name, f in adapter.modules.items()
        }
        return Adapter(adapter.form, modules)

    bank, updates = random_adapter(1, RANK), updates_from(seeds, "lora", ranks)
    moved = [dataclasses.replace(u, adapter=rescaled(u.adapter)) for u in updates]
    first = rule.aggregate(state_of(bank), updates)
    second = rule.aggregate(state_of(rescaled(bank)), moved)
    assert distance(first, second) < 1e-4


@given(seeds, ranks)
def test_product_rules_split_the_singular_values_evenly(seeds, ranks):
    merged = SvdRedistribution().aggregate(
        state_of(random_adapter(1, RANK)), updates_from(seeds, "lora", ranks)
    )
    for factors in merged.adapter.modules.values():
        alive = factors.B.norm(dim=0) > 0
        assert torch.allclose(factors.B.norm(dim=0)[alive], factors.A.norm(dim=1)[alive], rtol=1e-4)
        assert bool((factors.B.norm(dim=0).diff() <= 1e-4).all())  # strongest first


@given(seeds, forms, st.integers(1, RANK))
def test_a_residual_makes_the_mean_of_the_factors_exact(seeds, form, rank):
    """Slots that nobody holds stay as they are, beside the mean of what the clients learned."""
    bank, updates = random_adapter(1, RANK, form), updates_from(seeds, form, [rank] * 5)
    merged = Residual().aggregate(state_of(bank), updates)
    assert largest_difference(merged.adapter, FedAvg().aggregate(state_of(bank), updates).adapter) == 0
    weights = client_weights(updates, "examples")
    for name in SHAPES:
        mean = sum(p * delta_weight(u.adapter.modules[name]) for u, p in zip(updates, weights, strict=True))
        mean = mean + sum(slot_term(bank.modules[name], slot).float() for slot in range(rank, RANK))
        assert float((served(merged, name) - mean).abs().max() / (1 + mean.abs().max())) < 1e-4


def test_a_null_slot_adds_nothing_but_can_still_be_trained():
    bank = random_adapter(1, RANK)
    only_one = update_of("c", random_adapter(2, RANK), prefix_mask(bank, 1))
    for factors in SvdRedistribution().aggregate(state_of(bank), [only_one]).adapter.modules.values():
        assert float(factors.B[:, 1:].abs().max()) == 0
        assert float(factors.A[1:].norm(dim=1).min()) > 0


@given(seeds, forms, ranks)
def test_the_error_is_the_dense_distance(seeds, form, ranks):
    bank, updates = random_adapter(1, RANK, form), updates_from(seeds, form, ranks)
    weights = client_weights(updates, "examples")
    for rule in (ReplicationPadding(), Stacking(), SvdRedistribution()):
        merged = rule.aggregate(state_of(bank), updates)
        far = near = 0.0
        for name in SHAPES:
            products = [delta_weight(u.adapter.modules[name]) for u in updates]
            mean = sum(w * product for w, product in zip(weights, products, strict=True))
            far += float((served(merged, name) - mean).double().square().sum())
            near += float(mean.double().square().sum())
        assert aggregation_error(bank, full_mask(bank), merged, updates, False) == pytest.approx(
            (far / near) ** 0.5, abs=1e-3
        )
        if isinstance(rule, Stacking):
            assert aggregation_error(bank, full_mask(bank), merged, updates, False) < 1e-5


# --- the round in which nobody learns anything --------------------------------------------------

# Relative change of the global product when every participant returns what it was given. Ranks 2, 4, 8, 16,
# two clients each, on one fixed bank; partial: one client of each of the two lower ranks takes part.
NO_OP = {
    "zero_padding": (0.781, 0.270),
    "norm_weighted": (0.675, 0.237),
    "replication_padding-cascade": (0.0, 0.0),
    "replication_padding-top": (0.0, 0.0),
    "layer_wise": (0.0, 0.0),
    "anchored-0.5-factor": (0.0, 0.0),
    "anchored-0.0-factor": (0.0, 0.0),
    "random_slots": (0.0, 0.0),
    "svd_redistribution": (0.591, 0.901),
    "rank_partition": (0.0, 0.889),
    "anchored-0.5-product": (0.0, 0.0),
    "anchored-0.0-product": (0.0, 0.0),
    "anchored-1.0-product": (0.0, 0.0),
}


def no_op_change(rule, ranks):
    bank = random_adapter(5, 16, shapes={"q": (24, 32)})
    updates = [update_of(f"c{i}", bank, prefix_mask(bank, rank)) for i, rank in enumerate(ranks)]
    merged = rule.aggregate(state_of(bank), updates)
    before = delta_weight(bank.modules["q"])
    return float((served(merged, "q") - before).norm() / before.norm())


@over([rule for rule in MIXED_RANK_RULES if not isinstance(rule, Stacking)])
def test_a_round_without_learning_changes_what_is_written_here(rule):
    full, partial = NO_OP[named(rule)]
    assert no_op_change(rule, [2, 2, 4, 4, 8, 8, 16, 16]) == pytest.approx(full, abs=1e-3)
    assert no_op_change(rule, [2, 4]) == pytest.approx(partial, abs=1e-3)


def test_stacking_restarts_from_zero_so_that_a_round_without_learning_folds_nothing():
    bank = new_adapter(SHAPES, form="lora", rank=RANK, scale=2.0, seed=0)
    updates = [update_of(f"c{i}", bank, prefix_mask(bank, rank)) for i, rank in enumerate([1, 4])]
    merged = Stacking().aggregate(state_of(bank), updates)
    assert all(float(served(merged, name).abs().max()) == 0 for name in SHAPES)
    assert largest_difference(merged.adapter, bank) > 0  # new A


def test_streaming_widens_narrow_updates():
    bank = random_adapter(0, RANK)
    wide = updates_from([1, 2, 3], "lora", [4, 2, 3, 1, 1])

    def narrow(update):
        modules = {
            name: f.with_tensors({part: t.bfloat16() for part, t in f.tensors().items()})
            for name, f in update.adapter.modules.items()
        }
        return dataclasses.replace(update, adapter=Adapter("lora", modules))

    weights = client_weights(wide, "examples")
    mean = slot_mean(bank, [narrow(update) for update in wide], weights)
    assert next(iter(mean.modules.values())).A.dtype == torch.float32
    assert largest_difference(mean, slot_mean(bank, wide, weights)) < 0.02


def test_full_mask_and_prefix_agree():
    bank = random_adapter(0, RANK)
    assert all(torch.equal(prefix_mask(bank, RANK)[name], mask) for name, mask in full_mask(bank).items())


def test_three_ranks_by_hand():
    """Clients of rank 1, 2, 3 whose slots all hold 1, 2 and 6; the bank holds 9 in a fourth slot."""
    shapes = {"q": (2, 2)}

    def constant(value):
        bank = random_adapter(0, 4, shapes=shapes)
        full = {
            "q": bank.modules["q"].with_tensors(
                {"B": torch.full((2, 4), value), "A": torch.full((4, 2), value)}
            )
        }
        return Adapter("lora", full)

    bank = constant(9.0)
    updates = [
        update_of(f"c{rank}", constant(value), prefix_mask(bank, rank))
        for rank, value in [(1, 1.0), (2, 2.0), (3, 6.0)]
    ]

    def slots(rule):
        return rule.aggregate(state_of(bank), updates).adapter.modules["q"].A[:, 0].tolist()

    assert slots(ReplicationPadding()) == pytest.approx([3.0, 4.0, 6.0, 9.0])
    assert slots(ReplicationPadding(fill="top")) == pytest.approx([3.0, 14 / 3, 6.0, 9.0])
    assert slots(ZeroPadding()) == pytest.approx([3.0, 8 / 3, 2.0, 9.0])
    assert slots(RandomSlots()) == pytest.approx([3.0, 9 - 10 / 3, 8.0, 9.0])
    norms = [2 * 1 * 2, 2 * 2 * 4 * 2, 2 * 3 * 36 * 2]  # |s sum_r v^2 ones(2, 2)| = s r v^2 2
    shares = [norm / sum(norms) for norm in norms]
    expected = [sum(s * v for s, v in zip(shares, (1, 2, 6), strict=True)), shares[1] * 2 + shares[2] * 6]
    assert slots(NormWeighted())[:2] == pytest.approx(expected)
