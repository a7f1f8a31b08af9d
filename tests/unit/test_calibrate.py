"""Calibration: a machine's rates are found again from its steps, and a profile survives its file."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

from polyrank.calibrate import CALIBRATION, Step, demand_of, fit, measure, profile_toml, workload_of
from polyrank.cli import main
from polyrank.cost import Demand
from polyrank.device import find_fleet, packaged
from polyrank.models.shape import shape_of


def test_the_rates_of_a_machine_are_found_from_its_steps(minilm):
    shape = dataclasses.replace(shape_of(minilm), skips=True)
    demands = [demand_of(workload_of(minilm, shape, step)) for step in CALIBRATION]
    true = [d.flop / 1e11 + d.moved_bytes / 2e10 + d.operations * 2e-5 for d in demands]
    assert fit(demands, true) == pytest.approx((1e11, 2e10, 2e-5))
    noise = 1 + 0.03 * np.random.default_rng(0).standard_normal(len(true))
    flop_per_s, bytes_per_s, launch_s = fit(demands, true * noise)
    for demand, seconds in zip(demands, true, strict=True):
        told = demand.flop / flop_per_s + demand.moved_bytes / bytes_per_s + demand.operations * launch_s
        assert told == pytest.approx(seconds, rel=0.05)
    with pytest.raises(ValueError, match="do not depend"):
        fit([Demand(1.0, 1.0, n) for n in (1.0, 2.0)], [1.0, 2.0])


def test_more_depth_takes_longer_on_this_machine(minilm):
    steps = [Step(depth, 2, 2, 16) for depth in (1, 6)]
    turns = [[measure(minilm, step, steps=2) for step in steps] for _ in range(3)]
    top, all_blocks = (min(column) for column in zip(*turns, strict=True))
    assert 1.2 * top < all_blocks


def test_a_profile_survives_its_file(tmp_path):
    device = packaged().devices["jetson-tx2"]
    (tmp_path / "fleet.toml").write_text(profile_toml("mine", device))
    known, fleet = find_fleet(str(tmp_path / "fleet.toml"))
    assert known.devices["mine"] == device
    assert fleet.members[0].device == "mine"


def test_calibrate_writes_a_fleet_of_what_was_measured(tmp_path, monkeypatch, capsys):
    """A machine of 2 GFLOP/s and 4 GB/s that loses 10 us per operation, as the command writes it."""

    def measured(model, step, cache=None, steps=6):
        demand = demand_of(workload_of(model, shape_of(model), step))
        return demand.flop / 2e9 + demand.moved_bytes / 4e9 + demand.operations * 1e-5

    monkeypatch.setattr("polyrank.calibrate.measure", measured)
    path = tmp_path / "mine.toml"
    words = ["device", "calibrate", "--out", str(path), "--watts", "7", "--name", "mine"]
    monkeypatch.setattr(sys, "argv", ["polyrank", *words])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    assert end.value.code == 0, told.err
    assert "13 kinds of step, fitted within 0%" in told.out
    known, fleet = find_fleet(str(path))
    device = known.devices[fleet.members[0].device]
    assert fleet.members[0].device == "mine"
    assert device.peak_gflop_per_s * device.achieved_share == pytest.approx(2, rel=1e-3)
    assert device.bandwidth_gb_per_s == pytest.approx(4, rel=1e-3)
    assert device.launch_s == pytest.approx(1e-5, rel=1e-3)
    assert (device.modes[0].compute_w, device.cuda) == (7, False)
