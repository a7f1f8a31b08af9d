"""The gate: the one way in for what a client sent.

In this order, each with a reason by which refusals are counted, and nothing later is looked at:

    empty too_large           size, against what the task's slots can need at most
    digest header             one message, damaged nowhere, with nothing in it that is not needed
    shape                     flat tensors, each no longer than the message, before room is made for any
    kind client round attempt base        an answer to this very task
    examples metrics          counts within what the client registered, a few bounded numbers
    missing extra dtype shape slots votes        exactly the tensors of the slots that were assigned
    not_finite all_zero       numbers that can be averaged
    norm                      `outliers`, once the cohort is there

A refusal never stops a round. What passes may still be hostile: the gate bounds harm, it proves nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Set
from typing import Any, TypeVar

import torch
from torch import Tensor

from polyrank.adapter import RankMask, mask_minus, num_slots, over_bank, restrict, within
from polyrank.messages import ClientScores, ClientUpdate, EvaluateTask, Task, TrainTask
from polyrank.wire import (
    MAX_REPLY_HEADER,
    WireError,
    adapter_tensors,
    flatten,
    open_reply,
    trained_parts,
    unflatten,
    unflatten_adapter,
    unpack_bits,
)

MAX_METRIC = 1e9
MAX_METRICS = 16
MIN_COHORT = 3
"""Updates that it takes for their median to say anything."""
_NEEDED = {"loss", "last_loss", "steps"}
_MAX_NAME = 64
_BESIDES = 64
"""Bytes of a message besides header and numbers: its digest, sizes, and what aligns it."""
Key = TypeVar("Key")


def decode_update(data: bytes, task: TrainTask, most_examples: int | None = None) -> ClientUpdate:
    """The update that answers ``task``.

    Args:
        most_examples: how many the client registered; it may not claim more.

    Raises: WireError, with a reason, when it is anything else.
    """
    _bounded_size(data, most_bytes(task))
    meaning, tensors = open_reply(data, _max_header(task))
    answers = {"client": task.client, "round": task.round, "attempt": task.attempt, "base": task.base}
    _answers(meaning, {"kind": "update", **answers})
    num_examples, metrics = _claims(meaning, most_examples)
    if missing := _NEEDED - set(metrics):
        raise WireError(f"metrics lack {', '.join(sorted(missing))}", "metrics")
    votes_due = task.ballot is not None and not task.ballot.masks
    prunes = task.training.prune_keep is not None  # or a client could give up slots that a rule counts on
    needed = {"adapter", "head"} | ({"votes"} if votes_due else set())
    _named(tensors, needed, {"mask"} if prunes else set())
    mask = _kept(tensors, task)
    sent = restrict(task.adapter, within(mask, task.mask))
    adapter = unflatten_adapter(tensors["adapter"], sent, trained_parts(task.training))
    head = unflatten(tensors["head"], {n: tuple(t.shape) for n, t in task.head.items()})
    votes = _votes(tensors, task) if votes_due else None
    if not any([_largest(tensors, "adapter"), _largest(tensors, "head")]):
        raise WireError("every number of the update is zero", "all_zero")
    return ClientUpdate(task.round, task.client, mask, adapter, head, num_examples, metrics, votes)


def decode_scores(data: bytes, task: EvaluateTask, names: Set[str]) -> ClientScores:
    """The scores that answer ``task``.

    Args:
        names: of all its metrics: a summary reads them, and a row has other columns beside them.

    Raises: WireError as `decode_update`.
    """
    _bounded_size(data, _BESIDES + _max_header(task))
    meaning, tensors = open_reply(data, _max_header(task))
    _answers(meaning, {"kind": "scores", "client": task.client, "round": task.round})
    count, metrics = _claims(meaning, None)
    if set(metrics) != names:
        raise WireError(f"metrics are not {', '.join(sorted(names))}", "metrics")
    _named(tensors, set(), set())
    return ClientScores(task.round, task.client, count, metrics)


def most_bytes(task: TrainTask) -> int:
    """The size of the largest message that can answer a task."""
    numbers = task.adapter.num_parameters() + sum(t.numel() for t in task.head.values())
    bits = sum(held.numel() for held in task.mask.values())
    return _BESIDES + _max_header(task) + 4 * numbers + 2 * (bits // 8 + 1)


def change(update: ClientUpdate, task: TrainTask) -> float:
    """Root mean square of what training changed, so that clients of unequal rank compare."""
    parts = trained_parts(task.training)
    sent = restrict(task.adapter, within(update.mask, task.mask))
    before = flatten([*adapter_tensors(sent, parts), *task.head.values()])
    after = flatten([*adapter_tensors(update.adapter, parts), *update.head.values()])
    return float((after - before).norm()) / math.sqrt(max(1, after.numel()))


def outliers(changes: Mapping[Key, float], bound: float) -> dict[Key, str]:
    """Who changed more than ``bound`` times the median of the cohort, and by how much; 0 is no bound."""
    if bound == 0 or len(changes) < MIN_COHORT:
        return {}
    median = statistics.median(changes.values())
    far = {key: value for key, value in changes.items() if median > 0 and not value <= bound * median}
    return {key: f"changed {value / median:.3g} times the median of its cohort" for key, value in far.items()}


def _max_header(task: Task) -> int:
    """The header repeats the client's name, in which one letter may take 14 bytes of JSON within JSON."""
    return MAX_REPLY_HEADER + 14 * len(task.client)


