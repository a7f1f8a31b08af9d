"""Aggregation rules: how clients' updates become the next adapter. One file per rule.

A rule is a frozen table told apart by ``kind`` with one method,

    aggregate(state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated

and this union is the registry: a rule is available once it stands here.
"""

from __future__ import annotations

from polyrank.aggregation.base import Aggregated
from polyrank.aggregation.fedavg import FedAvg

Aggregation = FedAvg

__all__ = ["Aggregated", "Aggregation", "FedAvg"]
