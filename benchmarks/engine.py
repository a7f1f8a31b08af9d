"""Training steps per CPU-second: polyrank against a plain transformers + PEFT loop, on the same work.

    python -m benchmarks.engine --out DATED.json [--data FOLDER] [--only WORDS]

One thread, the two sides take turns within one process; medians of the ratios over the pairs, with the
least and the most. Every row first checks that both sides end in the same adapter (fp32 rows) or close
to it (bf16).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from polyrank.adapter import Adapter, full_mask, new_adapter
from polyrank.client import handle
from polyrank.data.docstrings import load_docstrings
from polyrank.data.source import load_corpus
from polyrank.data.texts import Data
from polyrank.data.tokens import Tokens, tokenize
from polyrank.ledger import versions
from polyrank.lowrank import installed
from polyrank.messages import Training, TrainTask
from polyrank.models.load import (
    head_parameters,
    load_base,
    logits_of,
    packaged_model,
    read_head,
    write_head,
)
from polyrank.models.prefix import PrefixCache, can_skip
from polyrank.models.targets import resolve_targets
from polyrank.session import ClientEnv, batches, train, train_together
from polyrank.wire import encode_task

STEPS, BATCH, RANK, CLASSES = 10, 8, 8, 8
Work = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--data", type=Path, default=None, help="folder that holds ag_news/, for its rows")
    parser.add_argument("--only", default="", help="rows whose name holds these words")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    rows = [row() for name, row in rows_of(given).items() if given.only in name]
    print(
        "| work | ratio (least to most) | polyrank steps per CPU-s | largest difference |\n|---|---|---|---|"
    )
    for row in rows:
        span = f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
        print(f"| {row['work']} | {span} | {row['steps_per_cpu_s']:.1f} | {row['difference']:.1e} |")
    if given.out is not None:
        ratios = {row["work"]: row["ratio"] for row in rows}
        content = {"date": str(datetime.date.today()), "versions": versions(), "ratios": ratios, "rows": rows}
        given.out.write_text(json.dumps(content, indent=2) + "\n")


def rows_of(given: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every row of the table by name."""
    pairs, full = given.pairs, full_tokens()
    texts: dict[str, tuple[Tokens, int | None]]
    texts = {"64 full tokens": (full, None), "docstrings": (docstrings(), None)}
    if given.data is not None:
        texts["AG News, padded to 128 by the loop"] = (ag_news(given.data), 128)
    rows: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, (data, pad_to) in texts.items():
        for base_dtype in ("fp32", "bf16"):
            work = f"all blocks, {name}, {base_dtype}"
            rows[work] = partial(measure, work, pairs, data, base_dtype, 6, pad_to)
    for top in (3, 2, 1):
        work = f"top {top} of 6 blocks, 64 full tokens, fp32, prefix kept"
        rows[work] = partial(measure, work, pairs, full, "fp32", top)
        rows[f"top {top} of 6 blocks, 5 sessions with filling"] = partial(measure_run, top, pairs, full)
    rows["a bare loop over the same kernels"] = partial(measure_overhead, pairs, full)
    for clients, batch, least in ((8, 8, 6), (16, 2, 8), (4, 8, 12)):
        sizes = f"{batch} texts of {least} to {2 * least} tokens"
        work = f"{clients} clients in one pass against one by one, {sizes}"
        rows[work] = partial(measure_fused, work, pairs, clients, batch, least)
    return rows


def measure(
    work: str, pairs: int, data: Tokens, base_dtype: Any, top: int, pad_to: int | None = None
) -> dict[str, Any]:
    """One row of the table: our session against the plain loop, in turns.

    Args:
        pad_to: tokens that the plain loop pads every text to; None pads to the longest of the batch.
    """
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = our_session(data, base_dtype, top, Path(folder)), plain_session(data, top, pad_to)
        first, second = ours(), plain()
        scale = max(float(t.abs().max()) for t in second.values())
        difference = max(float((first[n] - t).abs().max()) for n, t in second.items()) / scale
        assert difference < (1e-3 if base_dtype == "fp32" else 0.2), difference
        ratios, spent = [], []
        for _ in range(pairs):
            ours_s, plain_s = cpu_seconds(ours), cpu_seconds(plain)
            ratios.append(plain_s / ours_s)
            spent.append(ours_s)
    return row_of(work, ratios, STEPS, spent) | {"difference": difference}