def _bounded_size(data: bytes, most: int) -> None:
    if not data:
        raise WireError("nothing was sent", "empty")
    if len(data) > most:
        raise WireError(f"{len(data)} bytes, at most {most} can answer the task", "too_large")


def _answers(meaning: Mapping[str, Any], expected: Mapping[Any, Any]) -> None:
    for key, value in expected.items():
        found = meaning.get(key)
        if type(found) is not type(value) or found != value:
            raise WireError(f"{key} is {repr(found)[:_MAX_NAME]}, expected {value!r}", key)


def _claims(meaning: Mapping[str, Any], most_examples: int | None) -> tuple[int, dict[str, float]]:
    """How many examples and which metrics a client says it had."""
    count, metrics = meaning.get("num_examples"), meaning.get("metrics")
    if type(count) is not int or count < 1:
        raise WireError(f"num_examples is {count!r}, expected a count of at least 1", "examples")
    if most_examples is not None and count > most_examples:
        raise WireError(f"num_examples is {count}, registered were {most_examples}", "examples")
    if not isinstance(metrics, dict) or not all(map(_is_number, metrics.values())):
        raise WireError("metrics must be finite numbers by name", "metrics")
    if len(metrics) > MAX_METRICS or any(len(name) > _MAX_NAME for name in metrics):
        raise WireError(f"at most {MAX_METRICS} metrics with names of {_MAX_NAME} characters", "metrics")
    return count, metrics


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_METRIC


def _named(tensors: Mapping[str, Tensor], needed: set[str], allowed: set[str]) -> None:
    if missing := needed - set(tensors):
        raise WireError(f"tensor {', '.join(sorted(missing))} is missing", "missing")
    if extra := set(tensors) - needed - allowed:
        raise WireError(f"tensor {', '.join(sorted(extra))[:_MAX_NAME]} was not asked for", "extra")


def _kept(tensors: Mapping[str, Tensor], task: TrainTask) -> RankMask:
    """The slots of the bank that the update is about: all that trained, or those self-pruning kept."""
    if "mask" not in tensors:
        return task.trained
    mask = unpack_bits(tensors["mask"], {name: bits.numel() for name, bits in task.trained.items()})
    if num_slots(mask_minus(mask, task.trained)):
        raise WireError("the update keeps slots that it was not given to train", "slots")
    if num_slots(mask) == 0:
        raise WireError("the update keeps no slot", "empty")
    return mask


def _votes(tensors: Mapping[str, Tensor], task: TrainTask) -> RankMask:
    """The slots of the bank that were voted for."""
    assert task.ballot is not None
    marked = unpack_bits(tensors["votes"], {name: int(held.sum()) for name, held in task.trained.items()})
    if num_slots(marked) > task.ballot.budget:
        raise WireError(f"{num_slots(marked)} votes, allowed are {task.ballot.budget}", "votes")
    return over_bank(marked, task.trained)


def _largest(tensors: Mapping[str, Tensor], name: str) -> float:
    """The largest absolute value of a tensor.

    Raises: WireError when one of its numbers is not finite.
    """
    if tensors[name].numel() == 0:
        return 0.0
    ends = [float(end) for end in torch.aminmax(tensors[name])]
    if not all(map(math.isfinite, ends)):
        raise WireError(f"tensor {name} holds a number that is not finite", "not_finite")
    return max(map(abs, ends))
