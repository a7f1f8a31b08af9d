"""A language model of a billion parameters on one GPU: speed beside plain PEFT, memory beside its plan.

    python -m benchmarks.gpu                  # Llama of 1.24 billion parameters, bf16, 8 and 4 bits, on CUDA
    python -m benchmarks.gpu --size tiny --device cpu --steps 2   # the same code in a few seconds anywhere

The model is built from its config, with random weights, so nothing is downloaded. Both sides train an adapter
of the maps to queries, keys and values on the same batch of texts of one length, with AdamW; every token but
the first is learned. Peak memory is what torch allocated at most during the session, and stands beside the
total of `polyrank plan --memory` for the same settings. On a CPU, 8 bits are torchao's, and 4 are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

from polyrank.adapter import full_mask, new_adapter
from polyrank.config import load_config
from polyrank.data.tokens import Tokens
from polyrank.ledger import versions
from polyrank.memory import plan_memory
from polyrank.messages import Training, TrainTask
from polyrank.models.load import BaseModel, prepare
from polyrank.models.speaker import quantized, round_to_int8
from polyrank.models.targets import resolve_targets
from polyrank.session import ClientEnv, train

SIZES: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True, slots=True)
class Work:
    """What both sides train.

    Args:
        length: tokens of each text.
    """

    batch: int
    length: int
    rank: int
    steps: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length * self.steps

    def ids(self, vocabulary: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """One batch of random texts, [B, T]."""
        draw = np.random.default_rng(0)
        return draw.integers(3, vocabulary, (self.batch, self.length)).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Session:
    """What a session took: tokens a second, and the most bytes that torch held, on CUDA alone."""

    tokens_per_s: float
    peak_bytes: int | None


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    given = parser.parse_args()
    device, work = torch.device(given.device), Work(given.batch, given.length, given.rank, given.steps)
    with tempfile.TemporaryDirectory(prefix="polyrank-gpu-") as folder:
        found = results(SIZES[given.size], work, device, Path(folder))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for row in found["rows"]:
        print(json.dumps(row))


def results(sizes: dict[str, Any], work: Work, device: torch.device, folder: Path) -> dict[str, Any]:
    """The rows of all ways to store the base that the device has.

    Args:
        folder: where the model is kept meanwhile.
    """
    config = transformers.LlamaConfig(**sizes, pad_token_id=0)
    with torch.device(device):
        network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.save_pretrained(folder)
    del network
    ways = [None, "8bit", "4bit"] if device.type == "cuda" else [None, "8bit"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows = [row_of(folder, work, device, bits) for bits in ways]
    return {"device": name, "versions": versions(), "sizes": sizes, "work": asdict(work), "rows": rows}


def row_of(folder: Path, work: Work, device: torch.device, bits: Any) -> dict[str, Any]:
    """One way to store the base: both sides, and the plan."""
    ours = polyrank_session(load(folder, device, bits), work)
    rounded = bits is not None and device.type == "cpu"  # PEFT does not train on int8 weights there
    theirs = None if rounded else peft_session(load(folder, device, bits).network, work, device)
    settings = [
        "task=causal_lm",
        f"model.name={folder}",
        "model.base_dtype=bf16",
        f"model.max_length={work.length}",
        f"training.batch_size={work.batch}",
        f"adapter.rank={work.rank}",
        "adapter.targets=attention",
        *([f"model.quantize={bits}"] if bits else []),
    ]
    plan = plan_memory(load_config(settings=settings))
    return {
        "base": bits or "bf16",
        "parameters": plan["parameters"],
        "polyrank": asdict(ours),
        "peft": None if theirs is None else asdict(theirs),
        "speed_ratio": None if theirs is None else ours.tokens_per_s / theirs.tokens_per_s,
        "plan": {"total_bytes": plan["total_bytes"], **plan["parts"]},
        "peak_over_plan": None if ours.peak_bytes is None else ours.peak_bytes / plan["total_bytes"],
    }


def load(folder: Path, device: torch.device, bits: Any) -> BaseModel:
    """The model as a run loads it, without a tokenizer."""
    how = {} if bits is None else quantized(bits, torch.bfloat16, device)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **how)
    model = prepare(network, None, "benchmark", set(), device, "causal_lm")
    if bits is not None and device.type == "cpu":
        round_to_int8([network.get_submodule(block) for block in model.blocks])
    return model


def polyrank_session(model: BaseModel, work: Work) -> Session:
    """A client's session, after one of a step that sets everything up."""
    shapes = resolve_targets(model.network, model.blocks, "attention")
    bank = new_adapter(shapes, form="lora", rank=work.rank, scale=2.0, seed=0)
    ids, ones = work.ids(model.network.config.vocab_size).ravel(), np.ones(work.batch, dtype=np.int64)
    data = Tokens(ids, None, np.arange(work.batch + 1) * work.length, 0 * ones, 0, ones)
    mask, env = full_mask(bank), ClientEnv(model, data)

    def session(steps: int) -> None:
        training = Training(local_steps=steps, batch_size=work.batch)
        train(TrainTask(0, "c", 0, mask, mask, bank, {}, training), env)

    session(1)
    return timed(lambda: session(work.steps), work, model.device)


def peft_session(network: Any, work: Work, device: torch.device) -> Session:
    """The loop that its documentation shows: forward with labels, backward, step."""
    lora = LoraConfig(
        r=work.rank, lora_alpha=2 * work.rank, target_modules=["q_proj", "k_proj", "v_proj"], bias="none"
    )
    adapted = get_peft_model(network, lora)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.from_numpy(work.ids(network.config.vocab_size)).long().to(device)

    def session(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()

    session(1)
    return timed(lambda: session(work.steps), work, device)


def timed(session: Any, work: Work, device: torch.device) -> Session:
    """Run a session and see how long it takes and what it holds."""
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    session()
    if cuda:
        torch.cuda.synchronize(device)
    taken = time.perf_counter() - start
    return Session(work.tokens / taken, torch.cuda.max_memory_allocated(device) if cuda else None)


if __name__ == "__main__":
    main()
