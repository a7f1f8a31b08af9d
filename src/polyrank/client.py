"""On the device: bytes -> local training -> bytes. The same function on every engine.

`handle` is the whole client. Read it first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from polyrank.data.tokens import Tokens
from polyrank.evaluation import evaluate, precision
from polyrank.lowrank import installed, read_adapter
from polyrank.messages import ClientScores, ClientUpdate, EvaluateTask, Training, TrainTask
from polyrank.models.load import BaseModel, head_parameters, read_head, write_head
from polyrank.seed import seed_for
from polyrank.wire import decode_task, encode_scores, encode_update


class ClientError(RuntimeError):
    """A session that gave no usable result, e.g. the loss left the finite numbers."""


@dataclass(frozen=True, slots=True)
class ClientEnv:
    """What a device keeps between sessions: the frozen base model and its own data."""

    model: BaseModel
    train: Tokens
    holdout: Tokens | None = None


def handle(request: bytes, env: ClientEnv) -> bytes:
    """Answer one request of the server.

    Raises:
        WireError: the request is not a task.
        ClientError: the task could not be done.
    """
    task = decode_task(request)
    if isinstance(task, TrainTask):
        return encode_update(train(task, env))
    return encode_scores(score(task, env))


def train(task: TrainTask, env: ClientEnv) -> ClientUpdate:
    """Train the held slots and the head on the client's examples; the base stays frozen.

    Raises: ClientError when the loss is not a finite number.
    """
    training, model = task.training, env.model
    write_head(model, task.head)
    with (
        torch.random.fork_rng(devices=_cuda(model.device)),
        installed(model.network, task.adapter, training.adapter_dropout) as layers,
    ):
        torch.manual_seed(seed_for(task.seed, "dropout"))
        head = list(head_parameters(model).values())
        factors = [p for layer in layers.values() for p in (layer.B, layer.e, layer.A) if p is not None]
        losses = _steps(task, env, [*factors, *head])
        adapter = read_adapter(layers, task.adapter)
    return ClientUpdate(
        task.round,
        task.client,
        task.mask,
        adapter,
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
    metrics = evaluate(env.model, task.adapter, task.head, env.holdout, task.batch_size)
    return ClientScores(task.round, task.client, len(env.holdout), metrics)


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


def _steps(task: TrainTask, env: ClientEnv, parameters: Sequence[nn.Parameter]) -> list[float]:
    """Run the local steps and return the loss of each."""
    training, model = task.training, env.model
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = _optimizer(training, parameters)
    model.network.train(training.base_dropout)
    losses = []
    try:
        for rows in batches(len(env.train), training, task.seed):
            inputs, labels = env.train.batch(rows, model.device)
            with precision(model.device):
                logits = model.network(**inputs).logits
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if training.clip_norm > 0:
                nn.utils.clip_grad_norm_(parameters, training.clip_norm)
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ClientError(f"loss is {losses[-1]} at local step {len(losses)}")
    finally:
        model.network.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
    return losses


def _optimizer(training: Training, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=training.momentum)


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
