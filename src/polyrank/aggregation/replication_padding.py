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
from typing import Literal

from polyrank.adapter import Adapter, num_slots
from polyrank.aggregation.base import Aggregated, HeadSums, SlotSums, Weights, blend, count_of, sums_of
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
        if self.fill == "cascade":
            slots, head = sums_of(state, updates, self.weights)
            return Aggregated(slots.mean(), head.mean())
        slots, top, head = SlotSums(state.adapter), TopSums(state.adapter), HeadSums(state.head)
        for update in updates:
            weight = count_of(update, self.weights)
            slots.add(update, weight)
            top.add(update, weight)
            head.add(update.head, weight)
        return Aggregated(_filled_from_top(slots, top.sums), head.mean())


class TopSums:
    """Sums over the clients of the highest rank seen so far."""

    def __init__(self, like: Adapter) -> None:
        self.sums = SlotSums(like)
        self._rank = 0

    def add(self, update: ClientUpdate, weight: float) -> None:
        """Count one update in, if none before it held more slots."""
        rank = num_slots(update.mask)
        if rank > self._rank:
            self.sums, self._rank = SlotSums(self.sums.like), rank
        if rank == self._rank:
            self.sums.add(update, weight)


def _filled_from_top(slots: SlotSums, top: SlotSums) -> Adapter:
    """The mean over all clients, where those that lack a slot count with the mean of the highest rank.

    Where the highest rank does not reach (a module it does not adapt), the holders' mean stands in.
    """
    held, padded = slots.shares(), top.shares()
    lacking = {name: (1 - share) * (padded[name] > 0) for name, share in held.items()}
    return blend(slots.mean(), top.mean(), lacking)
