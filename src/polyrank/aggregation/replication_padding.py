"""replication_padding: pad low-rank clients with what the high-rank clients learned, then average.

Source: Byun & Lee, NAACL 2025, arXiv 2406.17477.

    H   = sampled clients of the highest rank         X_H = sum_{k in H} p_k X_k / sum_{k in H} p_k
    X~_k = [X_k ; X_H[r_k:]]  for k not in H          X   = sum_k p_k X~_k        X = B columns, e, A rows

With two ranks this is the mean over the holders of each slot. No extra bytes.
Differs: the paper has two ranks. With more, ``fill = "cascade"`` (default, our choice) pads each slot from
all of its holders, and ``"top"`` from the clients of the highest rank only. A slot that no sampled client
holds keeps its value, never zeros (our choice).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from polyrank.adapter import Adapter, embed, num_slots, restrict
from polyrank.aggregation.base import (
    Aggregated,
    Weights,
    client_weights,
    mean_head,
    slot_mean,
)
from polyrank.messages import ClientUpdate
from polyrank.schema import Schema
from polyrank.state import ServerState


class ReplicationPadding(Schema):
    """The mean of factors padded by replication."""

    kind: Literal["replication_padding"] = "replication_padding"
    fill: Literal["cascade", "top"] = "cascade"
    weights: Weights = "examples"

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated:
        """Aggregate one cohort."""
        weights = client_weights(updates, self.weights)
        head = mean_head(updates, weights, state.head)
        holders_mean = slot_mean(state.adapter, updates, weights)
        if self.fill == "cascade":
            return Aggregated(holders_mean, head)
        return Aggregated(_filled_from_top(state.adapter, holders_mean, updates, weights), head)


def _filled_from_top(
    bank: Adapter, holders_mean: Adapter, updates: Sequence[ClientUpdate], weights: Sequence[float]
) -> Adapter:
    """Average the updates after padding each with the mean of the highest rank.

    Where the highest rank does not reach (a module it does not adapt), the holders' mean stands in.
    """
    ranks = [num_slots(update.mask) for update in updates]
    top = [(u, w) for u, w, r in zip(updates, weights, ranks, strict=True) if r == max(ranks)]
    top_mean = slot_mean(holders_mean, [u for u, _ in top], [w for _, w in top])
    held = {name: torch.stack([u.mask[name] for u in updates]).any(dim=0) for name in bank.modules}
    padded = [
        replace(u, adapter=restrict(embed(u.adapter, u.mask, top_mean), held), mask=held) for u in updates
    ]
    return slot_mean(bank, padded, weights)
