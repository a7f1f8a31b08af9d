"""Policies: who holds which slots, and that it stays so."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from polyrank.adapter import full_mask, num_slots
from polyrank.allocation import LossBased, RandomSlotChoice, Tiers, Uniform
from polyrank.config import load_config
from polyrank.errors import InputError
from polyrank.state import ClientRecord, ServerState
from tests.builders import random_adapter, random_head

CLIENTS = [f"c{i:02d}" for i in range(20)]


def state(round_=0, losses=None, seed=0):
    bank = random_adapter(0, 8)
    records = {c: ClientRecord(loss=None if losses is None else losses[c]) for c in CLIENTS}
    return ServerState(round_, seed, bank, full_mask(bank), random_head(0), records)


def rank_of(mask):
    (rank,) = {int(held.sum()) for held in mask.values()}
    return rank


def ranks(policy, state):
    return {client: rank_of(mask) for client, mask in policy.allocate(state, CLIENTS).items()}


def test_tiers_by_share_are_exact_and_stay():
    policy = Tiers(tiers=[{"rank": 2, "share": 0.5}, {"rank": 4, "share": 0.3}, {"rank": 8, "share": 0.2}])
    first = ranks(policy, state())
    assert Counter(first.values()) == {2: 10, 4: 6, 8: 4}
    assert ranks(policy, state(round_=7)) == first
    assert ranks(policy, state(seed=1)) != first


def test_tiers_by_name_and_the_rest_hold_everything():
    policy = Tiers(tiers=[{"rank": 3, "clients": ["c01", "c05"]}, {"rank": 1, "share": 0.5}])
    found = ranks(policy, state())
    assert (found["c01"], found["c05"]) == (3, 3)
    assert Counter(found.values()) == {3: 2, 1: 10, 8: 8}
    with pytest.raises(InputError, match=r"allocation.tiers.clients = 'x': .*one of: c00"):
        Tiers(tiers=[{"rank": 3, "clients": ["x"]}]).allocate(state(), CLIENTS)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (
            "allocation={kind='tiers', tiers=[{rank=2}]}",
            "allocation.tiers.0 = .*: a tier needs share, clients or device",
        ),
        ("allocation={kind='tiers', tiers=[]}", "allocation.tiers = .*at least 1 item"),
        (
            "allocation={kind='tiers', tiers=[{rank=9, share=1.0}]}",
            "allocation.tiers = 9: at most adapter.rank, 8",
        ),
        (
            "allocation={kind='loss_based', high_rank=20}",
            "allocation.high_rank = 20: at most adapter.rank, 8",
        ),
    ],
)
def test_mistakes_in_tiers_are_named(setting, line):
    with pytest.raises(InputError, match=line):
        load_config(None, [setting])


def test_loss_based_gives_the_best_the_high_rank():
    policy = LossBased(low_rank=2, high_rank=8, high_share=0.1)
    assert set(ranks(policy, state()).values()) == {2}
    losses = {client: 5.0 - i for i, client in enumerate(CLIENTS)}
    found = ranks(policy, state(1, losses))
    assert {client for client, rank in found.items() if rank == 8} == {"c18", "c19"}
    assert ranks(policy, state(5, losses)) == found
    assert [LossBased(reallocate_every=3).scores_in(r) for r in range(7)] == [1, 0, 0, 1, 0, 0, 1]
    assert [policy.scores_in(r) for r in range(3)] == [True, False, False]


def test_random_slots_change_with_round_and_client_and_are_fair():
    policy = RandomSlotChoice(rank=3)
    plan = policy.allocate(state(), CLIENTS)
    assert all(num_slots(mask) == 6 for mask in plan.values())
    again = policy.allocate(state(), CLIENTS)
    assert all(torch.equal(plan[c]["block.0.q"], again[c]["block.0.q"]) for c in CLIENTS)
    other = policy.allocate(state(round_=1), CLIENTS)
    assert any(not torch.equal(plan[c]["block.0.q"], other[c]["block.0.q"]) for c in CLIENTS)
    counts = sum(
        policy.allocate(state(round_=r), CLIENTS)[c]["block.0.q"].int() for r in range(40) for c in CLIENTS
    )
    assert float(counts.min()) > 0.85 * 800 * 3 / 8
    assert float(counts.max()) < 1.15 * 800 * 3 / 8


def test_policies_hand_out_active_slots_only():
    start = state(1, dict.fromkeys(CLIENTS, 1.0))
    active = {name: torch.arange(8) % 2 == 0 for name in start.active}
    pruned = ServerState(1, 0, start.adapter, active, start.head, start.clients)
    for policy in (
        Uniform(rank=5),
        Tiers(tiers=[{"rank": 5, "share": 1.0}]),
        LossBased(high_rank=8),
        RandomSlotChoice(),
    ):
        for mask in policy.allocate(pruned, CLIENTS).values():
            assert all(not bool((held & ~active[name]).any()) for name, held in mask.items())
