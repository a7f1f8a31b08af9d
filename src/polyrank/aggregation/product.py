"""Aggregation in product space, in factored form: no O x I matrix is built while the sum of ranks is smaller.

A weighted sum of products is one tall product, sum_k B_k diag(w_k) A_k = L Rg with L = [B_1 diag(w_1) | ..]
and Rg = [A_1 ; ..]. Thin QR of L and of Rg' leaves a small core whose SVD is that of the product:
O((sum r)^2 (O + I)) instead of O(O I min(O, I)). All factors of a module are needed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from polyrank.adapter import Adapter, Factors
from polyrank.messages import ClientUpdate

Part = tuple[Factors, Float[Tensor, " r"]]
"""Factors and the weight of each of their slots."""
NULL = 1e-6
"""Singular values below this share of the largest are noise of the arithmetic."""


def stack(parts: Sequence[Part]) -> tuple[Float[Tensor, "O S"], Float[Tensor, "S I"]]:
    """L and Rg of the weighted sum of products; scale and e are absorbed into L. S is the sum of ranks."""
    left = [f.B * (f.scale * weights if f.e is None else f.scale * weights * f.e) for f, weights in parts]
    return torch.cat(left, dim=1), torch.cat([f.A.to(left[0].dtype) for f, _ in parts], dim=0)


def truncated_svd(
    left: Float[Tensor, "O S"], right: Float[Tensor, "S I"], rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, k], s [k] falling, Vh [k, I] of left @ right, with k = min(rank, O, I, S).

    An error of float32 in the vectors moves u' core v only to second order, so s is taken again from unit
    vectors and a float64 core. Q is never built: its reflections turn k columns only.
    """
    left_qr, right_qr = Reflected(left), Reflected(right.T)
    core = left_qr.upper.double() @ right_qr.upper.T.double()
    U, s, Vh = torch.linalg.svd(core.to(left.dtype), full_matrices=False)
    k = min(rank, s.numel())
    U, V = (normalize(vectors[:, :k].double(), dim=0) for vectors in (U, Vh.T))
    s = (U * (core @ V)).sum(dim=0)
    return left_qr.turn(U.to(left.dtype)), s.to(left.dtype), right_qr.turn(V.to(left.dtype)).T


class Reflected:
    """QR of a tall matrix; a wide one, which no QR makes smaller, is its own R."""

    def __init__(self, matrix: Tensor) -> None:
        self.upper = self._packed = matrix
        self._tau: Tensor | None = None
        if matrix.shape[0] > matrix.shape[1]:
            self._packed, self._tau = torch.geqrf(matrix)
            self.upper = self._packed[: matrix.shape[1]].triu()

    def turn(self, columns: Tensor) -> Tensor:
        """Q @ columns."""
        if self._tau is None:
            return columns
        padded = columns.new_zeros(self._packed.shape[0], columns.shape[1])
        padded[: columns.shape[0]] = columns
        return torch.ormqr(self._packed, self._tau, padded)


def refactor(parts: Sequence[Part], bank: Factors) -> Factors:
    """The best R slots for a weighted sum of products, strongest first.

    The singular values are split evenly between B and A (form ``svd``: they become e). A slot whose
    singular value is null keeps the bank's A (and B), and B (or e) is 0: it adds nothing, but can
    still be trained, which two zero factors could not.
    """
    U, s, Vh = truncated_svd(*stack(parts), bank.rank)
    s = s / bank.scale
    alive = s > NULL * s.max() if s.numel() and float(s.max()) > 0 else torch.zeros_like(s, dtype=torch.bool)
    U, s, Vh = U[:, alive], s[alive], Vh[alive]
    k = s.numel()
    A, B = bank.A.clone(), torch.zeros_like(bank.B)
    if bank.e is not None:
        e = torch.zeros_like(bank.e)
        B = bank.B.clone()
        B[:, :k], A[:k], e[:k] = U, Vh, s
        return Factors(B, A, bank.scale, e)
    root = s.sqrt()
    B[:, :k], A[:k] = U * root, root[:, None] * Vh
    return Factors(B, A, bank.scale)


def refactor_adapter(bank: Adapter, parts_of: Callable[[str], Sequence[Part]]) -> Adapter:
    """Every module refactored from its parts; a module without parts keeps its value."""
    modules = {}
    for name, factors in bank.modules.items():
        parts = parts_of(name)
        modules[name] = refactor(parts, factors) if parts else factors
    return Adapter(bank.form, modules)


def rebalanced(adapter: Adapter) -> Adapter:
    """The same products with their singular values split evenly between B and A."""
    own = {name: [(factors, torch.ones(factors.rank))] for name, factors in adapter.modules.items()}
    return refactor_adapter(adapter, own.__getitem__)


def holders(
    updates: Sequence[ClientUpdate], weights: Sequence[float], name: str
) -> list[tuple[ClientUpdate, float]]:
    """The updates that trained any slot of a module, with their weights."""
    pairs = zip(updates, weights, strict=True)
    return [(update, weight) for update, weight in pairs if name in update.adapter.modules]


def slot_mass(held: Sequence[tuple[ClientUpdate, float]], name: str, rank: int) -> Float[Tensor, " R"]:
    """P_j of each slot: the weight of the clients that trained it."""
    mass = torch.zeros(rank)
    for update, weight in held:
        mass[update.mask[name]] += weight
    return mass
