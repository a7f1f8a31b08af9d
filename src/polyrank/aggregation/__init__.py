"""Aggregation rules: how clients' updates become the next adapter. One file per rule.

A rule is a frozen table told apart by ``kind`` with one method,

    aggregate(state: ServerState, updates: Sequence[ClientUpdate]) -> Aggregated

and this union is the registry: a rule is available once it stands here.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from polyrank.aggregation.anchored import Anchored
from polyrank.aggregation.base import Aggregated, Rule
from polyrank.aggregation.fedavg import FedAvg
from polyrank.aggregation.layer_wise import LayerWise
from polyrank.aggregation.norm_weighted import NormWeighted
from polyrank.aggregation.random_slots import RandomSlots
from polyrank.aggregation.rank_partition import RankPartition
from polyrank.aggregation.replication_padding import ReplicationPadding
from polyrank.aggregation.residual import Residual
from polyrank.aggregation.stacking import Stacking
from polyrank.aggregation.svd_redistribution import SvdRedistribution
from polyrank.aggregation.zero_padding import ZeroPadding

Aggregation = Annotated[
    FedAvg
    | ZeroPadding
    | NormWeighted
    | ReplicationPadding
    | LayerWise
    | Stacking
    | SvdRedistribution
    | RankPartition
    | Anchored
    | RandomSlots
    | Residual,
    Field(discriminator="kind"),
]

PRODUCT_SPACE = (Stacking, SvdRedistribution, RankPartition)
"""Rules whose slots change their coordinates every round."""

HOLDERS = (FedAvg, LayerWise, RandomSlots, ReplicationPadding, Anchored)
"""Rules that average each slot over those who hold it."""

FOLDING = (Stacking, Residual)
"""Rules that add to the frozen weights."""

__all__ = [
    "FOLDING",
    "HOLDERS",
    "PRODUCT_SPACE",
    "Aggregated",
    "Aggregation",
    "Anchored",
    "FedAvg",
    "LayerWise",
    "NormWeighted",
    "RandomSlots",
    "RankPartition",
    "ReplicationPadding",
    "Residual",
    "Rule",
    "Stacking",
    "SvdRedistribution",
    "ZeroPadding",
]
