"""The packed bf16 path against the plain one: values, gradients, folding, names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from polyrank.lowrank import fold
from polyrank.models import frozen
from polyrank.models.frozen import PackedMap, bf16_is_there, pack, pack_blocks, packed_dtype, rows_for
from polyrank.session import ClientEnv, train
from tests.builders import random_adapter
from tests.conftest import tiny_model
from tests.unit.test_client import task_for, tokens

needs_bf16 = pytest.mark.skipif(not bf16_is_there(), reason="this CPU has no bf16 units")


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=needs_bf16), "fp32"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_values_and_gradients_are_those_of_the_plain_map(kind, dtype):
    torch.manual_seed(0)
    plain = nn.Linear(24, 40) if kind is nn.Linear else Conv1D(40, 24)
    x = torch.randn(3, 5, 24, requires_grad=True)
    expected = plain(x)
    (slope,) = torch.autograd.grad(expected.square().sum(), x)
    pack(plain, dtype)
    assert isinstance(plain.forward, PackedMap)
    got = plain(x)
    (packed_slope,) = torch.autograd.grad(got.square().sum(), x)
    assert got.dtype == torch.float32
    close = {"bf16": 0.02, "fp32": 1e-6}[dtype]
    assert float((got - expected).detach().abs().max() / expected.detach().abs().max()) < close
    assert float((packed_slope - slope).abs().max() / slope.abs().max()) < close
    if dtype == "bf16":
        assert float((got - expected).detach().abs().max()) > 0


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=needs_bf16), "fp32"])
def test_a_fold_is_packed_too(dtype):
    torch.manual_seed(0)
    model = tiny_model()
    pack_blocks(model.network, model.blocks, dtype=dtype)
    name = "bert.encoder.layer.0.attention.self.query"
    query = model.network.get_submodule(name)
    x = torch.randn(2, 16)
    before = query(x)
    fold(model.network, random_adapter(0, 2, shapes={name: (16, 16)}))
    expected = nn.functional.linear(x, query.weight, query.bias)
    assert float((query(x) - expected).abs().max() / expected.abs().max()) < 0.02
    assert float((query(x) - before).abs().max()) > 0.5


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=needs_bf16), "fp32"])
def test_training_on_the_packed_path_ends_close_by(family, dtype):
    model, packed = tiny_model(family), tiny_model(family)
    pack_blocks(packed.network, packed.blocks, dtype=dtype)
    assert set(dict(model.network.named_parameters())) == set(dict(packed.network.named_parameters()))
    task = task_for(model, optimizer="sgd", local_steps=5)
    plain, fast = (train(task, ClientEnv(m, tokens(16))) for m in (model, packed))
    for name, factors in plain.adapter.modules.items():
        moved = factors.B.norm()
        away = float((fast.adapter.modules[name].B - factors.B).norm() / moved)
        assert away < {"bf16": 0.1, "fp32": 1e-4}[dtype]


@pytest.mark.parametrize(
    ("gains", "fp32", "bf16"),
    [
        ({"fp32": 1.5, "bf16": 2.5}, "fp32", "bf16"),
        ({"fp32": 1.0, "bf16": 2.0}, None, "bf16"),
        ({"fp32": 1.5, "bf16": 1.2}, "fp32", "fp32"),  # units for bf16 that are slower than float32
        ({"fp32": 1.0, "bf16": 0.5}, None, None),
        ({"fp32": 1.5, "bf16": 0.0}, "fp32", "fp32"),
    ],
)
def test_the_fastest_way_is_taken(gains, fp32, bf16, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(frozen, "_gains", lambda: gains)
    assert (packed_dtype("fp32"), packed_dtype("bf16")) == (fp32, bf16)


def test_the_choice_is_made_once_per_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gains = iter([{"fp32": 1.5, "bf16": 2.0}, {"fp32": 0.5, "bf16": 2.0}])
    monkeypatch.setattr(frozen, "_gains", lambda: next(gains))
    assert packed_dtype("fp32") == "fp32"
    assert packed_dtype("fp32") == "fp32"  # remembered, not timed again
    (remembered,) = (tmp_path / "polyrank").iterdir()
    remembered.write_text("torn")
    assert packed_dtype("fp32") is None


def test_of_several_processes_that_time_it_the_first_one_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def timed():
        monkeypatch.setattr(frozen, "_gains", lambda: {"fp32": 2.0, "bf16": 2.0})
        assert packed_dtype("fp32") == "fp32"  # another process, while this one is timing
        return {"fp32": 0.5, "bf16": 0.5}

    monkeypatch.setattr(frozen, "_gains", timed)
    assert packed_dtype("fp32") == "fp32"
    assert len(list((tmp_path / "polyrank").iterdir())) == 1


def test_where_nothing_can_be_remembered_nothing_is_timed_into_the_bits(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(frozen, "_gains", lambda: {"fp32": 2.0, "bf16": 0.5})
    assert packed_dtype("fp32") is None
    assert packed_dtype("bf16") == ("bf16" if bf16_is_there() else None)


def test_what_was_remembered_and_cannot_be_read_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(frozen, "_gains", lambda: {"fp32": 2.0, "bf16": 0.5})
    assert packed_dtype("fp32") == "fp32"
    (remembered,) = (tmp_path / "polyrank").iterdir()
    remembered.unlink()
    remembered.mkdir()  # as unreadable as a file of somebody else
    assert packed_dtype("fp32") is None


def test_the_measured_gains_are_ratios_of_times():
    gains = frozen._gains()
    assert 0.1 < gains["fp32"] < 10
    assert bf16_is_there() == (0.05 < gains["bf16"] < 50)


def test_large_fp32_models_are_not_packed(monkeypatch):
    monkeypatch.setattr(frozen, "_MOST_BYTES", 1_000)
    model = tiny_model()
    pack_blocks(model.network, model.blocks, dtype="fp32")
    assert not any(isinstance(m.forward, PackedMap) for m in model.network.modules())


@given(st.integers(0, 5000))
def test_few_numbers_of_rows_are_compiled(rows):
    assert rows <= rows_for(rows) <= max(rows + 7, rows * 17 / 16)


def test_a_doubling_has_sixteen_numbers_of_rows():
    assert len({rows_for(rows) for rows in range(1025, 2049)}) == 16
