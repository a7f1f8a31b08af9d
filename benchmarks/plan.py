"""Makes the work of one variant: tokens, start, cohorts and batches, as polyrank draws them.

python -m benchmarks.plan VARIANT FOLDER --data FOLDER_WITH_AG_NEWS
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import COHORT, ROUNDS, STEPS, VARIANTS, Variant
from benchmarks.sides.polyrank_side import client_name
from benchmarks.sides.work import Plan, Session, State, Work, write_work
from polyrank.adapter import new_adapter
from polyrank.data.partition import Dirichlet, share_out
from polyrank.data.source import load_corpus
from polyrank.data.texts import Data
from polyrank.data.tokens import Tokens, tokenize
from polyrank.messages import Training
from polyrank.models.load import BaseModel, load_base, packaged_model, read_head
from polyrank.models.targets import resolve_targets
from polyrank.sampling import SampleCount
from polyrank.seed import seed_for
from polyrank.session import batches

SEED, CLIENTS, RANK, SCALE = 0, 20, 8, 2.0
TRAINING: dict[str, Any] = {
    "optimizer": "sgd",
    "learning_rate": 0.1,  # at 0.5 a peer on AG News that pads otherwise ends 1.5e-3 apart from itself
    "local_steps": STEPS,
    "batch_size": 8,
    "clip_norm": 0.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=None)
    given = parser.parse_args()
    write_work(make_work(VARIANTS[given.variant], given.data), given.folder)


def make_work(variant: Variant, data: Path | None) -> Work:
    """Tokens, start and plan of one variant; cohorts and batches are those that polyrank draws."""
    classes = 4 if variant.ag_news else 8
    model = load_base("minilm", [str(number) for number in range(classes)], SEED, torch.device("cpu"))
    tokens, sizes = ag_news(model, data) if variant.ag_news else random_texts(classes)
    plan = Plan(
        str(packaged_model()),
        classes,
        RANK,
        SCALE,
        SEED,
        COHORT,
        TRAINING,
        sizes,
        variant.pad_to,
        tokens.pad_id,
        plan_rounds(sizes),
    )
    start = start_of(model, variant.top)
    return work_of(plan, tokens, start)


def work_of(plan: Plan, tokens: Tokens, start: State) -> Work:
    """Plan, tokens and start in one."""
    ids, starts, labels = map(torch.from_numpy, (tokens.ids, tokens.starts, tokens.labels))
    return Work(plan, ids, starts, labels, start)


def random_texts(classes: int) -> tuple[Tokens, list[int]]:
    """Texts of exactly 64 tokens, 80 to 112 for each client."""
    sizes = [80 + 8 * (number % 5) for number in range(CLIENTS)]
    draw = np.random.default_rng(SEED)
    ids = draw.integers(1_000, 20_000, sum(sizes) * 64).astype(np.int32)
    starts = np.arange(sum(sizes) + 1) * 64
    return Tokens(ids, None, starts, draw.integers(0, classes, sum(sizes)), 0), sizes


def ag_news(model: BaseModel, data: Path | None) -> tuple[Tokens, list[int]]:
    """4,000 texts of AG News, shared out as polyrank does by default."""
    assert data is not None, "name the folder that holds ag_news/"
    corpus = load_corpus(Data(source=str(data / "ag_news"), max_train=4_000), SEED)
    shares = [rows.train for rows in share_out(corpus.train, 4, Dirichlet(clients=CLIENTS), SEED)]
    tokens = tokenize(corpus.train, model.tokenizer, 128)
    return tokens.select([row for share in shares for row in share]), [len(share) for share in shares]


def plan_rounds(sizes: Sequence[int]) -> list[list[Session]]:
    """Who trains in each round and on which rows, by polyrank's own draws."""
    names, training = [client_name(number) for number in range(len(sizes))], Training(**TRAINING)
    first = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    rounds = []
    for round_ in range(ROUNDS):
        cohort = [names.index(name) for name in SampleCount(count=COHORT).sample(names, SEED, round_)]
        drawn = {n: batches(sizes[n], training, seed_for(SEED, "train", round_, names[n])) for n in cohort}
        rounds.append(
            [Session(n, sizes[n], [[first[n] + row for row in rows] for rows in drawn[n]]) for n in cohort]
        )
    return rounds


def start_of(model: BaseModel, top: int) -> State:
    """An adapter on query, key and value of the last ``top`` blocks, and the fresh head.

    B is not zero as in a fresh one, for A would hardly move, and a side that left it alone would not be seen.
    """
    upper = tuple(f"{block}." for block in model.blocks[len(model.blocks) - top :])
    shapes = resolve_targets(model.network, model.blocks, "attention")
    kept = {name: shape for name, shape in shapes.items() if name.startswith(upper)}
    adapter = new_adapter(kept, form="lora", rank=RANK, scale=SCALE, seed=SEED)
    draw, start = torch.Generator().manual_seed(SEED), {}
    for name, factors in adapter.modules.items():
        start[f"{name}/B"] = torch.randn(factors.B.shape, generator=draw) * 0.02
        start[f"{name}/A"] = factors.A
    return start | {f"head/{name}": tensor for name, tensor in read_head(model).items()}


if __name__ == "__main__":
    main()
