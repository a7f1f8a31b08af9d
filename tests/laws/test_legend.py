"""LEGEND's plan: ranks never fall toward the output; nobody is over its memory or the deadline."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyrank.adapter import full_mask, num_slots
from polyrank.allocation import Legend, Uniform
from polyrank.allocation.legend import deepest, options_of, schedule
from polyrank.state import Capacity, ClientRecord, ServerState
from tests.builders import random_adapter, random_head

BLOCKS, RANK = 4, 6
SHAPES = {f"layer.{block}.{part}": (3, 4) for block in range(BLOCKS) for part in ("q", "v")}
BANK = random_adapter(0, RANK, "svd", SHAPES)
seconds = st.floats(0.01, 50)
capacities = st.builds(Capacity, seconds, seconds, seconds, st.floats(0.001, 1), st.integers(1, BLOCKS))
fleets = st.lists(capacities, min_size=1, max_size=6)
policies = st.builds(
    Legend,
    rank_budget=st.one_of(st.none(), st.integers(1, 40)),
    max_waiting=st.floats(0, 1),
    min_holders=st.integers(1, 3),
    per_device_ranks=st.booleans(),
)


def state(fleet, **changes):
    records = {f"c{i}": ClientRecord(capacity=one) for i, one in enumerate(fleet)}
    return ServerState(0, 0, BANK, full_mask(BANK), random_head(0), records, **changes)


def ranks_by_block(mask):
    return [[int(mask[f"layer.{block}.{part}"].sum()) for part in ("q", "v")] for block in range(BLOCKS)]


@given(st.integers(1, 24), st.integers(1, 200), st.floats(0, 4), st.integers(1, 16))
def test_ranks_never_fall_toward_the_output(blocks, budget, slope, most):
    ranks = schedule(blocks, budget, slope, most)
    assert ranks == sorted(ranks)
    assert ranks[0] >= 1 and ranks[-1] <= most  # noqa: PT018
    if slope == 0:
        assert abs(sum(ranks) - min(max(budget, blocks), blocks * most)) <= blocks / 2


def test_schedules_by_hand():
    assert schedule(6, 24, 0, 8) == [4] * 6
    assert schedule(6, 24, 1, 8) == [1, 2, 3, 4, 5, 6]  # 21, as close as the 27 of 2 to 7, and smaller
    assert schedule(6, 25, 1, 8) == [2, 3, 4, 5, 6, 7]
    assert schedule(6, 12, 0.5, 8) == [1, 1, 2, 2, 3, 3]
    assert schedule(6, 99, 1, 8) == [8] * 6
    assert schedule(3, 9, 2, 8) == [1, 3, 5]


@given(fleets, policies)
def test_nobody_is_over_its_memory_or_the_deadline_and_all_is_a_top(fleet, policy):
    now = state(fleet)
    choice = policy.choose(now)
    masks = policy.allocate(now, list(now.clients))
    for capacity, depth, predicted, mask in zip(
        fleet, choice.depth, choice.seconds, masks.values(), strict=True
    ):
        assert 1 <= depth <= capacity.max_depth
        assert predicted <= choice.deadline_s * (1 + 1e-12)
        assert predicted == pytest.approx(capacity.seconds(depth, num_slots(mask)))
        held = ranks_by_block(mask)
        flat = [pair[0] for pair in held]
        assert all(a == b for a, b in held)
        assert flat == sorted(flat)  # ranks never fall, and nothing lies below what is held
        assert sum(rank > 0 for rank in flat) == depth


@given(fleets, policies)
def test_the_choice_is_the_best_of_all_that_keep_to_the_limits(fleet, policy):
    """Those that break a limit come after all that keep them; then rounds times seconds decide."""

    def loss(option, held):
        slowest = max(option.seconds)
        waits = slowest - float(np.mean(option.seconds)) > policy.max_waiting * slowest
        holders = sum(depth == BLOCKS for depth in option.depth)
        trained = float(np.mean([held[depth - 1] for depth in option.depth]))
        return waits or holders < policy.min_holders, slowest / trained**policy.rounds_power

    chosen, losses = policy.choose(state(fleet)), []
    own = None
    for ranks, held in policy._schedules(state(fleet)):
        for option in options_of(ranks, held, fleet, 1):
            losses.append(loss(option, held))
            own = losses[-1] if option == chosen else own
    breaks, cost = min(losses)
    assert own is not None
    assert own[0] == breaks
    assert own[1] == pytest.approx(cost, rel=1e-8)


@given(fleets, policies, st.floats(0.1, 200))
def test_a_deadline_of_the_users_own_is_kept_where_it_can_be(fleet, policy, deadline):
    free = policy.choose(state(fleet))
    bound = policy.model_copy(update={"deadline_s": deadline}).choose(state(fleet))
    options = [o for r, held in policy._schedules(state(fleet)) for o in options_of(r, held, fleet, 1)]
    least = min(option.deadline_s for option in options)
    assert max(bound.seconds) <= max(deadline, least)
    if max(option.deadline_s for option in options) <= deadline:
        assert bound == free


@given(capacities, policies, st.integers(2, 5))
def test_equal_devices_get_equal_plans(one, policy, count):
    now = state([one] * count)
    masks = list(policy.allocate(now, list(now.clients)).values())
    assert all(torch.equal(mask[name], masks[0][name]) for mask in masks for name in mask)
    assert max(policy.choose(now).seconds) == min(policy.choose(now).seconds)


@given(fleets, st.sampled_from(["compute_fixed_s", "block_s", "link_fixed_s", "slot_s"]), st.floats(0.1, 1))
def test_at_one_deadline_a_faster_device_never_goes_less_deep(fleet, part, share):
    slots = np.arange(1, BLOCKS + 1) * RANK
    room = np.array([one.max_depth for one in fleet])

    def depths(devices, deadline):
        times = np.array([[d.seconds(k, int(slots[k - 1])) for k in range(1, BLOCKS + 1)] for d in devices])
        return deepest(times, room, deadline), times

    faster = [dataclasses.replace(one, **{part: share * getattr(one, part)}) for one in fleet]
    for deadline in depths(fleet, 1.0)[1].flatten():
        before, after = depths(fleet, deadline)[0], depths(faster, deadline)[0]
        assert (after >= before).all()


@given(capacities, st.integers(1, BLOCKS), st.floats(0.5, 20), st.floats(0.5, 20))
def test_estimates_move_toward_what_a_device_took(known, depth, slower, farther):
    policy, slots = Legend(), depth * RANK
    compute = known.compute_fixed_s + depth * known.block_s
    link = known.link_fixed_s + slots * known.slot_s
    after = policy.learn(known, depth, slots, slower * compute, farther * link)
    assert after.compute_fixed_s + depth * after.block_s == pytest.approx((0.8 + 0.2 * slower) * compute)
    assert after.link_fixed_s + slots * after.slot_s == pytest.approx((0.8 + 0.2 * farther) * link)
    same = policy.learn(known, depth, slots, compute, link)
    assert same.seconds(depth, slots) == pytest.approx(known.seconds(depth, slots))
    assert after.max_depth == known.max_depth
    idle = policy.learn(known, 0, 0, slower * compute, farther * known.link_fixed_s)
    assert (idle.compute_fixed_s, idle.block_s) == (known.compute_fixed_s, known.block_s)
    assert idle.link_fixed_s == pytest.approx((0.8 + 0.2 * farther) * known.link_fixed_s)


def test_a_session_without_blocks_leaves_estimates_positive():
    """The constant part of a device's time is extrapolated, and may be below zero."""
    known = Capacity(-0.1, 0.3, 0.1, 0.001, 4)
    after = Legend().learn(known, 0, 0, 5.0, 0.1)
    assert after.seconds(1, RANK) == pytest.approx(known.seconds(1, RANK))


