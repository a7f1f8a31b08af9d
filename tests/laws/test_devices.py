"""Fleets and the clock: draws depend on seed, client and round alone; costs add up."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyrank.clock import round_end, session_size
from polyrank.cost import Workload, cost, memory_bytes
from polyrank.device import Setup, deal, find_fleet, packaged
from polyrank.errors import InputError
from polyrank.messages import Training
from polyrank.models.shape import Map, ModelShape
from polyrank.session import batches

NAMES = [f"c{i:02d}" for i in range(80)]
MAPS = [Map(f"b.{b}.{part}", 8, 8, b, part != "o", part == "k") for b in range(3) for part in ("q", "k", "o")]
SHAPE = ModelShape(MAPS, 8, 3, 500, 20, 2, 3, True, True)
numbers = st.floats(0.5, 1e4)
setups = st.builds(
    Setup, st.just("d"), st.just("m"), numbers, numbers, st.floats(0, 1), st.just(10**9),
    *([numbers] * 3), st.floats(0, 1), numbers,
)  # fmt: skip
ranks = st.dictionaries(st.sampled_from([one.name for one in MAPS]), st.integers(1, 8))


def work(held, steps=2, **changes):
    return Workload(SHAPE, held, steps, 4 * steps, 32.0 * steps, 1000, 800, **changes)


def test_every_profile_names_its_source_and_every_fleet_its_devices():
    known = packaged()
    assert len(known.devices) >= 12
    assert {"wifi", "4g", "5g", "lan"} <= set(known.links)
    for fleet in known.fleets.values():
        assert {member.device for member in fleet.members} <= set(known.devices)
        assert {member.link for member in fleet.members} <= set(known.links)
    watts = [[mode.compute_w for mode in device.modes] for device in known.devices.values()]
    assert all(mode == sorted(mode, reverse=True) for mode in watts)  # the first mode is the fastest


def test_jetson80_is_dealt_out_in_its_proportions_and_stays():
    roster = deal("jetson80", NAMES, 3)
    assert Counter(map(roster.device_of, NAMES)) == {
        "jetson-tx2": 30, "jetson-xavier-nx": 40, "jetson-agx-xavier": 10
    }  # fmt: skip
    assert deal("jetson80", NAMES, 3) == roster
    assert deal("jetson80", NAMES, 4) != roster
    assert Counter(map(deal("edge3", NAMES[:7], 0).device_of, NAMES[:7])).total() == 7


@given(st.integers(0, 5), st.sampled_from(NAMES), st.integers(0, 19))
def test_modes_stay_for_an_era_and_speeds_change_every_round(seed, client, round_):
    roster = deal("jetson80", NAMES, seed)
    now, later = roster.setup(client, round_), roster.setup(client, round_ + 1)
    assert now == roster.setup(client, round_)
    assert round_ == 19 or now.mode == later.mode
    assert now.up_bit_per_s != later.up_bit_per_s
    assert 1e6 <= now.up_bit_per_s <= 30e6


def test_modes_are_redrawn():
    roster = deal("jetson80", NAMES, 0)
    changed = [c for c in NAMES if roster.setup(c, 19).mode != roster.setup(c, 20).mode]
    assert 20 < len(changed) < 70


def test_a_fleet_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("""
fleet = { members = [{ device = "toaster", link = "lan" }, { device = "h200", count = 3, link = "lan" }] }
[devices.toaster]
title = "Toaster"
source = "its label"
peak_gflop_per_s = 2
achieved_share = 0.5
bandwidth_gb_per_s = 1
launch_s = 0
memory_gb = 0.1
usable_share = 0.5
modes = [{ name = "brown", speed = 0.5, compute_w = 800 }]
""")
    roster = deal(str(path), NAMES[:8], 0)
    assert Counter(map(roster.device_of, NAMES[:8])) == {"toaster": 2, "h200": 6}
    toaster = next(c for c in NAMES[:8] if roster.device_of(c) == "toaster")
    assert roster.setup(toaster, 0).flop_per_s == 2e9 * 0.5 * 0.5
    assert roster.setup(toaster, 0).usable_bytes == 50_000_000
    path.write_text(path.read_text().replace('"toaster"', '"tosater"'))
    with pytest.raises(InputError, match="tosater.*did you mean 'toaster'"):
        deal(str(path), NAMES, 0)
    path.write_text("fleet = 3")
    with pytest.raises(InputError, match=r"fleet.name = .*in that file"):
        deal(str(path), NAMES, 0)
    with pytest.raises(InputError, match="jetson8.*did you mean 'jetson80'"):
        find_fleet("jetson8")


@given(ranks, setups, st.integers(1, 5))
def test_time_and_energy_add_up_over_steps(held, setup, steps):
    one, many = (cost(work(held, n), setup) for n in (1, steps))
    assert many.compute_s == pytest.approx(steps * one.compute_s)
    radio = setup.radio_w * (one.down_s + one.up_s)
    assert many.energy_j - radio == pytest.approx(steps * (one.energy_j - radio), rel=1e-6, abs=1e-6)
    assert many.memory_bytes == one.memory_bytes


@given(ranks, setups, st.sampled_from([one.name for one in MAPS]))
def test_one_more_slot_never_takes_less(held, setup, name):
    more = {**held, name: held.get(name, 0) + 1}
    less, least = cost(work(more), setup), cost(work(held), setup)
    assert least.backward_s <= less.backward_s
    assert least.forward_s <= less.forward_s
    assert memory_bytes(work(held)) <= memory_bytes(work(more))


@given(ranks, setups, st.sampled_from(["flop_per_s", "bytes_per_s", "down_bit_per_s", "up_bit_per_s"]))
def test_a_faster_device_is_never_slower(held, setup, part):
    faster = dataclasses.replace(setup, **{part: 2 * getattr(setup, part)})
    assert cost(work(held), faster).total_s <= cost(work(held), setup).total_s
    assert cost(work(held), faster).energy_j <= cost(work(held), setup).energy_j


@given(st.lists(numbers, min_size=1, max_size=9), st.floats(0.01, 1), st.one_of(st.none(), numbers))
def test_a_round_ends_when_enough_have_answered_or_at_the_deadline(totals, wait_for, deadline):
    end = round_end(totals, wait_for, deadline)
    in_time = sum(total <= end for total in totals)
    assert end <= max(totals)
    if deadline is None or end < deadline:
        assert in_time >= wait_for * len(totals) - 1e-6
        assert end in totals
    else:
        assert end == deadline
    assert round_end(totals) == max(totals)


@given(st.integers(1, 30), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 12)), st.integers(1, 3))
def test_a_session_is_as_long_as_the_real_one(texts, batch_size, steps, epochs):
    length = {"local_steps": steps} if steps else {"local_epochs": epochs}
    training = Training(batch_size=batch_size, **length)
    real = list(batches(texts, training, 0))
    assert session_size(texts, training) == (len(real), sum(map(len, real)))
