"""One session of local training: the steps that a client makes on its own texts.

Several clients may share a session: their batches go through the frozen base model as one, and each trains
its own factors and head exactly as it would alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyrank.adapter import (
    Adapter,
    Factors,
    Head,
    RankMask,
    full_mask,
    mask_minus,
    over_bank,
    restrict,
    within,
)
from polyrank.data.tokens import Tokens, join
from polyrank.evaluation import precision
from polyrank.fused import Shares, clip_each, own_heads
from polyrank.importance import Scores, highest
from polyrank.lowrank import LowRankLinear, installed, read_adapter
from polyrank.messages import Ballot, ClientUpdate, Training, TrainTask
from polyrank.models.load import BaseModel
from polyrank.models.prefix import PrefixCache, forward_from, usable_depth
from polyrank.models.recompute import recomputed
from polyrank.seed import seed_for
from polyrank.wire import trained_parts


class ClientError(RuntimeError):
    """A session that gave no usable result, e.g. the loss left the finite numbers."""


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


def train(task: TrainTask, env: ClientEnv) -> ClientUpdate:
    """Train the task's slots and the head on the client's examples; the base stays frozen.

    Raises: ClientError when the loss is not a finite number.
    """
    (result,) = train_together([task], [env])
    if isinstance(result, ClientError):
        raise result
    return result


def train_together(
    tasks: Sequence[TrainTask], environments: Sequence[ClientEnv]
) -> list[ClientUpdate | ClientError]:
    """Train some clients side by side in one pass of the base model, as each would train alone.

    Args:
        tasks: of equal ``training``; more than one only where nothing is dropped at random.
    """
    training, model, shares = tasks[0].training, environments[0].model, Shares()
    starts = [restrict(task.adapter, within(task.trained, task.mask)) for task in tasks]
    frozen = [
        restrict(task.adapter, within(mask_minus(task.mask, task.trained), task.mask)) for task in tasks
    ]
    heads = [task.head for task in tasks]
    with (
        torch.random.fork_rng(devices=_cuda(model.device)),
        installed(model.network, starts, training.adapter_dropout, frozen, shares) as layers,
        recomputed(model),
        own_heads(model.network, model.head_modules, heads, shares) as own,
    ):
        torch.manual_seed(seed_for(tasks[0].seed, "dropout"))
        ends = _steps(tasks, environments, Trained(layers, own, starts, shares))
    return [
        _update(task, env, start, end)
        for task, env, start, end in zip(tasks, environments, starts, ends, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Trained:
    """What trains in a session: each client's factors and head, stacked over the clients."""

    layers: Mapping[str, LowRankLinear]
    head: Mapping[str, nn.Parameter]
    starts: Sequence[Adapter]
    shares: Shares

    def parameters(self, training: Training) -> list[nn.Parameter]:
        """The factors that train this round, module after module, and then the head."""
        parts = trained_parts(training)
        factors = [(name, p) for module in self.factors().values() for name, p in module.items()]
        for name, parameter in factors:
            parameter.requires_grad_(name in parts)  # no gradient is computed for what stays
        return [*(parameter for name, parameter in factors if name in parts), *self.head.values()]

    def factors(self) -> dict[str, dict[str, nn.Parameter]]:
        """The stacked B, e, A of each module that somebody trains."""
        found = {name: dict(layer.named_parameters(recurse=False)) for name, layer in self.layers.items()}
        return {name: parts for name, parts in found.items() if parts}

    def read(self, client: int, scores: Scores | None, ballot: Ballot | None) -> End:
        """A copy of one client's adapter and head as they are now, and its votes."""
        head = {name: stacked[client].detach().cpu().clone() for name, stacked in self.head.items()}
        adapter, votes = read_adapter(self.layers, self.starts[client], client), None
        if scores is not None and ballot is not None and not ballot.masks:
            votes = highest(self.scored(scores, client), ballot.budget)
        return End(adapter, head, votes=votes)

    def scored(self, scores: Scores, client: int) -> dict[str, Tensor]:
        """The score of each slot that a client trains, [r] by module."""
        factors = self.factors()
        ranks = {name: self.starts[client].modules[name].rank for name in self.starts[client].modules}
        return {name: scores.of(name, factors[name])[client, :rank].cpu() for name, rank in ranks.items()}

    def mask_lowest(self, scores: Scores, ballots: Sequence[Ballot | None]) -> None:
        """Zero e of each client's slots below its budget, as AdaLoRA does; they may grow back."""
        for client, ballot in enumerate(ballots):
            assert ballot is not None
            for name, kept in highest(self.scored(scores, client), ballot.budget).items():
                e = self.layers[name].e
                assert e is not None
                e.data[client, : len(kept)] *= kept.to(e.device)


@dataclass(frozen=True, slots=True)
class End:
    """Where a client's training ended, and the loss of each step."""

    adapter: Adapter
    head: Head
    losses: Sequence[float] = ()
    votes: RankMask | None = None


def session_depth(task: TrainTask, env: ClientEnv) -> int:
    """Blocks at the bottom that this session may take from the stored prefix."""
    if task.training.base_dropout:
        return 0
    return usable_depth(env.model, task.adapter.modules, env.train, env.prefix)


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


