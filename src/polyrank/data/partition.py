"""Sharing the train texts out among clients, through Flower Datasets' partitioners."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from polyrank.data.texts import Texts
from polyrank.errors import InputError
from polyrank.messages import ClientId
from polyrank.schema import Schema
from polyrank.seed import seed_for

Count = Annotated[int, Field(ge=1)]


class Iid(Schema):
    """Equal shares at random."""

    kind: Literal["iid"] = "iid"
    clients: Count = 20


class Dirichlet(Schema):
    """Label shares drawn from a Dirichlet distribution; a small ``alpha`` means a strong skew."""

    kind: Literal["dirichlet"] = "dirichlet"
    clients: Count = 20
    alpha: Annotated[float, Field(gt=0)] = 1.0
    min_examples: Count = 2
    """Draw again (ten times) until every client has so many."""
    balanced: bool = False
    """Keep client sizes near the mean."""
    iid_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the clients, first by name, that get near-balanced labels and texts of mean number."""


class Pathological(Schema):
    """Every client sees a few labels only."""

    kind: Literal["pathological"] = "pathological"
    clients: Count = 20
    labels_per_client: Count = 2


class Natural(Schema):
    """One client per value of a column: a site, an author, a device."""

    kind: Literal["natural"] = "natural"
    column: str


Partition = Annotated[Iid | Dirichlet | Pathological | Natural, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class ClientRows:
    """One client's rows of the train texts, and those of them kept aside for its own evaluation."""

    client: ClientId
    train: Sequence[int]
    holdout: Sequence[int]


def share_out(
    texts: Texts, num_labels: int, partition: Partition, seed: int, holdout_share: float = 0.0
) -> list[ClientRows]:
    """The rows of every client; each row belongs to exactly one client.

    Args:
        holdout_share: share of each client's rows kept aside for its own evaluation.

    Raises:
        InputError: a client would be left without examples.
    """
    draw = np.random.default_rng(seed_for(seed, "shuffle"))
    order = draw.permutation(len(texts))
    shares = _rows_by_client(texts, order, num_labels, partition, seed)
    clients = []
    for client, rows in shares:
        mixed = np.random.default_rng(seed_for(seed, "holdout", client)).permutation(rows).tolist()
        aside = max(1, round(holdout_share * len(mixed))) if holdout_share > 0 else 0
        if len(mixed) <= aside:
            raise InputError("partition.kind", partition.kind, _too_small(client, len(mixed), aside))
        clients.append(ClientRows(client, sorted(mixed[aside:]), sorted(mixed[:aside])))
    return clients


def label_counts(texts: Texts, rows: Sequence[int], num_labels: int) -> list[int]:
    """How many of these rows carry each label."""
    labels = np.asarray(texts.labels)[list(rows)]
    return [int(count) for count in np.bincount(labels, minlength=num_labels)]


def _rows_by_client(
    texts: Texts, order: np.ndarray[Any, Any], num_labels: int, partition: Partition, seed: int
) -> list[tuple[ClientId, list[int]]]:
    if isinstance(partition, Natural):
        partitioner = _partitioner(partition, num_labels, seed)
        rows = _split(texts, order, partitioner, partition)
        names = [str(partitioner.partition_id_to_natural_id[index]) for index in range(len(rows))]
        return sorted(zip(names, map(sorted, rows), strict=True))  # as they stand in the owner's own file
    if partition.clients > len(texts):
        allowed = f"at most one client per train text, and there are {len(texts)}"
        raise InputError("partition.clients", partition.clients, allowed)
    if isinstance(partition, Dirichlet) and partition.iid_share > 0:
        even = Iid(clients=max(1, round(partition.iid_share * partition.clients)))
        cut = round(len(order) * even.clients / partition.clients)
        rows = _split(texts, order[:cut], _partitioner(even, num_labels, seed), partition)
        order = order[cut:]
        if even.clients >= partition.clients:
            raise InputError("partition.iid_share", partition.iid_share, "leaves no client for the rest")
        rest = partition.model_copy(update={"clients": partition.clients - even.clients})
        rows += _split(texts, order, _partitioner(rest, num_labels, seed), partition)
    else:
        rows = _split(texts, order, _partitioner(partition, num_labels, seed), partition)
    width = len(str(len(rows) - 1))
    return [(f"client-{index:0{width}d}", own) for index, own in enumerate(rows)]


def _split(
    texts: Texts, order: np.ndarray[Any, Any], partitioner: Any, partition: Partition
) -> list[list[int]]:
    """The rows of each client under one of Flower's partitioners."""
    from datasets import Dataset

    columns: dict[str, Any] = {"row": order, "label": np.asarray(texts.labels)[order]}
    if texts.groups is not None:
        columns["group"] = [texts.groups[row] for row in order]
    partitioner.dataset = Dataset.from_dict(columns)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # and no progress bars of a partitioner
            count = partitioner.num_partitions
            return [partitioner.load_partition(index)["row"][:] for index in range(count)]
    except ValueError as error:
        shown = ", ".join(f"{k} = {v}" for k, v in partition.model_dump().items() if k != "kind")
        allowed = (
            f"cannot be drawn from {len(order)} texts without leaving a client with too few; "
            f"use fewer clients or less skew (now {shown})"
        )
        raise InputError("partition.kind", partition.kind, allowed) from error


def _partitioner(partition: Partition, num_labels: int, seed: int) -> Any:
    from flwr_datasets import partitioner as flower

    draw = seed_for(seed, "partition") % 2**32
    match partition:
        case Iid():
            return flower.IidPartitioner(partition.clients)
        case Dirichlet():
            return flower.DirichletPartitioner(
                num_partitions=partition.clients,
                partition_by="label",
                alpha=partition.alpha,
                min_partition_size=partition.min_examples,
                self_balancing=partition.balanced,
                seed=draw,
            )
        case Pathological():
            if partition.labels_per_client > num_labels:
                allowed = f"at most the number of labels, {num_labels}"
                raise InputError("partition.labels_per_client", partition.labels_per_client, allowed)
            return flower.PathologicalPartitioner(
                num_partitions=partition.clients,
                partition_by="label",
                num_classes_per_partition=partition.labels_per_client,
                class_assignment_mode="first-deterministic",
                seed=draw,
            )
        case Natural():
            return flower.NaturalIdPartitioner(partition_by="group")


def _too_small(client: ClientId, size: int, aside: int) -> str:
    return f"leaves {client} with {size} examples, {aside} of them for evaluation; it needs one more"
