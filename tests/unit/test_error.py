"""The aggregation error against dense float64 products, for few and for many clients."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from polyrank.adapter import Adapter, Factors, delta_weight, embed, full_mask, mask_and, prefix_mask
from polyrank.aggregation import LayerWise, Stacking
from polyrank.aggregation.base import Aggregated
from polyrank.aggregation.error import aggregation_error
from tests.builders import random_adapter, state_of, update_of

SHAPES = {"block.0.q": (20, 24), "block.1.q": (16, 12)}
RANK = 4


def rescaled(adapter, scales=(0.5, 6.0)):
    """The adapter with a scale of its own for each module."""
    pairs = zip(adapter.modules.items(), scales, strict=True)
    return Adapter(adapter.form, {name: dataclasses.replace(f, scale=scale) for (name, f), scale in pairs})


def only(adapter, mask):
    """The adapter with all other slots zero."""
    modules = {n: dataclasses.replace(f, B=f.B * mask[n]) for n, f in adapter.modules.items()}
    return Adapter(adapter.form, modules)


def dense_error(bank, active, merged, updates, frozen):
    far = near = 0.0
    there, next_bank = only(bank, active), only(merged.adapter, active)
    for name in bank.modules:
        mean = torch.zeros(SHAPES[name], dtype=torch.float64)
        for update in updates:
            held = embed(update.adapter, update.mask, there) if frozen else update.adapter
            if name in held.modules:
                mean += update.num_examples * delta_weight(held.modules[name]).double()
        mean /= sum(update.num_examples for update in updates)
        served = delta_weight(next_bank.modules[name]).double()
        if merged.fold is not None:
            served = served + delta_weight(merged.fold.modules[name]).double()
        near += float(mean.square().sum())
        far += float((served - mean).square().sum())
    return (far / near) ** 0.5


@pytest.mark.parametrize("clients", [1, 3, 30], ids="{} clients".format)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("form", ["lora", "svd"])
@pytest.mark.parametrize("out", [None, 1], ids=["all active", "one voted out"])
def test_the_error_is_that_of_dense_products(clients, frozen, form, out):
    bank = rescaled(random_adapter(0, RANK, form, SHAPES))
    active = {name: torch.arange(RANK) != out for name in bank.modules}
    ranks = [1 + number % RANK for number in range(clients)]
    updates = [
        update_of(
            "c",
            rescaled(random_adapter(10 + number, RANK, form, SHAPES)),
            mask_and(prefix_mask(bank, rank), active),
            rank,
        )
        for number, rank in enumerate(ranks)
    ]
    for rule in (LayerWise(), Stacking()):
        merged = rule.aggregate(state_of(bank), updates)
        error, expected = (f(bank, active, merged, updates, frozen) for f in (aggregation_error, dense_error))
        assert error == pytest.approx(expected, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("clients", [1, 30], ids="{} clients".format)
def test_bf16_updates_are_widened_before_they_are_weighted(clients):
    bank = random_adapter(0, RANK, shapes=SHAPES)
    updates = []
    for number in range(clients):
        modules = {
            name: Factors(f.B.bfloat16(), f.A.bfloat16(), 0.7)
            for name, f in random_adapter(1 + number, RANK, shapes=SHAPES).modules.items()
        }
        update = update_of("c", bank, num_examples=3)
        updates.append(dataclasses.replace(update, adapter=Adapter("lora", modules)))
    wide = [
        dataclasses.replace(
            u,
            adapter=Adapter(
                "lora",
                {
                    n: f.with_tensors({part: t.float() for part, t in f.tensors().items()})
                    for n, f in u.adapter.modules.items()
                },
            ),
        )
        for u in updates
    ]
    merged = LayerWise().aggregate(state_of(bank), updates)
    narrow, expected = (
        aggregation_error(bank, full_mask(bank), merged, some, False) for some in (updates, wide)
    )
    assert narrow == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_a_module_counts_with_its_scale():
    """One module right, one served as zero; their products are scale x 1 and scale x 2."""

    def adapter(first, second):
        def one(value, scale):
            return Factors(torch.tensor([[value]]), torch.tensor([[1.0]]), scale)

        return Adapter("lora", {"a": one(first, 3.0), "b": one(second, 0.5)})

    bank = adapter(0.0, 0.0)
    updates = [update_of("c", adapter(1.0, 2.0), num_examples=n) for n in (1, 5)]
    far, near = 0.5 * 2, ((3.0 * 1) ** 2 + (0.5 * 2) ** 2) ** 0.5
    error = aggregation_error(bank, full_mask(bank), Aggregated(adapter(1.0, 0.0), {}), updates, False)
    assert error == pytest.approx(far / near)
