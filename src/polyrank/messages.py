"""What travels: tasks go down to a client, updates and scores come up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from polyrank.adapter import Adapter, Draw, Head, RankMask
from polyrank.importance import Importance
from polyrank.schema import Schema

ClientId = str
Reason = Literal[
    "failed",
    "no_answer",
    "unasked",
    "duplicate",
    "empty",
    "too_large",
    "digest",
    "header",
    "kind",
    "client",
    "round",
    "attempt",
    "base",
    "examples",
    "metrics",
    "missing",
    "extra",
    "dtype",
    "shape",
    "slots",
    "votes",
    "not_finite",
    "all_zero",
    "norm",
]
"""Why there is no usable answer: the client failed or was silent, or what it sent was refused (`gate.py`)."""
MISSING_FOLDS = "MissingFoldsError"
"""How the error of a client begins that lacks folds the server believes it has."""


class Training(Schema):
    """Local training of one client in one round.

    ``learning_rate`` is the peak value; `round.py` sends the value of the round in its place.
    With neither ``local_steps`` nor ``local_epochs`` a client makes one pass over its data.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_rounds: Annotated[int, Field(ge=0)] = 0
    local_steps: Annotated[int, Field(ge=1)] | None = None
    local_epochs: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm over all trained tensors; 0 turns clipping off."""
    factors: Literal["both", "B", "A", "alternate"] = "both"
    """Which factor trains; ``alternate`` trains B in even rounds and A in odd ones. e goes with B."""
    sparse_rounds: Annotated[int, Field(ge=0)] = 0
    """SLoRA: rounds at the start in which B alone trains; after them the server splits the product evenly
    between B and A by its SVD, and both train."""
    prune_keep: Annotated[float, Field(gt=0, lt=1)] | None = None
    """HetLoRA's self-pruning: a client gives up its slots past this share of its rank when their
    norm shrank in training."""
    prune_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the norm of those tail slots in the loss."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.0
    """Weight of |A A' - 1|^2 + |B' B - 1|^2 over all modules in the loss (form ``svd``)."""
    adapter_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    base_dropout: bool = False

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("set local_steps or local_epochs, not both")
        return self


def training_at(training: Training, round_: int, rounds: int) -> Training:
    """The training settings of one round: the learning rate follows its schedule over rounds.

    After ``warmup_rounds`` of linear rise, ``linear`` and ``cosine`` fall from the peak toward
    zero, which they would reach one round after the last.
    """
    warm = training.warmup_rounds
    if round_ < warm:
        factor = (round_ + 1) / (warm + 1)
    else:
        progress = (round_ - warm) / max(1, rounds - warm)
        factor = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }[training.schedule]
    changes: dict[str, object] = {"learning_rate": training.learning_rate * factor}
    if training.factors == "alternate":
        changes["factors"] = "B" if round_ % 2 == 0 else "A"
    elif round_ < training.sparse_rounds:
        changes["factors"] = "B"
    return training.model_copy(update=changes)


@dataclass(frozen=True, slots=True)
class Folds:
    """Updates that join the frozen weights for good: those a client has missed, in order.

    Args:
        first: number of the first of them, counted from the start of the run.
    """

    first: int = 0
    adapters: Sequence[Adapter] = ()


@dataclass(frozen=True, slots=True)
class Ballot:
    """What a client is asked about its slots (`voting.py`).

    Args:
        budget: how many slots it may vote for.
        importance: how it scores them.
        smoothing: of the running averages of ``sensitivity``.
        masks: zero e of the slots below the budget while training (AdaLoRA), instead of voting.
    """

    budget: int
    importance: Importance
    smoothing: float
    masks: bool = False


@dataclass(frozen=True, slots=True)
class TrainTask:
    """Train slots and head on the client's data.

    Args:
        seed: of everything random in this session (batch order, dropout).
        mask: which slots of the bank the client holds.
        trained: which of them train; the others take part frozen.
        adapter: the held slots only.
        drawn: while A is as it was drawn (FFA-LoRA, SLoRA) it travels as what it was drawn from.
        ballot: what the client shall say about its slots, if anything.
        attempt: how often its client was asked before in this round.
        base: short digest of the state it starts from; with round and attempt, the answer repeats it.
    """

    round: int
    client: ClientId
    seed: int
    mask: RankMask
    trained: RankMask
    adapter: Adapter
    head: Head
    training: Training
    folds: Folds = Folds()
    drawn: Draw | None = None
    ballot: Ballot | None = None
    attempt: int = 0
    base: str = ""


@dataclass(frozen=True, slots=True)
class EvaluateTask:
    """Score the adapter and head on the client's held-out examples."""

    round: int
    client: ClientId
    mask: RankMask
    adapter: Adapter
    head: Head
    batch_size: int
    folds: Folds = Folds()


@dataclass(frozen=True, slots=True)
class ClientUpdate:
    """What a client learned: the slots it trained (and kept) and the head, after training.

    Args:
        votes: the slots of the bank it voted for, where it was asked.
    """

    round: int
    client: ClientId
    mask: RankMask
    adapter: Adapter
    head: Head
    num_examples: int
    metrics: Mapping[str, float]
    votes: RankMask | None = None


@dataclass(frozen=True, slots=True)
class ClientScores:
    """A client's scores on its held-out examples (loss, accuracy, macro_f1)."""

    round: int
    client: ClientId
    num_examples: int
    metrics: Mapping[str, float]


Task = TrainTask | EvaluateTask
