"""Baselines of FedARA and LEGEND: a start from the weights, depth that grows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from polyrank.adapter import block_numbers, delta_weight, full_mask, new_adapter
from polyrank.allocation.progressive_depth import ProgressiveDepth
from polyrank.lowrank import fold, installed, negated, weights_start
from polyrank.models.targets import resolve_targets
from tests.builders import random_adapter, state_of
from tests.conftest import tiny_model
from tests.unit.test_lowrank import IDS


@pytest.mark.parametrize("form", ["lora", "svd"])
def test_a_start_from_the_weights_is_the_base_model(family, form):
    model = tiny_model(family)
    with torch.no_grad():  # large weights, so that attention matters
        for p in model.network.parameters():
            p.mul_(8 if p.ndim == 2 else 1)
    shapes = resolve_targets(model.network, model.blocks, "attention")
    bank = new_adapter(shapes, form=form, rank=3, scale=2.0, seed=0)
    start = weights_start(model.network, bank)
    name, factors = next(iter(start.modules.items()))
    module = model.network.get_submodule(name)
    weight = module.weight.detach() if module.weight.shape == shapes[name] else module.weight.detach().T
    strongest = torch.linalg.svdvals(weight)[:3]
    assert torch.allclose(torch.linalg.svdvals(delta_weight(factors))[:3], strongest, rtol=1e-4)
    with torch.no_grad():
        before = model.network(input_ids=IDS).logits
        fold(model.network, negated(start))
        apart = model.network(input_ids=IDS).logits
        with installed(model.network, [start]):
            together = model.network(input_ids=IDS).logits
    away = float((apart - before).abs().max())
    assert away > 1e-3
    assert float((together - before).abs().max()) < 1e-3 * away


def test_blocks_by_name():
    names = ["bert.encoder.layer.3.attention.self.query", "transformer.h.11.attn.c_attn", "pooler.dense"]
    assert list(block_numbers(names).values()) == [3, 11, 0]


def test_depth_grows_from_the_output():
    shapes = {f"layer.{block}.{m}": (4, 4) for block in range(4) for m in "qv"}
    state = state_of(random_adapter(0, 2, shapes=shapes))
    policy = ProgressiveDepth(first_depth=1, add=2, every=3)
    depths = []
    for round_ in range(8):
        mask = policy.allocate(dataclasses.replace(state, round=round_), ["a"])["a"]
        held = {int(name.split(".")[1]) for name, slots in mask.items() if bool(slots.any())}
        assert held == set(range(4 - len(held), 4))
        assert all(bool(slots.all()) or not bool(slots.any()) for slots in mask.values())
        depths.append(len(held))
    assert depths == [1, 1, 1, 3, 3, 3, 4, 4]
    whole = full_mask(state.adapter)
    assert all(torch.equal(slots, whole[name]) for name, slots in mask.items())


def test_a_federa_run_starts_as_the_base_model_and_serves_the_difference(tiny_settings):
    from polyrank.assemble import prepare
    from polyrank.client import catch_up
    from polyrank.config import load_config
    from polyrank.export import served_adapter
    from polyrank.messages import Folds
    from polyrank.round import federated_round

    experiment = prepare(load_config(settings=[*tiny_settings, "method=federa", "engine.workers=1"]))
    state = experiment.start
    assert max(float(delta_weight(f).abs().max()) for f in state.adapter.modules.values()) > 0.01
    served = served_adapter(state)
    assert max(float(delta_weight(f).abs().max()) for f in served.modules.values()) < 1e-5
    after, record = federated_round(experiment.federation, state)
    assert all(reply.error is None for reply in record.replies)
    assert record.replies[0].bytes_down < 1.1 * record.replies[0].bytes_up  # the start did not travel
    catch_up(experiment.model, [], Folds(0, after.folds))
    assert max(float(delta_weight(f).abs().max()) for f in served_adapter(after).modules.values()) > 1e-6


def test_sparse_rounds_move_their_columns_alone_and_then_start_a_balanced_adapter(tiny_settings):
    from polyrank.assemble import prepare
    from polyrank.config import load_config
    from polyrank.round import federated_round

    settings = [*tiny_settings, "method=slora", "rounds=3", "engine.workers=1", "training.sparse_rounds=2"]
    experiment = prepare(load_config(settings=settings))
    state, sent = experiment.start, []
    name, first = next(iter(state.adapter.modules.items()))
    columns = first.A.argmax(dim=1)
    assert torch.equal(first.A, torch.nn.functional.one_hot(columns, first.A.shape[1]).float())
    assert len(set(columns.tolist())) == first.rank
    for _ in range(3):
        before = state
        state, record = federated_round(experiment.federation, state)
        assert all(reply.error is None for reply in record.replies)
        sent.append((record.replies[0].bytes_down, record.replies[0].bytes_up))
        if state.round == 1:
            moved = delta_weight(state.adapter.modules[name])
            others = [c for c in range(moved.shape[1]) if c not in columns.tolist()]
            assert not bool(moved[:, others].any())
            assert bool(moved[:, columns].any(dim=0).all())
        if state.round == 2:
            factors = state.adapter.modules[name]
            assert torch.allclose(factors.B.norm(dim=0), factors.A.norm(dim=1), rtol=1e-4)
            assert not torch.equal(factors.A, before.adapter.modules[name].A)
    (down0, up0), (down1, up1), (down2, up2) = sent
    assert (down0, up0) == (down1, up1)
    numbers = 4 * sum(f.A.numel() for f in state.adapter.modules.values())
    assert down2 - down0 == pytest.approx(numbers, rel=0.02)
    assert up2 - up0 == pytest.approx(numbers, rel=0.02)


def test_the_server_balances_without_changing_the_product():
    from polyrank.aggregation.product import rebalanced

    bank = random_adapter(3, 4, shapes={"a": (9, 7), "b": (5, 8)})
    even = rebalanced(bank)
    for name, factors in bank.modules.items():
        assert torch.allclose(delta_weight(factors), delta_weight(even.modules[name]), atol=1e-5)
        norms = even.modules[name].B.norm(dim=0)
        assert torch.allclose(norms, even.modules[name].A.norm(dim=1), rtol=1e-4)
