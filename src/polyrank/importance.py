"""How much each slot matters to a client, scored while it trains.

Source: the sensitivity of AdaLoRA (Zhang et al., arXiv 2303.10512); FedARA (arXiv 2501.14406) votes by it.

    I = |p g|     Ib = b Ib + (1 - b) I     U = b U + (1 - b) |I - Ib|     sc = Ib U
    S_i = sc(e_i) + mean_j sc(A_ij) + mean_j sc(B_ji)

``magnitude`` is |e_i| at the end; ``gradient`` is the S of I alone at the last step, without averages.
Slots of form ``lora`` have no e: its term is left out, and ``magnitude`` is |B_i| |A_i|.
Shapes: one leading axis G over the clients of a session.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

Importance = Literal["sensitivity", "magnitude", "gradient"]


class Scores:
    """Running scores of the slots of some stacked factors B [G, O, r], e [G, r] or none, A [G, r, I]."""

    def __init__(self, kind: Importance, smoothing: float) -> None:
        self.kind = kind
        self.smoothing = smoothing
        self._mean: dict[tuple[str, str], Tensor] = {}
        self._spread: dict[tuple[str, str], Tensor] = {}

    def update(self, modules: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        """Take in one local step: after the backward pass; p before the optimiser moves it, or after, where
        a mask would else hide p for good."""
        if self.kind == "magnitude":
            return
        for name, parts in modules.items():
            for part, p in parts.items():
                if p.grad is not None:
                    self._take((name, part), (p.detach() * p.grad).abs())

    def _take(self, key: tuple[str, str], now: Tensor) -> None:
        if self.kind == "gradient":
            self._mean[key] = now
            return
        keep = self.smoothing
        mean = self._mean.setdefault(key, torch.zeros_like(now)).mul_(keep).add_(now, alpha=1 - keep)
        spread = self._spread.setdefault(key, torch.zeros_like(now))
        spread.mul_(keep).add_((now - mean).abs(), alpha=1 - keep)

    def of(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """S of every slot of one module, [G, r]."""
        B, A = parts["B"].detach(), parts["A"].detach()
        if self.kind == "magnitude":
            e = parts.get("e")
            return B.norm(dim=-2) * A.norm(dim=-1) if e is None else e.detach().abs()
        total = A.new_zeros(A.shape[:-1])
        for part in parts:
            mean = self._mean.get((name, part))
            if mean is not None:
                score = mean if self.kind == "gradient" else mean * self._spread[name, part]
                total += score if part == "e" else score.mean({"A": -1, "B": -2}[part])
        return total


def highest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The ``count`` highest-scored slots over all modules of one client; ties go to the earlier.

    Args:
        scores: [r] by module.
    """
    if not scores:
        return {}
    flat = torch.cat(list(scores.values()))
    marked = torch.zeros(len(flat), dtype=torch.bool)
    marked[torch.argsort(flat, descending=True, stable=True)[:count]] = True
    return dict(zip(scores, torch.split(marked, [len(s) for s in scores.values()]), strict=True))
