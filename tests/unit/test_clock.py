"""A round on simulated devices: what is priced, who is late, what the server learns, what the ledger says."""

from __future__ import annotations

import dataclasses
import json

import pytest

from polyrank.adapter import num_slots
from polyrank.aggregation import LayerWise
from polyrank.allocation import Legend, LossBased, Tiers, Uniform
from polyrank.checkpoint import load_state, save_state
from polyrank.clock import FleetTable, make_clock
from polyrank.config import load_config, make_config
from polyrank.cost import cost
from polyrank.errors import InputError, RunError
from polyrank.ledger import client_rows, round_row, simulated_totals
from polyrank.messages import Training
from polyrank.models.shape import shape_of
from polyrank.round import federated_round
from tests.conftest import tiny_model
from tests.unit.test_round import federation


def simulated(name="jetson80", stores=True, **changes):
    """Four clients of the tiny model on a fleet."""
    fed, state = federation(**changes)
    texts = {client: env.train.sizes for client, env in fed.engine.engine.environments.items()}
    model = dataclasses.replace(tiny_model(), skips=True)
    clock = make_clock(FleetTable(name=name), shape_of(model), texts, 0, stores)
    records = {
        client: dataclasses.replace(
            record,
            device=clock.roster.device_of(client),
            capacity=clock.register(client, state.adapter, fed.training, fed.untrained == "frozen"),
        )
        for client, record in state.clients.items()
    }
    return dataclasses.replace(fed, clock=clock), dataclasses.replace(state, clients=records)


def test_what_is_simulated_changes_nothing_that_is_trained():
    plain, state = federation()
    after, _ = federated_round(plain, state)
    timed, _ = federated_round(*simulated())
    assert all((f.B == timed.adapter.modules[n].B).all() for n, f in after.adapter.modules.items())


def test_a_round_is_over_when_the_slowest_is_done_and_the_ledger_says_so():
    fed, state = simulated()
    _, record = federated_round(fed, state)
    row, rows = round_row(record, None), client_rows(record)
    totals = [one["simulated"]["total_s"] for one in rows]
    assert row["simulated_s"] == max(totals)
    assert row["waiting_s"] == pytest.approx(sum(max(totals) - total for total in totals) / 4)
    assert row["energy_j"] == pytest.approx(sum(one["simulated"]["energy_j"] for one in rows))
    assert (row["late"], row["over_memory"]) == (0, 0)
    for one in rows:
        told = one["simulated"]
        assert told["total_s"] == pytest.approx(told["down_s"] + told["compute_s"] + told["up_s"])
        setup = fed.clock.roster.setup(one["client"], 0)
        assert told["up_s"] == setup.latency_s + 8 * one["bytes_up"] / setup.up_bit_per_s
        assert told["depth"] == 2
        assert told["ranks"] == [3, 3]
    assert simulated_totals([row, row])["simulated_s"] == 2 * row["simulated_s"]
    assert simulated_totals([row, row | {"over_memory": 3}])["over_memory"] == 3
    json.dumps(rows, allow_nan=False)


def test_the_late_are_dropped_but_their_bytes_and_joules_count():
    fed, state = simulated()
    _, whole = federated_round(fed, state)
    totals = sorted(reply.priced.cost.total_s for reply in whole.replies)
    slowest = max(whole.replies, key=lambda reply: reply.priced.cost.total_s)
    for change in ({"deadline_s": (totals[2] + totals[3]) / 2}, {"wait_for": 0.75}):
        cut = dataclasses.replace(fed, clock=dataclasses.replace(fed.clock, **change))
        after, record = federated_round(cut, state)
        late = [reply for reply in record.replies if not reply.counts]
        assert [reply.client for reply in late] == [slowest.client]
        assert late[0].error == "late"
        row, full = round_row(record, None), round_row(whole, None)
        assert row["simulated_s"] < full["simulated_s"]
        assert (row["cohort"], row["late"], row["failed"]) == (3, 1, 0)
        assert row["energy_j"] == full["energy_j"]
        assert (row["bytes_up"], row["bytes_down"]) == (full["bytes_up"], full["bytes_down"])
        alone, _ = federated_round(dataclasses.replace(cut, aggregation=LayerWise()), state)
        assert all((f.B == alone.adapter.modules[n].B).all() for n, f in after.adapter.modules.items())
    by_loss = LossBased(low_rank=1, high_rank=3, score="client")
    after, record = federated_round(dataclasses.replace(cut, allocation=by_loss), state)
    late = {reply.client for reply in record.replies if reply.error == "late"}
    assert {client for client, known in after.clients.items() if known.loss is None} == late
    assert len(late) == 1
    never = dataclasses.replace(fed, clock=dataclasses.replace(fed.clock, deadline_s=1e-9))
    with pytest.raises(RunError, match="late"):
        federated_round(never, state)


def test_a_stored_prefix_is_paid_for_once(tmp_path):
    fed, state = simulated(allocation=Uniform(depth=1))
    state, first = federated_round(fed, state)
    assert all(record.stored == 1 for record in state.clients.values())
    save_state(state, tmp_path / "state")
    assert load_state(tmp_path / "state").clients == state.clients  # with what is known of the devices
    _, second = federated_round(fed, state)
    assert all(reply.priced.cost.store_s > 0 for reply in first.replies)
    assert all(reply.priced.cost.store_s == 0 for reply in second.replies)
    fed, state = simulated(allocation=Uniform(depth=1), stores=False)
    _, record = federated_round(fed, state)
    assert all(reply.priced.stored == 0 and reply.priced.depth == 1 for reply in record.replies)


