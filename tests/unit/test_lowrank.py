"""The low-rank layer: equal to PEFT's, in and out of a model without a trace, folded exactly."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from polyrank.adapter import Factors, delta_weight, new_adapter
from polyrank.lowrank import LowRankLinear, fold, installed, read_adapter
from polyrank.models.targets import resolve_targets
from tests.builders import largest_difference, random_adapter
from tests.conftest import tiny_model

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def apart(found, expected):
    """The largest difference, as a share of the largest number."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def factors_for(out, in_, rank, form="lora"):
    return random_adapter(1, rank, form, {"q": (out, in_)}).modules["q"]


def test_equals_peft_in_output_and_gradients():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(6, 5)

        def forward(self, x):
            return self.q(x)

    net = Net()
    factors = factors_for(5, 6, 3)
    ours = LowRankLinear(net.q, [factors])
    peft = get_peft_model(net, LoraConfig(r=3, lora_alpha=6.0, target_modules=["q"], lora_dropout=0.0))
    layer = peft.base_model.model.q
    layer.lora_A["default"].weight.data.copy_(factors.A)
    layer.lora_B["default"].weight.data.copy_(factors.B)
    x = torch.randn(7, 6)
    expected, got = peft(x), ours(x)
    assert apart(got, expected) < 1e-6
    expected.square().sum().backward()
    got.square().sum().backward()
    assert apart(ours.A.grad[0], layer.lora_A["default"].weight.grad) < 2e-6
    assert apart(ours.B.grad[0], layer.lora_B["default"].weight.grad) < 2e-6


@pytest.mark.parametrize("form", ["lora", "svd"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_is_the_base_plus_the_product(form, kind):
    base = nn.Linear(6, 5) if kind is nn.Linear else Conv1D(5, 6)
    factors = factors_for(5, 6, 3, form)
    x = torch.randn(2, 4, 6)
    expected = base(x) + x @ delta_weight(factors).T
    got = LowRankLinear(base, [factors])(x)
    assert apart(got, expected) < 2e-6


def test_the_first_step_of_the_svd_form_moves_e_alone():
    base = nn.Linear(6, 5)
    shapes = {"q": (5, 6)}
    layer = LowRankLinear(base, [new_adapter(shapes, form="svd", rank=3, scale=1.0, seed=0).modules["q"]])
    layer(torch.randn(4, 6)).square().sum().backward()
    assert float(layer.A.grad.abs().max()) == 0
    assert float(layer.B.grad.abs().max()) == 0
    assert float(layer.e.grad.abs().max()) > 0


def test_sliced_equals_masked():
    factors = factors_for(5, 6, 4, "svd")
    held = torch.tensor([True, False, True, False])
    masked = Factors(factors.B, factors.A, factors.scale, factors.e * held)
    sliced = Factors(factors.B[:, held], factors.A[held], factors.scale, factors.e[held])
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    assert apart(LowRankLinear(base, [sliced])(x), LowRankLinear(base, [masked])(x)) < 2e-6


def test_a_model_may_look_at_the_frozen_weight():
    """T5 asks an output map for its type."""
    base = nn.Linear(6, 5)
    assert LowRankLinear(base, [factors_for(5, 6, 3)]).weight is base.weight


def test_dropout_is_on_the_adapter_path_only():
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    layer = LowRankLinear(base, [factors_for(5, 6, 3)], 0.5)
    assert not torch.equal(layer(x), layer(x))
    plain = LowRankLinear(base, [factors_for(5, 6, 3)])
    assert torch.equal(plain(x), plain(x))


def test_installing_leaves_no_trace(family):
    model = tiny_model(family)
    shapes = resolve_targets(model.network, model.blocks, "attention")
    adapter = random_adapter(2, 2, "svd", shapes)
    modules = dict(model.network.named_modules())
    with torch.no_grad():
        before = model.network(input_ids=IDS).logits
        with installed(model.network, [adapter]) as layers:
            during = model.network(input_ids=IDS).logits
            assert largest_difference(read_adapter(layers, adapter), adapter) == 0
        assert torch.equal(model.network(input_ids=IDS).logits, before)
        assert dict(model.network.named_modules()) == modules
        assert float((during - before).abs().max()) > 1e-4
        fold(model.network, adapter)
        folded = model.network(input_ids=IDS).logits
    assert apart(folded, during) < 1e-4


def test_a_failing_session_takes_the_adapter_out_again():
    model = tiny_model()
    adapter = random_adapter(2, 2, shapes=resolve_targets(model.network, model.blocks, "attention"))
    with pytest.raises(RuntimeError, match="stop"), installed(model.network, [adapter]):
        raise RuntimeError("stop")
    assert not any(isinstance(m, LowRankLinear) for m in model.network.modules())