def _steps(tasks: Sequence[TrainTask], environments: Sequence[ClientEnv], trained: Trained) -> list[End]:
    """Run the local steps of all clients; one that has fewer is read out after its last."""
    training, model = tasks[0].training, environments[0].model
    data = [env.train for env in environments]
    plans = [list(batches(len(own), training, task.seed)) for own, task in zip(data, tasks, strict=True)]
    parameters = trained.parameters(training)
    optimizer = _optimizer(training, parameters)
    joined, firsts = join(data), np.cumsum([0, *map(len, data)])
    forward = forward_from(model, data, session_depth(tasks[0], environments[0]), environments[0].prefix)
    ballots, losses = [task.ballot for task in tasks], list[Tensor]()
    ballot = ballots[0]  # alike but for their budgets
    scores = None if ballot is None else Scores(ballot.importance, ballot.smoothing)
    read: dict[int, End] = {}
    model.network.train(training.base_dropout)
    try:
        for step in range(max(map(len, plans))):
            rows = [plan[step] if step < len(plan) else [] for plan in plans]
            chosen = [int(first) + row for first, own in zip(firsts, rows, strict=False) for row in own]
            inputs, labels = joined.batch(chosen, model.device)
            trained.shares.begin([own.lengths[part].tolist() for own, part in zip(data, rows, strict=True)])
            with precision(model.device):
                logits = forward(rows, inputs)
            taught = [own.targets(part) for own, part in zip(data, rows, strict=True)]
            each = _means(F.cross_entropy(logits.float(), labels, reduction="none"), taught)
            losses.append(each.detach())
            optimizer.zero_grad(set_to_none=True)
            loss = each.sum() + _penalty(trained.layers, training)
            loss.backward()  # type: ignore[no-untyped-call]
            if training.clip_norm > 0:
                clip_each(parameters, training.clip_norm)
            masks = ballot is not None and ballot.masks
            if scores is not None and not masks:
                scores.update(trained.factors())
            optimizer.step()
            if scores is not None and masks:  # e of a masked slot was 0 until this step moved it
                scores.update(trained.factors())
                trained.mask_lowest(scores, ballots)
            done = [client for client, plan in enumerate(plans) if step + 1 == len(plan)]
            read |= {client: trained.read(client, scores, ballots[client]) for client in done}
    finally:
        model.network.eval()
    table = torch.stack(losses).cpu()
    return [
        replace(read[client], losses=table[: len(plan), client].tolist()) for client, plan in enumerate(plans)
    ]


def _means(values: Tensor, taught: Sequence[int]) -> Tensor:
    """Mean of each client's values (a label or a response token each), [n] to [G]; 0 for one without any."""
    counts = torch.tensor(taught)
    owner = torch.repeat_interleave(torch.arange(len(taught)), counts).to(values.device)
    sums = values.new_zeros(len(taught)).index_add(0, owner, values)
    return sums / counts.clamp(min=1).to(values.device)


def _update(task: TrainTask, env: ClientEnv, start: Adapter, end: End) -> ClientUpdate | ClientError:
    """What a client sends, or why it has nothing to send."""
    for number, loss in enumerate(end.losses, 1):
        if not math.isfinite(loss):
            return ClientError(f"loss is {loss} at local step {number}")
    training, adapter = task.training, end.adapter
    kept = full_mask(adapter)
    if training.prune_keep is not None and _tail_norm(adapter, training) < _tail_norm(start, training):
        kept = {name: _head_slots(f.rank, training.prune_keep) for name, f in adapter.modules.items()}
    return ClientUpdate(
        task.round,
        task.client,
        over_bank(kept, task.trained),
        restrict(adapter, kept),
        end.head,
        num_examples=len(env.train),
        metrics={
            "loss": float(np.mean(end.losses)),
            "last_loss": end.losses[-1],
            "steps": len(end.losses),
        },
        votes=None if end.votes is None else over_bank(end.votes, task.trained),
    )


def _penalty(layers: Mapping[str, LowRankLinear], training: Training) -> Tensor | float:
    """What the settings add to the loss of each client, summed over the clients."""
    if not layers or training.prune_penalty == training.orthogonality == 0:
        return 0.0
    total: Tensor | float = 0.0
    for client in range(len(next(iter(layers.values())).ranks)):
        own = {name: layer.factors(client) for name, layer in layers.items() if layer.ranks[client]}
        if training.prune_penalty > 0:
            total = total + training.prune_penalty * _tail_norm(Adapter("lora", own), training)
        if training.orthogonality > 0:
            total = total + training.orthogonality * sum(map(_skewness, own.values()))
    return total


def _skewness(factors: Factors) -> Tensor:
    """|A A' - 1|^2 + |B' B - 1|^2: how far a module's slots are from orthonormal (AdaLoRA's term)."""
    one = torch.eye(factors.rank, device=factors.A.device)
    rows, columns = factors.A @ factors.A.T - one, factors.B.T @ factors.B - one
    return rows.square().sum() + columns.square().sum()


def _tail_norm(adapter: Adapter, training: Training) -> Tensor:
    """sum over modules of |B tail| |A tail|: the slots past the share that self-pruning keeps.

    Source: HetLoRA (Cho et al., arXiv 2401.06432), its regulariser and its criterion.
    """
    assert training.prune_keep is not None
    norms = []
    for factors in adapter.modules.values():
        tail = ~_head_slots(factors.rank, training.prune_keep)
        B = factors.B if factors.e is None else factors.B * factors.e
        norms.append(B[:, tail].norm() * factors.A[tail].norm())
    return torch.stack(norms).sum() if norms else torch.zeros(())


def _head_slots(rank: int, keep: float) -> Tensor:
    """The first slots that self-pruning keeps, at least one."""
    return torch.arange(rank) < max(1, math.floor(keep * rank))


def _optimizer(training: Training, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "adamw":
        fused = parameters[0].device.type in ("cpu", "cuda")
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)
    return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=training.momentum)


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