def test_the_server_learns_how_fast_devices_are():
    fed, state = simulated(allocation=Legend(), aggregation=LayerWise())
    after, record = federated_round(fed, state)
    for reply in record.replies:
        known, learned = state.clients[reply.client].capacity, after.clients[reply.client].capacity
        depth, spent = reply.priced.depth, reply.priced.cost
        compute_s, link_s = spent.forward_s + spent.backward_s, spent.down_s + spent.up_s
        assert learned == fed.allocation.learn(known, depth, reply.slots, compute_s, link_s)
        assert learned.seconds(depth, reply.slots) == pytest.approx(
            0.8 * known.seconds(depth, reply.slots) + 0.2 * (compute_s + link_s), rel=1e-6
        )


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("untrained", ["absent", "frozen"])
def test_what_a_device_says_of_itself_is_what_it_takes(depth, untrained):
    changes = {"allocation": Uniform(depth=depth), "untrained": untrained}
    fed, state = simulated(stores=untrained == "frozen", **changes)  # frozen adapters keep it from storing
    for client, record in state.clients.items():
        _, round_ = federated_round(fed, state)
        reply = next(reply for reply in round_.replies if reply.client == client)
        trained = num_slots(reply.learned.mask)
        told = record.capacity.seconds(depth, trained)
        spent, own = reply.priced.cost, record.capacity
        assert told == pytest.approx(spent.total_s, rel=0.1)
        assert own.compute_fixed_s + depth * own.block_s == pytest.approx(spent.compute_s, rel=1e-3)
        waits_s = 2 * fed.clock.roster.setup(client, 0).latency_s
        link_s = own.link_fixed_s + trained * own.slot_s - waits_s
        assert link_s == pytest.approx(spent.down_s + spent.up_s - waits_s, rel=0.1)
        assert own.max_depth == 2


def test_memory_limits_the_depth():
    fed, state = simulated()
    work = fed.clock.register("c0", state.adapter, fed.training)
    name, device, link = fed.clock.roster.owned["c0"]
    for room in range(3):
        sizes = [cost_of(fed, state, depth) for depth in (1, 2)]
        limit = [sizes[0] - 1, sizes[0] + 1, sizes[1] + 1][room]
        small = device.model_copy(update={"memory_gb": (limit + 0.5) / 1e9, "usable_share": 1.0})
        roster = dataclasses.replace(fed.clock.roster, owned={"c0": (name, small, link)})
        clock = dataclasses.replace(fed.clock, roster=roster)
        found = clock.register("c0", state.adapter, fed.training)
        assert found == dataclasses.replace(work, max_depth=room)


def cost_of(fed, state, depth):
    held = [n for n in state.adapter.modules if depth == 2 or ".1." in n]
    work = fed.clock._workload("c0", fed.training, dict.fromkeys(held, 3), {}, (0, 0))
    return cost(work, fed.clock.roster.setup("c0", 0)).memory_bytes


def test_tiers_by_device():
    _, state = simulated("edge3")
    devices = {client: record.device for client, record in state.clients.items()}
    tiers = Tiers(tiers=[{"rank": 2, "device": "raspberry-pi-5"}, {"rank": 1, "device": "jetson-orin-nano"}])
    masks = tiers.allocate(state, list(state.clients))
    for client, mask in masks.items():
        ranks = {int(held.sum()) for held in mask.values()}
        assert ranks == {{"raspberry-pi-5": 2, "jetson-orin-nano": 1}.get(devices[client], 3)}
    wrong = Tiers(tiers=[{"rank": 2, "device": "raspberry"}])
    with pytest.raises(InputError, match=r"tiers.device = 'raspberry'.*did you mean 'raspberry-pi-5'"):
        wrong.allocate(state, list(state.clients))
    with pytest.raises(InputError, match="one of them alone"):
        make_config({"allocation": {"kind": "tiers", "tiers": [{"rank": 2, "device": "x", "share": 0.1}]}})


@pytest.mark.parametrize(
    "given",
    [
        {"allocation": {"kind": "legend"}, "aggregation": {"kind": "layer_wise"}},
        {"allocation": {"kind": "uniform", "depth": "weakest"}},
        {
            "allocation": {"kind": "tiers", "tiers": [{"rank": 2, "device": "h200"}]},
            "aggregation": {"kind": "layer_wise"},
        },
    ],
)
def test_policies_by_device_need_a_fleet(given):
    with pytest.raises(InputError, match=r"^fleet = None: must be given"):
        make_config(given)
    assert make_config({**given, "fleet": {"name": "edge3"}}).fleet.wait_for == 1.0


def test_bad_fleets_are_told_in_one_line():
    for setting, message in {
        "fleet.deadline_s=0": "fleet.deadline_s = 0: must be greater than 0",
        "fleet.wait_for=2": "fleet.wait_for = 2: must be less than or equal to 1",
        "fleet.nam=3": "fleet.nam = 3: unknown key; did you mean 'name'",
    }.items():
        with pytest.raises(InputError) as error:
            load_config(None, [setting])
        assert message in str(error.value)


def test_training_time_of_sgd_and_adamw_differ_in_memory_alone():
    fed, state = simulated()
    sizes = []
    for optimizer in ("sgd", "adamw"):
        training = Training(local_steps=2, batch_size=3, optimizer=optimizer)
        _, record = federated_round(dataclasses.replace(fed, training=training), state)
        sizes.append(record.replies[0].priced.cost)
    assert sizes[0].compute_s == sizes[1].compute_s
    assert sizes[0].memory_bytes < sizes[1].memory_bytes
