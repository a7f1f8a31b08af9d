"""Shared by all tests: one torch thread, tiny models of every family, a small real CSV."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("FORCE_COLOR", None)  # what commands print is compared

import pytest
import torch
import transformers
from hypothesis import settings

from polyrank.data.docstrings import load_docstrings
from polyrank.data.texts import Corpus
from polyrank.models.load import BaseModel, load_base, packaged_model, prepare

torch.set_num_threads(1)
settings.register_profile("polyrank", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("polyrank")

CPU = torch.device("cpu")
_SMALL = {"vocab_size": 90, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {
    **_SMALL,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
_QWEN2 = {
    **_BERT,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 1,  # a window in the second block alone
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _BERT),
    "distilbert": (
        "DistilBert",
        {**_SMALL, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 40},
    ),
    "roberta": ("Roberta", _BERT),
    "deberta": ("Deberta", {**_BERT, "relative_attention": True, "pos_att_type": "c2p|p2c"}),
    "deberta-v2": ("DebertaV2", {**_BERT, "relative_attention": True, "pos_att_type": "c2p|p2c"}),
    "albert": ("Albert", {**_BERT, "embedding_size": 8}),
    "gpt2": ("GPT2", {**_SMALL, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}),
    "llama": ("Llama", {**_BERT, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {**_BERT, "num_key_value_heads": 1, "sliding_window": 4}),
    "qwen2": ("Qwen2", _QWEN2),
}

_SPEAKER = {k: v for k, v in _BERT.items() if k != "num_labels"}
SPEAKERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", FAMILIES["gpt2"][1]),
    "gpt-neox": ("GPTNeoX", {**_SPEAKER, "rotary_pct": 0.5}),
    "llama": ("Llama", {**_SPEAKER, "num_key_value_heads": 1}),
    "llama-tied": ("Llama", {**_SPEAKER, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("Mistral", FAMILIES["mistral"][1]),
    "qwen2": ("Qwen2", _QWEN2),
    "gemma": ("Gemma", {**_SPEAKER, "num_key_value_heads": 1, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_SPEAKER, "num_key_value_heads": 1, "head_dim": 8}),
    "phi": ("Phi", {**_SPEAKER, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", _SPEAKER),
}


def tiny_network(family: str, **changes: Any) -> Any:
    """A random classifier of a family with two blocks, always the same numbers."""
    name, options = FAMILIES[family]
    options = {**options, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = getattr(transformers, f"{name}Config")(**options)
        return getattr(transformers, f"{name}ForSequenceClassification")(config).eval()


def tiny_model(family: str = "bert", **changes: Any) -> BaseModel:
    network = tiny_network(family, **changes)
    return prepare(network, None, f"tiny-{family}", set(), CPU)


def tiny_speaker(family: str = "llama", **changes: Any) -> BaseModel:
    """A random causal language model of a family with two blocks, always the same numbers."""
    name, options = SPEAKERS[family]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = getattr(transformers, f"{name}Config")(**{**options, **changes})
        network = transformers.AutoModelForCausalLM.from_config(config).eval()
    return prepare(network, None, f"tiny-{family}", set(), CPU, "causal_lm")


def stored_speaker(family: str, path: Path) -> str:
    """A folder with a tiny language model in bf16 and a tokenizer; returns its name."""
    tiny_speaker(family, initializer_range=0.2).network.to(torch.bfloat16).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(packaged_model()).save_pretrained(path)
    return str(path)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def docstrings() -> Corpus:
    return load_docstrings()


@pytest.fixture(scope="session")
def minilm() -> BaseModel:
    return load_base("minilm", ["no", "yes"], 0, CPU)


@pytest.fixture(scope="session")
def small_csv(docstrings: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 real texts of three packages, as a newcomer's own CSV would look."""
    path = tmp_path_factory.mktemp("csv") / "texts.csv"
    texts = docstrings.train
    rows = [(t, docstrings.label_names[y]) for t, y in zip(texts.texts, texts.labels, strict=True) if y < 3]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows[:240])
    return path


@pytest.fixture(scope="session")
def tiny_settings(small_csv: Path) -> list[str]:
    """Settings of a run that takes a few seconds with the real MiniLM."""
    return [
        f"data.source={small_csv}",
        "rounds=2",
        "partition.clients=4",
        "partition.kind=iid",
        "sampling.count=2",
        "training.local_steps=2",
        "training.batch_size=4",
        "model.max_length=24",
        "adapter.rank=4",
    ]
