"""Whole runs that take about a second: a tiny BERT in a folder, sixty texts, every way of keeping state."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polyrank.cli import main
from polyrank.config import Config, load_config
from polyrank.errors import InputError, RunError

WORDS = [f"word{i}" for i in range(80)]
RESULTS = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "state.safetensors")
LEDGERS = ("rounds.jsonl", "clients.jsonl", "slots.jsonl", "client_scores.jsonl", "privacy.jsonl")
METHODS: dict[str, list[str]] = {
    "plain": [],
    "fused": ["engine.fuse=2", "rounds=3"],
    "voting": ["method=fedara", "voting.target_rank=1", "voting.arbitration=top", "adapter.rank=3"],
    "loss_based": [
        "aggregation.kind=replication_padding",
        "allocation.kind=loss_based",
        "allocation.low_rank=1",
        "allocation.high_rank=3",
        "allocation.high_share=0.4",
        "allocation.reallocate_every=2",
        "evaluation.validation_texts=8",
    ],
    "stacking": [
        "method=flora",
        "allocation.kind=tiers",
        "allocation.tiers=[{rank=1,share=0.5},{rank=3,share=0.5}]",
    ],
    "federa": ["method=federa"],
    "causal": [
        "task=causal_lm",
        "model.name={folder}/speaker",
        "data.source={folder}/questions.jsonl",
        "model.max_length=30",
        "evaluation.responses=2",
        "evaluation.max_new_tokens=4",
    ],
    "private": [
        "aggregation.weights=uniform",
        "evaluation.per_client=false",
        "privacy={noise_multiplier=20, clip_norm=0.001, noise_seed=5}",
    ],
    "pruning": ["method=hetlora", "allocation.tiers=[{rank=2,share=0.5},{rank=3,share=0.5}]"],
}


def small_config(folder: Path, method: str = "plain", *more: str) -> Config:
    """A config of four rounds over six clients; model and texts are made in ``folder`` when not there."""
    if not (folder / "model").exists():
        make_inputs(folder)
    given = [
        f"model.name={folder / 'model'}",
        f"data.source={folder / 'texts.csv'}",
        "rounds=4",
        "partition.kind=iid",
        "partition.clients=6",
        "sampling.count=3",
        "training.local_steps=2",
        "training.batch_size=4",
        "training.learning_rate=0.02",
        "model.max_length=12",
        "adapter.rank=3",
        "engine.workers=1",
        "engine.fuse=1",
        "evaluation.per_client=true",
    ]
    own = [setting.replace("{folder}", str(folder)) for setting in METHODS[method]]
    return load_config(None, [*given, *own, *more])


def make_inputs(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.conftest import tiny_network, tiny_speaker

    draw = random.Random(3)
    network = tiny_network("bert")
    network.save_pretrained(folder / "model")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder / "model")
    with (folder / "texts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(90):
            label = draw.randrange(3)
            chosen = draw.sample(WORDS[25 * label : 25 * label + 30], draw.randint(3, 9))
            writer.writerow([" ".join(chosen), f"kind {label}"])
    tiny_speaker("llama").network.save_pretrained(folder / "speaker")
    tokenizer.save_pretrained(folder / "speaker")
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(60):
            question, answer = (draw.choices(WORDS, k=draw.randint(2, 6)) for _ in range(2))
            row = {"question": " ".join(question), "answer": " ".join(answer)}
            file.write(json.dumps(row) + "\n")


def results(run: Path) -> dict[str, Any]:
    """All that must not depend on whether a run was interrupted."""
    found: dict[str, Any] = {name: (run / name).read_bytes() for name in RESULTS}
    for name in LEDGERS:
        lines = (run / name).read_text().splitlines() if (run / name).exists() else []
        found[name] = [untimed(json.loads(line)) for line in lines]
    if (run / "samples.json").exists():
        found["samples"] = json.loads((run / "samples.json").read_text())
    summary = untimed(json.loads((run / "summary.json").read_text()))
    summary.pop("prefix_cache", None)
    return {**found, "summary": summary}


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.endswith("wall_s")}


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder with its time of change and its content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def forked(work: Callable[[], object], told: Path | None = None) -> int:
    """The pid of a copy of this process that does some work and ends without any clean-up.

    Args:
        told: where stdout and stderr go, as ``told.out`` and ``told.err``; nowhere without it.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 70
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    try:
        for number, ending in ((1, ".out"), (2, ".err")):
            path = os.devnull if told is None else told.with_suffix(ending)
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        work()
        code = 0
    except SystemExit as end:
        code = end.code
    except (InputError, RunError) as error:
        print(error, file=sys.stderr)
        code = 2 if isinstance(error, InputError) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # also where a disk that is full in here takes no word of it
            os._exit(code)


def command(*words: str) -> Callable[[], None]:
    """The command line as work for a fork, which needs no imports of its own."""

    def work() -> None:
        sys.argv = ["polyrank", *words]
        main()

    return work


def ended(pid: int) -> int:
    """The exit code of a fork; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