def test_a_slow_device_goes_less_deep_and_the_reason_is_told():
    fast, slow = Capacity(1, 1, 0.1, 0.001, 4), Capacity(4, 4, 0.1, 0.001, 4)
    small = Capacity(1, 1, 0.1, 0.001, 2)
    choice = Legend(max_waiting=1).choose(state([fast, slow, small]))
    assert choice.depth[0] == 4
    assert choice.depth[1] < 4
    assert choice.depth[2] == 2
    assert choice.bound == ["nothing", "deadline", "memory"]


def test_waiting_is_limited_by_hand():
    """Depth 1 of the slow device waits 0.5 of 2 s, depth 4 waits 2 of 5 s and trains more."""
    fleet = [Capacity(1, 1, 0, 0, 4), Capacity(1, 0, 0, 0, 4)]
    free = Legend(slopes=(0.0,), rounds_power=3.0, max_waiting=1.0)
    assert free.choose(state(fleet)).depth == [4, 4]
    assert free.choose(state(fleet)).seconds == [5, 1]
    held = free.model_copy(update={"max_waiting": 0.3}).choose(state(fleet))
    assert (held.depth, held.seconds, held.deadline_s) == ([1, 4], [2, 1], 2)
    shallow = [Capacity(1, 1, 0, 0, 4), Capacity(1, 1, 0, 0, 4)]
    few = Legend(slopes=(0.0,), rounds_power=0.0, min_holders=2).choose(state(shallow))
    assert few.depth == [4, 4]  # the least time would be depth 1, but somebody must hold the first block


