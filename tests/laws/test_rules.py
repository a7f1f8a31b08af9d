"""Laws of aggregation rules: every rule under test, crossed with every law that it claims."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyrank.aggregation import FedAvg
from tests.builders import largest_difference, random_adapter, random_head, state_of, update_of

RULES = [FedAvg(), FedAvg(weights="uniform")]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{rule.weights}")
seeds = st.lists(st.integers(0, 10_000), min_size=1, max_size=5, unique=True)
forms = st.sampled_from(["lora", "svd"])
counts = st.integers(1, 50)


def updates_from(seeds, form, rank=3):
    return [
        update_of(
            f"c{seed}", random_adapter(seed, rank, form), num_examples=1 + seed % 7, head=random_head(seed)
        )
        for seed in seeds
    ]


@rules
@given(seeds, forms, st.randoms())
def test_the_order_of_clients_changes_nothing(rule, seeds, form, shuffler):
    state, updates = state_of(random_adapter(1, 3, form)), updates_from(seeds, form)
    mixed = list(updates)
    shuffler.shuffle(mixed)
    first, second = rule.aggregate(state, updates), rule.aggregate(state, mixed)
    assert largest_difference(first.adapter, second.adapter) < 1e-5


@rules
@given(seeds, forms, counts, counts)
def test_splitting_a_client_in_two_changes_nothing(rule, seeds, form, left, right):
    if rule.weights == "uniform":
        return  # splitting a client gives it two votes
    state, updates = state_of(random_adapter(1, 3, form)), updates_from(seeds, form)
    whole = dataclasses.replace(updates[0], num_examples=left + right)
    parts = [
        dataclasses.replace(whole, client=name, num_examples=n) for name, n in [("l", left), ("r", right)]
    ]
    together = rule.aggregate(state, [whole, *updates[1:]])
    apart = rule.aggregate(state, [*parts, *updates[1:]])
    assert largest_difference(together.adapter, apart.adapter) < 1e-5


@rules
@given(st.integers(0, 10_000), st.integers(1, 5), forms)
def test_clients_that_train_nothing_leave_the_bank_as_it_is(rule, seed, clients, form):
    bank = random_adapter(seed, 3, form)
    state = state_of(bank)
    updates = [update_of(f"c{i}", bank, num_examples=i + 1, head=state.head) for i in range(clients)]
    merged = rule.aggregate(state, updates)
    assert largest_difference(merged.adapter, bank) < 1e-5
    assert all(float((merged.head[n] - t).abs().max()) < 1e-6 for n, t in state.head.items())