def measure_run(top: int, pairs: int, data: Tokens) -> dict[str, Any]:
    """Five sessions on two sets of texts, as many as each client of the whole run has, from an empty cache.

    20 clients of which 10 train in each of 5 rounds: every client trains 2.5 times.
    """
    other = dataclasses.replace(data, ids=data.ids[::-1].copy())
    plain_first, plain_second = plain_session(data, top), plain_session(other, top)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            first, second = (our_session(texts, "fp32", top, Path(folder)) for texts in (data, other))
            start = time.process_time()
            for work in (first, second, first, second, first):
                work()
            spent.append(time.process_time() - start)

    def plain() -> float:
        works = (plain_first, plain_second, plain_first, plain_second, plain_first)
        return sum(cpu_seconds(work) for work in works)

    spent: list[float] = []
    ratios = []
    for _ in range(pairs):
        ours()
        ratios.append(plain() / spent[-1])
    return row_of(f"top {top} of 6 blocks, 5 sessions with filling", ratios, 5 * STEPS, spent)


def measure_overhead(pairs: int, data: Tokens) -> dict[str, Any]:
    """A client's session, bytes in and bytes out, against a bare loop over the very same kernels."""
    model = load_base("minilm", [str(i) for i in range(CLASSES)], 0, torch.device("cpu"))
    task = task_for(start_of(model, 6), read_head(model))
    request, env = encode_task(task), ClientEnv(model, data)

    def bare() -> None:
        write_head(model, task.head)
        head = list(head_parameters(model).values())
        with installed(model.network, [task.adapter]) as layers:
            trained = [*(p for layer in layers.values() for p in (layer.B, layer.A)), *head]
            for parameter in trained:
                parameter.requires_grad_(True)
            optimizer = torch.optim.SGD(trained, lr=task.training.learning_rate)
            for rows in batches(len(data), task.training, task.seed):
                inputs, labels = data.batch(rows, model.device)
                loss = F.cross_entropy(logits_of(model, inputs), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                loss.item()
        model.network.requires_grad_(False)

    ratios, spent = [], []
    for _ in range(pairs):
        spent.append(cpu_seconds(lambda: handle(request, env)))
        ratios.append(cpu_seconds(bare) / spent[-1])
    return row_of("a bare loop over the same kernels", ratios, STEPS, spent)


def measure_fused(work: str, pairs: int, clients: int, batch: int, least: int) -> dict[str, Any]:
    """Some clients' sessions in one pass of the base model against the same sessions one after the other.

    Args:
        batch: texts of each client's step.
        least: tokens of the shortest text; the longest has twice as many.
    """
    model = load_base("minilm", [str(i) for i in range(CLASSES)], 0, torch.device("cpu"))
    task = task_for(start_of(model, 6), read_head(model))
    task = dataclasses.replace(task, training=task.training.model_copy(update={"batch_size": batch}))
    tasks = [dataclasses.replace(task, seed=number) for number in range(clients)]
    environments = [ClientEnv(model, short_tokens(number, least)) for number in range(clients)]

    def together() -> list[Any]:
        return train_together(tasks, environments)

    def apart() -> list[Any]:
        return [train(one, env) for one, env in zip(tasks, environments, strict=True)]

    first, second = together(), apart()
    difference = max(
        float((a.adapter.modules[name].B - f.B).abs().max() / f.B.abs().max())
        for a, b in zip(first, second, strict=True)
        for name, f in b.adapter.modules.items()
    )
    assert difference < 1e-3, difference
    ratios, spent = [], []
    for _ in range(pairs):
        spent.append(cpu_seconds(together))
        ratios.append(cpu_seconds(apart) / spent[-1])
    return row_of(work, ratios, STEPS * clients, spent) | {"difference": difference}


def row_of(work: str, ratios: list[float], steps: int, spent: list[float]) -> dict[str, Any]:
    """One row of the table."""
    return {
        "work": work,
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "steps_per_cpu_s": steps / statistics.median(spent),
        "difference": 0.0,
    }


def our_session(data: Tokens, base_dtype: Any, top: int, folder: Path) -> Work:
    """Local training of one client through polyrank; returns the trained B of each module."""
    model = load_base("minilm", [str(i) for i in range(CLASSES)], 0, torch.device("cpu"), base_dtype)
    model = dataclasses.replace(model, skips=can_skip(model))
    env = ClientEnv(model, data, prefix=PrefixCache(folder, 10**9))
    task = task_for(start_of(model, top), read_head(model))

    def work() -> dict[str, torch.Tensor]:
        return {name: f.B for name, f in train(task, env).adapter.modules.items()}

    return work


def plain_session(data: Tokens, top: int, pad_to: int | None = None) -> Work:
    """The same steps as a plain loop over a PEFT model would do them."""
    model = load_base("minilm", [str(i) for i in range(CLASSES)], 0, torch.device("cpu"))
    start, head = start_of(model, top), read_head(model)
    task = task_for(start, head)
    base = AutoModelForSequenceClassification.from_pretrained(packaged_model(), num_labels=CLASSES)
    base.load_state_dict(dict(head), strict=False)
    config = LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules=list(start.modules), lora_dropout=0.0
    )
    peft = get_peft_model(base, config)
    peft.eval()
    initial = {name: p.detach().clone() for name, p in peft.named_parameters() if p.requires_grad}
    for name, factors in start.modules.items():
        initial[f"base_model.model.{name}.lora_A.default.weight"] = factors.A

    def work() -> dict[str, torch.Tensor]:
        parameters = {name: p for name, p in peft.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(initial[name])
        optimizer = torch.optim.SGD(parameters.values(), lr=task.training.learning_rate)
        for rows in batches(len(data), task.training, task.seed):
            inputs, labels = data.batch(rows, torch.device("cpu"))
            if pad_to is not None:
                inputs = {n: F.pad(t, (0, pad_to - t.shape[1])) for n, t in inputs.items()}
            loss = F.cross_entropy(peft(**inputs).logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss.item()
        return {
            name: parameters[f"base_model.model.{name}.lora_B.default.weight"].detach().clone()
            for name in start.modules
        }

    return work


def start_of(model: Any, top: int) -> Adapter:
    """A fresh adapter on q, k, v of the last ``top`` blocks."""
    shapes = resolve_targets(model.network, model.blocks, "attention")
    upper = tuple(f"{block}." for block in model.blocks[len(model.blocks) - top :])
    kept = {name: shape for name, shape in shapes.items() if name.startswith(upper)}
    return new_adapter(kept, form="lora", rank=RANK, scale=2.0, seed=0)


def task_for(adapter: Adapter, head: Any) -> TrainTask:
    """Ten steps of plain SGD, so that both sides can be compared number by number."""
    training = Training(
        optimizer="sgd", learning_rate=0.05, local_steps=STEPS, batch_size=BATCH, clip_norm=0.0
    )
    mask = full_mask(adapter)
    return TrainTask(0, "c", 5, mask, mask, adapter, head, training)


def full_tokens() -> Tokens:
    """80 texts of exactly 64 tokens."""
    draw = np.random.default_rng(0)
    ids = draw.integers(1_000, 20_000, 80 * 64).astype(np.int32)
    return Tokens(ids, None, np.arange(81) * 64, draw.integers(0, CLASSES, 80), 0)


def short_tokens(seed: int, least: int) -> Tokens:
    """40 texts of ``least`` to twice as many tokens."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(least, 2 * least + 1, 40)
    ids = draw.integers(1_000, 20_000, int(lengths.sum())).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Tokens(ids, None, starts, draw.integers(0, CLASSES, 40), 0)


def docstrings() -> Tokens:
    """80 real texts of unequal length."""
    model = load_base("minilm", ["a", "b"], 0, torch.device("cpu"))
    return tokenize(load_docstrings().train.select(range(80)), model.tokenizer, 128)


def ag_news(folder: Path) -> Tokens:
    """80 texts of AG News."""
    corpus = load_corpus(Data(source=str(folder / "ag_news"), max_train=80, max_test=80), 0)
    model = load_base("minilm", ["a", "b"], 0, torch.device("cpu"))
    return tokenize(corpus.train, model.tokenizer, 128)


def cpu_seconds(work: Work) -> float:
    """CPU-seconds of this process for one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
