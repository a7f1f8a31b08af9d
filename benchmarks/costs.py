"""What the wire format costs, and what scoring costs against a plain loop over padded batches.

    python -m benchmarks.costs --out DATED.json

One thread, the two sides take turns within one process; medians of the ratios, with the least and the most.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load, save
from torch.nn import functional as F

from benchmarks.peers import machine
from benchmarks.plan import RANK, SCALE, SEED, start_of, work_of
from benchmarks.sides.peft_loop import put_in, resident_model
from benchmarks.sides.polyrank_side import adapter_and_head
from benchmarks.sides.work import Plan
from polyrank.adapter import full_mask, new_adapter
from polyrank.data.docstrings import load_docstrings
from polyrank.data.tokens import tokenize
from polyrank.evaluation import evaluate
from polyrank.gate import decode_update
from polyrank.ledger import versions
from polyrank.messages import ClientUpdate, Training, TrainTask
from polyrank.models.load import load_base, packaged_model
from polyrank.wire import encode_update

WIDTH, TEXTS, LENGTH, BATCH = 4096, 500, 128, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for modules in (10, 100) for row in wire(modules, given.pairs)]
    rows.append(scoring(given.pairs))
    print("| work | CPU-ms | other | other over ours (least to most) |\n|---|---|---|---|")
    for row in rows:
        span = f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
        print(f"| {row['work']} | {1e3 * row['cpu_s']:.1f} | {row['other']} | {span} |")
    if given.out is not None:
        facts = {"date": str(datetime.date.today()), "versions": versions(), "machine": machine()}
        given.out.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


def wire(num_modules: int, pairs: int) -> list[dict[str, Any]]:
    """Encoding and decoding one update of rank 16, against plain safetensors of the same tensors."""
    shapes = {f"model.layers.{number}.q_proj": (WIDTH, WIDTH) for number in range(num_modules)}
    adapter = new_adapter(shapes, form="lora", rank=16, scale=SCALE, seed=SEED)
    mask, head = full_mask(adapter), {"score.weight": torch.zeros(2, 8)}
    task = TrainTask(0, "c", 0, mask, mask, adapter, head, Training())
    metrics = {"loss": 1.0, "last_loss": 1.0, "steps": 1}
    update = ClientUpdate(0, "c", mask, adapter, head, 10, metrics)
    tensors = {f"{name}/{part}": t for name, f in adapter.modules.items() for part, t in f.tensors().items()}
    ours, plain = encode_update(update, task), save(tensors)
    back = decode_update(ours, task).adapter
    assert all(torch.equal(f.A, adapter.modules[name].A) for name, f in back.modules.items())
    size = f"{len(ours) / 1e6:.0f} MB"
    encoding = (lambda: encode_update(update, task), lambda: save(tensors))
    decoding = (lambda: decode_update(ours, task), lambda: load(plain))
    return [
        in_turns(f"encode an update of {size}", "safetensors", pairs, *encoding),
        in_turns(f"decode and check an update of {size}", "safetensors", pairs, *decoding),
    ]


def scoring(pairs: int) -> dict[str, Any]:
    """Scores of an adapted model on real texts, against a plain PEFT loop that pads to 128 tokens."""
    corpus = load_docstrings()
    model = load_base("minilm", corpus.label_names, SEED, torch.device("cpu"))
    data = tokenize(corpus.train.select(range(TEXTS)), model.tokenizer, LENGTH)
    classes = len(corpus.label_names)
    start = start_of(model, 6)
    plan = Plan(str(packaged_model()), classes, RANK, SCALE, SEED, 0, {}, [TEXTS], LENGTH, data.pad_id, [])
    work = work_of(plan, data, start)
    adapter, head = adapter_and_head(work)
    peft, parameters = resident_model(work)
    put_in(parameters, start)
    peft.eval()

    def plain() -> float:
        losses = []
        with torch.inference_mode():
            for first in range(0, TEXTS, BATCH):
                inputs, labels = work.batch(range(first, min(first + BATCH, TEXTS)))
                losses.append(F.cross_entropy(peft(**inputs).logits, labels, reduction="sum").item())
        return sum(losses) / TEXTS

    def ours() -> float:
        return evaluate(model, adapter, head, data, BATCH)["loss"]

    assert abs(ours() - plain()) < 1e-4
    return in_turns(f"score {TEXTS} docstrings", f"PEFT, padded to {LENGTH}", pairs, ours, plain)


def in_turns(
    work: str, other: str, pairs: int, ours: Callable[[], Any], theirs: Callable[[], Any]
) -> dict[str, Any]:
    """CPU-seconds of ours, and the ratios of theirs to ours."""
    each = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(pairs)]
    ratios = [theirs_s / ours_s for ours_s, theirs_s in each]
    spread = {"ratio": median(ratios), "least": min(ratios), "most": max(ratios)}
    return {"work": work, "cpu_s": median([ours_s for ours_s, _ in each]), "other": other, **spread}


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU-seconds of this process for one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
