"""The low-rank layer, installing it into a base model and folding it away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from polyrank.adapter import Adapter, Factors, delta_weight
from polyrank.models.frozen import is_packed, pack


class LowRankLinear(nn.Module):
    """A frozen linear map plus a trainable low-rank update.

        y = base(x) + scale * B (e * (A dropout(x))) + the same of the frozen slots, without dropout

    Equal to PEFT's LoRA layer in output and gradients for form ``lora``.
    Dropout is on whenever it is above 0, whatever mode the model is in: who evaluates installs 0.
    Shapes: x [..., I], y [..., O]; B [O, r], e [r], A [r, I].
    """

    B: nn.Parameter
    A: nn.Parameter
    e: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        factors: Factors,
        dropout: float,
        device: torch.device,
        frozen: Factors | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.scale = factors.scale
        self.dropout = dropout
        self.frozen = None if frozen is None else _on(device, frozen)
        for name in ("B", "e", "A"):
            value = factors.tensors().get(name)
            copy = None if value is None else nn.Parameter(value.detach().clone().to(device))
            self.register_parameter(name, copy)

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout) if self.dropout > 0 else x
        y: Tensor = self.base(x) + self.scale * _product(dropped, self.B, self.e, self.A)
        if self.frozen is not None:
            y = y + self.scale * _product(x, self.frozen.B, self.frozen.e, self.frozen.A)
        return y

    def factors(self) -> Factors:
        """A copy of the factors on the CPU."""
        e = None if self.e is None else self.e.detach().cpu().clone()
        return Factors(self.B.detach().cpu().clone(), self.A.detach().cpu().clone(), self.scale, e)


def _product(x: Tensor, B: Tensor, e: Tensor | None, A: Tensor) -> Tensor:
    held = F.linear(x, A)
    return F.linear(held if e is None else held * e, B)


def _on(device: torch.device, factors: Factors) -> Factors:
    return factors.with_tensors({name: tensor.to(device) for name, tensor in factors.tensors().items()})


@contextlib.contextmanager
def installed(
    network: nn.Module, adapter: Adapter, dropout: float = 0.0, frozen: Adapter | None = None
) -> Iterator[Mapping[str, LowRankLinear]]:
    """The network with the adapter in place of the maps it adapts; taken out again at the end.

    Modules that no adapter names keep their plain map: no matmul, no gradient, no memory.

    Args:
        frozen: slots that take part in the forward pass beside the adapter's and do not train.

    Raises:
        AttributeError: the adapter names a module that the network does not have.
    """
    beside = {} if frozen is None else frozen.modules
    bases = {name: network.get_submodule(name) for name in [*adapter.modules, *beside]}
    layers = {}
    try:
        for name, base in bases.items():
            device = next(base.parameters()).device
            factors = adapter.modules.get(name)
            if factors is not None:
                layers[name] = LowRankLinear(base, factors, dropout, device, beside.get(name))
                network.set_submodule(name, layers[name])
            else:
                alone = LowRankLinear(base, beside[name], 0.0, device)
                network.set_submodule(name, alone.requires_grad_(False))
        yield layers
    finally:
        for name, base in bases.items():
            network.set_submodule(name, base)


def read_adapter(layers: Mapping[str, LowRankLinear], like: Adapter) -> Adapter:
    """The adapter as it is in the layers now."""
    return Adapter(like.form, {name: layer.factors() for name, layer in layers.items()})


def fold(network: nn.Module, adapter: Adapter) -> None:
    """Add the adapter's product to the frozen weights, for good."""
    with torch.no_grad():
        for name, factors in adapter.modules.items():
            module = network.get_submodule(name)
            delta = delta_weight(factors)
            weight = module.weight
            assert isinstance(weight, Tensor)
            weight.add_((delta.T if isinstance(module, Conv1D) else delta).to(weight.device))
            if is_packed(module):
                pack(module)
