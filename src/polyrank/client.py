"""On the device: bytes -> local training -> bytes. The same function on every engine.

`handle` is the whole client. Read it first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyrank.adapter import RankMask, fingerprint, full_mask, mask_minus, restrict, within
from polyrank.data.tokens import Tokens
from polyrank.evaluation import evaluate, precision
from polyrank.lowrank import LowRankLinear, fold, installed, read_adapter
from polyrank.messages import ClientScores, ClientUpdate, EvaluateTask, Folds, Training, TrainTask
from polyrank.models.load import BaseModel, head_parameters, read_head, write_head
from polyrank.models.prefix import PrefixCache, forward_from, usable_depth
from polyrank.seed import seed_for
from polyrank.wire import decode_task, encode_scores, encode_update, trained_parts


class ClientError(RuntimeError):
    """A session that gave no usable result, e.g. the loss left the finite numbers."""


class MissingFoldsError(ClientError):
    """The server believes that this device has folds which it does not have, e.g. after a restart."""


@dataclass(frozen=True, slots=True)
class ClientEnv:
    """What a device keeps between sessions: the frozen base model and its own data.

    Args:
        folds: fingerprints of the folds it has received.
        prefix: where what enters its lowest adapted block is kept, or None.
    """

    model: BaseModel
    train: Tokens
    holdout: Tokens | None = None
    folds: list[str] = field(default_factory=list)
    prefix: PrefixCache | None = None


def handle(request: bytes, env: ClientEnv) -> bytes:
    """Answer one request of the server.

    Raises:
        WireError: the request is not a task.
        ClientError: the task could not be done.
    """
    task = decode_task(request)
    catch_up(env.model, env.folds, task.folds)
    if isinstance(task, TrainTask):
        update = train(task, env)
        return encode_update(update, task)
    return encode_scores(score(task, env))


def train(task: TrainTask, env: ClientEnv) -> ClientUpdate:
    """Train the task's slots and the head on the client's examples; the base stays frozen.

    Raises: ClientError when the loss is not a finite number.
    """
    training, model = task.training, env.model
    write_head(model, task.head)
    start = restrict(task.adapter, within(task.trained, task.mask))
    frozen = restrict(task.adapter, within(mask_minus(task.mask, task.trained), task.mask))
    with (
        torch.random.fork_rng(devices=_cuda(model.device)),
        installed(model.network, start, training.adapter_dropout, frozen) as layers,
    ):
        torch.manual_seed(seed_for(task.seed, "dropout"))
        losses = _steps(task, env, layers)
        adapter = read_adapter(layers, start)
    kept = full_mask(adapter)
    if training.prune_keep is not None and _tail_norm(adapter.modules, training) < _tail_norm(
        start.modules, training
    ):
        kept = {name: _head_slots(f.rank, training.prune_keep) for name, f in adapter.modules.items()}
    return ClientUpdate(
        task.round,
        task.client,
        _in_bank(task.trained, kept),
        restrict(adapter, kept),
        read_head(model),
        num_examples=len(env.train),
        metrics={"loss": float(np.mean(losses)), "last_loss": losses[-1], "steps": len(losses)},
    )


def score(task: EvaluateTask, env: ClientEnv) -> ClientScores:
    """Score the adapter and head on the client's held-out examples.

    Raises: ClientError when it has none.
    """
    if env.holdout is None or len(env.holdout) == 0:
        raise ClientError("the client keeps no examples aside for evaluation")
    size = task.batch_size
    metrics = evaluate(env.model, task.adapter, task.head, env.holdout, size, env.prefix)
    return ClientScores(task.round, task.client, len(env.holdout), metrics)


def catch_up(model: BaseModel, received: list[str], folds: Folds) -> None:
    """Add the folds that a device has missed to its frozen weights, each exactly once.

    Clients that share one resident model share its folds; each still keeps its own list, so that a
    fold the server forgot to send is found out.

    Args:
        received: fingerprints of the folds this device got; grows in place.

    Raises: ClientError when a fold is missing or is not the one that came before.
    """
    if folds.first > len(received):
        raise MissingFoldsError(f"folds {len(received)} to {folds.first - 1} never came")
    for number, adapter in enumerate(folds.adapters, folds.first):
        name = fingerprint(adapter)
        if number < len(received) and received[number] != name:
            raise ClientError(f"fold {number} is not the one that came before")
        if number == len(received):
            received.append(name)
        if number == len(model.folded):
            fold(model.network, adapter)
            model.folded.append(name)
    if model.folded != received:
        raise MissingFoldsError(
            f"the base model holds {len(model.folded)} folds, this client {len(received)}"
        )


def batches(num_examples: int, training: Training, seed: int) -> Iterator[list[int]]:
    """Row numbers of each local step's batch.

    Every epoch is a new permutation cut into batches; its last batch may be smaller.
    """
    per_epoch = math.ceil(num_examples / training.batch_size)
    steps = training.local_steps or per_epoch * (training.local_epochs or 1)
    draw = np.random.default_rng(seed_for(seed, "batches"))
    done = 0
    while done < steps:
        order = draw.permutation(num_examples).tolist()
        for start in range(0, num_examples, training.batch_size):
            if done == steps:
                return
            yield order[start : start + training.batch_size]
            done += 1


def _steps(task: TrainTask, env: ClientEnv, layers: Mapping[str, LowRankLinear]) -> list[float]:
    """Run the local steps and return the loss of each."""
    training, model = task.training, env.model
    parameters = trainable(model, layers, training)
    for parameter in model.network.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = _optimizer(training, parameters)
    depth = usable_depth(model, task.adapter.modules, env.train, env.prefix)
    forward = forward_from(model, env.train, 0 if training.base_dropout else depth, env.prefix)
    model.network.train(training.base_dropout)
    losses = []
    try:
        for rows in batches(len(env.train), training, task.seed):
            inputs, labels = env.train.batch(rows, model.device)
            with precision(model.device):
                logits = forward(rows, inputs)
            loss = F.cross_entropy(logits.float(), labels)
            losses.append(loss.item())
            if training.prune_penalty > 0:
                loss = loss + training.prune_penalty * _tail_norm(layers, training)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if training.clip_norm > 0:
                nn.utils.clip_grad_norm_(parameters, training.clip_norm)
            optimizer.step()
            if not math.isfinite(losses[-1]):
                raise ClientError(f"loss is {losses[-1]} at local step {len(losses)}")
    finally:
        model.network.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
    return losses


def trainable(
    model: BaseModel, layers: Mapping[str, LowRankLinear], training: Training
) -> list[nn.Parameter]:
    """The factors that train this round, module after module, and then the head."""
    parts = trained_parts(training)
    factors = [
        p for layer in layers.values() for name, p in layer.named_parameters(recurse=False) if name in parts
    ]
    return [*factors, *head_parameters(model).values()]


def _tail_norm(modules: Mapping[str, LowRankLinear] | Mapping[str, object], training: Training) -> Tensor:
    """sum over modules of |B tail| |A tail|: the slots past the share that self-pruning keeps.

    Source: HetLoRA (Cho et al., arXiv 2401.06432), its regulariser and its criterion.
    """
    assert training.prune_keep is not None
    norms = [torch.zeros(())]
    for factors in modules.values():
        A: Tensor = factors.A  # type: ignore[attr-defined]
        tail = ~_head_slots(A.shape[0], training.prune_keep)
        B: Tensor = factors.B  # type: ignore[attr-defined]
        norms.append(B[:, tail].norm() * A[tail].norm())
    return torch.stack(norms).sum()


def _head_slots(rank: int, keep: float) -> Tensor:
    """The first slots that self-pruning keeps, at least one."""
    return torch.arange(rank) < max(1, math.floor(keep * rank))


def _in_bank(trained: RankMask, kept: RankMask) -> RankMask:
    """A mask over the trained slots as a mask over the bank's slots."""
    mask = {}
    for name, held in trained.items():
        mask[name] = held.clone()
        if name in kept:
            mask[name][held] = kept[name]
    return mask


def _optimizer(training: Training, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "adamw":
        fused = parameters[0].device.type in ("cpu", "cuda")
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)
    return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=training.momentum)


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