def test_after_a_vote_the_active_slots_are_the_ranks():
    fleet = [Capacity(1, 1, 0.1, 0.001, 4), Capacity(1, 1, 0.1, 0.001, 1)]
    shares = {name: torch.ones(RANK, dtype=torch.float64) for name in BANK.modules}
    now = state(fleet, shares=shares)
    now.active["layer.3.v"][1] = False
    deep, shallow = Legend(max_waiting=1, min_holders=1).allocate(now, ["c0", "c1"]).values()
    assert all(torch.equal(deep[name], held) for name, held in now.active.items())
    assert ranks_by_block(shallow) == [[0, 0], [0, 0], [0, 0], [6, 5]]
    opening = Legend(rank_budget=8, slopes=(1.0,), max_waiting=1).opening(state(fleet))
    assert [pair[0] for pair in ranks_by_block(opening)] == sorted(schedule(4, 8, 1.0, 6))


@given(fleets, fleets, policies)
def test_where_devices_vote_the_first_ranks_stay_and_depths_alone_are_chosen(fleet, later, policy):
    """Before anybody has voted, too, whatever is learned of the devices meanwhile."""
    opening = policy.opening(state(fleet))
    now = dataclasses.replace(state(later), active=opening)
    ranks = ranks_by_block(opening)
    for mask in policy.allocate(now, list(now.clients)).values():
        held = ranks_by_block(mask)
        depth = sum(block != [0, 0] for block in held)
        assert held == [[0, 0]] * (BLOCKS - depth) + ranks[BLOCKS - depth :]


def test_uniform_opens_with_what_is_held():
    opening = Uniform(rank=2, depth=3).opening(state([]))
    assert ranks_by_block(opening) == [[0, 0], [2, 2], [2, 2], [2, 2]]


def test_uniform_at_the_weakest_device_and_at_a_depth():
    fleet = [Capacity(1, 1, 0.1, 0.001, 4), Capacity(1, 1, 0.1, 0.001, 2)]
    (mask, other) = Uniform(depth="weakest", rank=3).allocate(state(fleet), ["c0", "c1"]).values()
    assert mask is other
    assert ranks_by_block(mask) == [[0, 0], [0, 0], [3, 3], [3, 3]]
    assert ranks_by_block(Uniform(depth=1).allocate(state(fleet), ["c0"])["c0"])[2:] == [[0, 0], [6, 6]]
    with pytest.raises(ValueError, match="capacity"):
        Legend().choose(dataclasses.replace(state(fleet), clients={"c0": ClientRecord()}))
