"""fedavg with numbers that a person can work out."""

from __future__ import annotations

import pytest
import torch

from polyrank.adapter import Adapter, Factors, full_mask, prefix_mask
from polyrank.aggregation import FedAvg
from polyrank.aggregation.base import client_weights
from polyrank.errors import InputError
from tests.builders import random_adapter, slot_mean, state_of, update_of


def constant(value: float, rank: int = 2) -> Adapter:
    return Adapter("lora", {"q": Factors(torch.full((3, rank), value), torch.full((rank, 4), -value), 1.0)})


def test_two_clients_by_examples_and_by_heads():
    state = state_of(constant(9.0))
    updates = [
        update_of("a", constant(1.0), num_examples=30, head={"score.weight": torch.tensor([0.0, 4.0])}),
        update_of("b", constant(5.0), num_examples=10, head={"score.weight": torch.tensor([4.0, 0.0])}),
    ]
    state = state_of(constant(9.0)).__class__(0, 0, constant(9.0), state.active, updates[0].head)
    merged = FedAvg().aggregate(state, updates)
    assert torch.equal(merged.adapter.modules["q"].B, torch.full((3, 2), 2.0))
    assert torch.equal(merged.adapter.modules["q"].A, torch.full((2, 4), -2.0))
    assert torch.equal(merged.head["score.weight"], torch.tensor([1.0, 3.0]))
    equal = FedAvg(weights="uniform").aggregate(state, updates)
    assert torch.equal(equal.adapter.modules["q"].B, torch.full((3, 2), 3.0))


def test_weights_sum_to_one():
    updates = [update_of(name, constant(1.0), num_examples=n) for name, n in [("a", 1), ("b", 3)]]
    assert client_weights(updates, "examples") == [0.25, 0.75]
    assert client_weights(updates, "uniform") == [0.5, 0.5]


def test_slot_mean_averages_each_slot_over_its_holders():
    bank = constant(9.0, rank=3)
    one = torch.tensor([True, False, False])
    two = torch.tensor([True, True, False])
    updates = [
        update_of("a", constant(1.0, rank=3), {"q": one}),
        update_of("b", constant(3.0, rank=3), {"q": two}),
    ]
    mean = slot_mean(bank, updates, [0.75, 0.25]).modules["q"]
    assert torch.allclose(mean.A[:, 0], torch.tensor([-1.5, -3.0, -9.0]))
    assert torch.allclose(mean.B[0], torch.tensor([1.5, 3.0, 9.0]))


def test_unequal_ranks_are_refused():
    bank = random_adapter(0, 3)
    updates = [update_of("a", bank, full_mask(bank)), update_of("b", bank, prefix_mask(bank, 2))]
    with pytest.raises(InputError, match="aggregation.kind = 'fedavg': needs equal ranks"):
        FedAvg().aggregate(state_of(bank), updates)
