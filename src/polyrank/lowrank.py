"""The low-rank layer, installing it into a base model and folding it away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from polyrank.adapter import Adapter, Factors, delta_weight
from polyrank.fused import Shares, add_padded, add_products, client_rows, stack_factors
from polyrank.models.absorbed import Update
from polyrank.models.frozen import pack_again


class LowRankLinear(nn.Module):
    """A frozen linear map plus a trainable low-rank update, one for each client of a group.

        y = base(x) + scale * B (e * (A dropout(x))) + the same of the frozen slots, without dropout

    Equal to PEFT's LoRA layer in output and gradients for form ``lora``.
    Dropout is on whenever it is above 0, whatever mode the model is in: who evaluates installs 0.
    Shapes: x [..., I], y [..., O]; B [G, O, r], e [G, r], A [G, r, I].

    Args:
        factors: of each client; None where it does not hold the module.
        shares: whose row is whose, for more than one client.
    """

    B: nn.Parameter
    A: nn.Parameter
    e: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        factors: Sequence[Factors | None],
        dropout: float = 0.0,
        frozen: Sequence[Factors | None] = (),
        shares: Shares | None = None,
    ) -> None:
        super().__init__()
        device = next(base.parameters()).device
        self.base = base
        self.shares = shares or Shares()
        self.dropout = dropout
        self.ranks = [0 if f is None else f.rank for f in factors]
        self.scale = next(f.scale for f in [*factors, *frozen] if f is not None)
        stacked = {} if sum(self.ranks) == 0 else stack_factors(factors)
        for part in ("B", "e", "A"):
            copy = nn.Parameter(stacked[part].to(device)) if part in stacked else None
            self.register_parameter(part, copy)
        beside = stack_factors(frozen) if any(f is not None for f in frozen) else {}
        self.frozen = {part: value.to(device) for part, value in beside.items()}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.A is not None:
            dropped = F.dropout(x, self.dropout) if self.dropout > 0 else x
            y = self._add(y, dropped, self.B, self.e, self.A)
        if self.frozen:
            y = self._add(y, x, self.frozen["B"], self.frozen.get("e"), self.frozen["A"])
        return y

    def _add(self, y: Tensor, x: Tensor, B: Tensor, e: Tensor | None, A: Tensor) -> Tensor:
        """y + scale * B (e * (A x)), each client's rows with its own factors."""
        flat = x.reshape(-1, x.shape[-1])
        add = add_products if x.device.type == "cpu" else add_padded
        return add(y.reshape(-1, y.shape[-1]), flat, B, e, A, self.scale, self.shares).view(y.shape)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for models that look at its type (T5)."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def updates(self, rows: int) -> Iterator[Sequence[Update]]:
        """What trains, then what is frozen: for each client its part of so many rows, and what it adds."""
        for parts in (dict(self.named_parameters(recurse=False)), self.frozen):
            if "A" not in parts:
                continue
            B, e, A = parts["B"], parts.get("e"), parts["A"]
            yield [
                (own, B[client], None if e is None else e[client], A[client], self.scale)
                for client, own in client_rows(self.shares.of(rows, len(A)))
            ]

    def factors(self, client: int = 0) -> Factors:
        """The factors of one client (views)."""
        rank = self.ranks[client]
        e = None if self.e is None else self.e[client, :rank]
        return Factors(self.B[client, :, :rank], self.A[client, :rank], self.scale, e)


@contextlib.contextmanager
def installed(
    network: nn.Module,
    adapters: Sequence[Adapter],
    dropout: float = 0.0,
    frozen: Sequence[Adapter] = (),
    shares: Shares | None = None,
) -> Iterator[Mapping[str, LowRankLinear]]:
    """The network with each client's adapter in place of the maps it adapts; taken out again at the end.

    Modules that no adapter names keep their plain map: no matmul, no gradient, no memory.

    Args:
        frozen: slots that take part in the forward pass beside the adapter's and do not train.
        shares: whose row is whose, for more than one client.

    Raises:
        AttributeError: an adapter names a module that the network does not have.
    """
    names = dict.fromkeys(name for adapter in [*adapters, *frozen] for name in adapter.modules)
    bases = {name: network.get_submodule(name) for name in names}
    layers = {}
    try:
        for name, base in bases.items():
            own = [adapter.modules.get(name) for adapter in adapters]
            beside = [adapter.modules.get(name) for adapter in frozen]
            layers[name] = LowRankLinear(base, own, dropout, beside, shares)
            network.set_submodule(name, layers[name])
        yield layers
    finally:
        for name, base in bases.items():
            network.set_submodule(name, base)


def read_adapter(layers: Mapping[str, LowRankLinear], like: Adapter, client: int = 0) -> Adapter:
    """A copy on the CPU of one client's adapter as it is in the layers now."""
    modules = {}
    for name in like.modules:
        now = layers[name].factors(client)
        copies = {part: t.detach().cpu().clone() for part, t in now.tensors().items()}
        modules[name] = now.with_tensors(copies)
    return Adapter(like.form, modules)


def weights_start(network: nn.Module, like: Adapter) -> Adapter:
    """An adapter of the shapes of ``like`` that is the largest singular values of the weights it adapts.

    ``lora``: B = U sqrt(S / s), A = sqrt(S / s) V'; ``svd``: B = U, e = S / s, A = V'.
    """
    modules = {}
    for name, factors in like.modules.items():
        module, rank = network.get_submodule(name), factors.rank
        weight = module.weight
        assert isinstance(weight, Tensor)
        dense = (weight.T if isinstance(module, Conv1D) else weight).detach().float().cpu()
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank] / factors.scale, Vh[:rank]
        if like.form == "svd":
            modules[name] = Factors(U.contiguous(), Vh.contiguous(), factors.scale, S)
        else:
            modules[name] = Factors(U * S.sqrt(), S.sqrt()[:, None] * Vh, factors.scale)
    return Adapter(like.form, modules)


def negated(adapter: Adapter) -> Adapter:
    """The adapter, in form ``lora``, whose product is minus that of this one."""
    modules = {}
    for name, f in adapter.modules.items():
        modules[name] = Factors(-f.B if f.e is None else -f.B * f.e, f.A, f.scale)
    return Adapter("lora", modules)


def fold(network: nn.Module, adapter: Adapter) -> None:
    """Add the adapter's product to the frozen weights, for good."""
    with torch.no_grad():
        for name, factors in adapter.modules.items():
            module = network.get_submodule(name)
            delta = delta_weight(factors)
            weight = module.weight
            assert isinstance(weight, Tensor)
            weight.add_((delta.T if isinstance(module, Conv1D) else delta).to(weight.device))
            pack_again(module)
