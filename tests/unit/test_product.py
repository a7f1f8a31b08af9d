"""The SVD of a product of factors against dense float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from polyrank.adapter import Adapter, delta_weight
from polyrank.aggregation import Anchored, RankPartition, Stacking, SvdRedistribution
from polyrank.aggregation.product import truncated_svd
from tests.builders import random_adapter, state_of, update_of


def factors(kind, out, in_, rank):
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(out, rank, generator=draw), torch.randn(rank, in_, generator=draw)
    if kind == "falling":  # singular values over twelve powers of ten
        fall = torch.logspace(0, -6, rank)
        return left * fall, fall[:, None] * right
    if kind == "opposed":  # each side falls, the product does not
        return left * torch.logspace(0, -6, rank), torch.logspace(-6, 0, rank)[:, None] * right
    if kind == "copies":  # clients that learned the same: the rank is an eighth of the sum of ranks
        few = rank // 8
        return left[:, :few].repeat(1, 8), right[:few].repeat(8, 1)
    return left, right


@pytest.mark.parametrize("kind", ["random", "falling", "opposed", "copies"])
@pytest.mark.parametrize("sizes", [(400, 300, 128), (300, 400, 128), (100, 300, 128), (90, 80, 128)])
def test_singular_values_and_vectors_are_those_of_the_dense_product(kind, sizes):
    left, right = factors(kind, *sizes)
    U, s, Vh = truncated_svd(left, right, 16)
    product = left.double() @ right.double()
    exact = torch.linalg.svdvals(product)
    assert float((s - exact[:16]).abs().max() / exact[0]) < 3e-7
    alive = s > 1e-5 * s[0]
    for vectors in (U[:, alive], Vh[alive].T):
        gram = vectors.T.double() @ vectors.double()
        assert float((gram - torch.eye(int(alive.sum()))).abs().max()) < 1e-5
    rest = float((product - (U.double() * s) @ Vh.double()).norm())
    assert rest == pytest.approx(float(exact[16:].norm()), rel=1e-3, abs=2e-6 * float(product.norm()))


def test_a_zero_product_has_zero_values():
    U, s, Vh = truncated_svd(torch.zeros(6, 2), torch.randn(2, 5), 4)
    assert s.tolist() == [0.0, 0.0]
    assert bool(torch.isfinite(U).all() and torch.isfinite(Vh).all())


@pytest.mark.parametrize("rule", [SvdRedistribution(), RankPartition(), Anchored(), Stacking()], ids=repr)
def test_product_rules_take_bf16_updates(rule):
    shapes = {"tall": (20, 24), "low": (3, 4)}
    bank = random_adapter(0, 4, shapes=shapes)
    wide = [update_of("c", random_adapter(number, 4, shapes=shapes)) for number in (1, 2)]
    narrow = [dataclasses.replace(u, adapter=cast(u.adapter, torch.bfloat16)) for u in wide]
    same = [dataclasses.replace(u, adapter=cast(u.adapter, torch.float32)) for u in narrow]
    first, second = (rule.aggregate(state_of(bank), updates) for updates in (narrow, same))
    for name, merged in first.adapter.modules.items():
        assert merged.B.dtype == merged.A.dtype == torch.float32
        one, two = delta_weight(merged), delta_weight(second.adapter.modules[name])
        assert float((one - two).abs().max()) < 1e-5


def cast(adapter, dtype):
    modules = {
        name: f.with_tensors({part: t.to(dtype) for part, t in f.tensors().items()})
        for name, f in adapter.modules.items()
    }
    return Adapter(adapter.form, modules)
