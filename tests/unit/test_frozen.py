"""The packed bf16 path against the plain one: values, gradients, folding, names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from polyrank.lowrank import fold
from polyrank.models.frozen import bf16_is_fast, is_packed, pack, pack_blocks
from polyrank.session import ClientEnv, train
from tests.builders import random_adapter
from tests.conftest import tiny_model
from tests.unit.test_client import task_for, tokens

needs_bf16 = pytest.mark.skipif(not bf16_is_fast(), reason="this CPU has no bf16 units")


@needs_bf16
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_values_and_gradients_are_those_of_the_plain_map(kind):
    torch.manual_seed(0)
    plain = nn.Linear(24, 40) if kind is nn.Linear else Conv1D(40, 24)
    x = torch.randn(3, 5, 24, requires_grad=True)
    expected = plain(x)
    (slope,) = torch.autograd.grad(expected.square().sum(), x)
    pack(plain)
    assert is_packed(plain)
    got = plain(x)
    (packed_slope,) = torch.autograd.grad(got.square().sum(), x)
    assert got.dtype == torch.float32
    assert float((got - expected).detach().abs().max() / expected.detach().abs().max()) < 0.01
    assert float((packed_slope - slope).abs().max() / slope.abs().max()) < 0.02
    assert float((got - expected).detach().abs().max()) > 0


@needs_bf16
def test_a_fold_is_packed_too():
    model = tiny_model()
    pack_blocks(model.network, model.blocks)
    name = "bert.encoder.layer.0.attention.self.query"
    query = model.network.get_submodule(name)
    x = torch.randn(2, 16)
    before = query(x)
    fold(model.network, random_adapter(0, 2, shapes={name: (16, 16)}))
    expected = nn.functional.linear(x, query.weight, query.bias)
    assert float((query(x) - expected).abs().max() / expected.abs().max()) < 0.02
    assert float((query(x) - before).abs().max()) > 0.5


@needs_bf16
def test_training_on_the_packed_path_ends_close_by(family):
    model, packed = tiny_model(family), tiny_model(family)
    pack_blocks(packed.network, packed.blocks)
    assert set(dict(model.network.named_parameters())) == set(dict(packed.network.named_parameters()))
    task = task_for(model, optimizer="sgd", local_steps=5)
    plain, fast = (train(task, ClientEnv(m, tokens(16))) for m in (model, packed))
    for name, factors in plain.adapter.modules.items():
        moved = factors.B.norm()
        assert float((fast.adapter.modules[name].B - factors.B).norm() / moved) < 0.1
