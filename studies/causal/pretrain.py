"""A small Llama with a tokenizer of its own, pretrained for some CPU minutes on the text at hand.

    python -m studies.causal.pretrain --data DATA --out MODEL --minutes 5

News (ag_news), questions to a bank (banking77) and docstrings; nothing of what it is fine-tuned on later.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from polyrank.data.docstrings import load_docstrings

VOCABULARY, LENGTH, BATCH, RATE, WARM_STEPS = 4096, 128, 16, 1e-3, 100
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def texts(data: Path) -> list[str]:
    found = [str(text) for text in load_docstrings().train.texts]
    for name in ("ag_news", "banking77"):
        found += pq.read_table(data / name / "train.parquet", columns=["text"])["text"].to_pylist()
    return found


def tokenizer_of(corpus: list[str]) -> PreTrainedTokenizerFast:
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(corpus, VOCABULARY, special_tokens=["<pad>", "<end>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer, pad_token="<pad>", eos_token="<end>", model_max_length=512
    )


def batches(rows: Tensor, seed: int) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(rows), generator=draw).split(BATCH):
            yield rows[chosen]


def pretrain(network: LlamaForCausalLM, rows: Tensor, minutes: float) -> tuple[int, float]:
    """Steps that fit into the CPU time, and the mean loss of the last hundred; the rate falls with it."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.1)
    started, losses = time.process_time(), list[float]()
    for batch in batches(rows, 0):
        spent = (time.process_time() - started) / (60 * minutes)
        if spent >= 1:
            break
        rate = RATE * min(1.0, (len(losses) + 1) / WARM_STEPS) * (1 - 0.9 * spent)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = network(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return len(losses), sum(losses[-100:]) / len(losses[-100:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    corpus = texts(given.data)
    tokenizer = tokenizer_of(corpus)
    ids = [i for row in tokenizer(corpus)["input_ids"] for i in (*row, tokenizer.eos_token_id)]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    ends = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE, **ends))
    print(f"{network.num_parameters() / 1e6:.1f} million parameters, {len(ids) / 1e6:.1f} million tokens")
    steps, loss = pretrain(network, rows, given.minutes)
    print(f"{steps} steps of {BATCH * LENGTH} tokens, loss {loss:.3f}")
    network.eval().save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
