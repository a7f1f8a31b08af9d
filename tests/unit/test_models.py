"""Targets, blocks and heads of every model family; loading that repeats bit for bit."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from polyrank.assemble import _adapted
from polyrank.config import load_config
from polyrank.errors import InputError
from polyrank.models.frozen import PackedMap, pack_blocks
from polyrank.models.load import (
    head_parameters,
    load_base,
    packaged_model,
    pick_device,
    read_head,
    write_head,
)
from polyrank.models.speaker import load_speaker
from polyrank.models.targets import resolve_targets
from tests.conftest import CPU, tiny_model, tiny_network
from tests.small_runs import small_config

ATTENTION = {
    "bert": ["query", "key", "value"],
    "distilbert": ["q_lin", "k_lin", "v_lin"],
    "roberta": ["query", "key", "value"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj"],
    "albert": ["query", "key", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "k_proj", "v_proj"],
    "mistral": ["q_proj", "k_proj", "v_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj"],
}
HEADS = {
    "bert": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "roberta": ["classifier"],
    "deberta": ["pooler", "classifier"],
    "deberta-v2": ["pooler", "classifier"],
    "albert": ["classifier"],
    "gpt2": ["score"],
    "llama": ["score"],
    "mistral": ["score"],
    "qwen2": ["score"],
}
LINEAR_MAPS_PER_BLOCK = {
    "bert": 6,
    "distilbert": 6,
    "roberta": 6,
    "deberta": 6,  # one fused map, two of the relative positions
    "deberta-v2": 8,  # two of the relative positions
    "albert": 6,
    "gpt2": 4,
    "llama": 7,
    "mistral": 7,
    "qwen2": 7,
}


def test_attention_targets_stand_in_forward_order(family):
    model = tiny_model(family)
    found = list(resolve_targets(model.network, model.blocks, "attention"))
    blocks = 1 if family == "albert" else 2  # ALBERT shares one block over its depth
    assert len(model.blocks) == blocks
    assert [name.rpartition(".")[2] for name in found] == ATTENTION[family] * blocks
    assert [name for block in model.blocks for name in found if name.startswith(f"{block}.")] == found


def test_all_linear_takes_every_map_of_the_blocks_and_none_of_the_head(family):
    model = tiny_model(family)
    found = resolve_targets(model.network, model.blocks, "all-linear")
    assert len(found) == LINEAR_MAPS_PER_BLOCK[family] * len(model.blocks)
    assert not any(name.startswith(tuple(model.head_modules)) for name in found)


def test_shapes_are_output_by_input(family):
    model = tiny_model(family)
    x = torch.randn(1, 16)
    for name, (out, in_) in resolve_targets(model.network, model.blocks, "attention").items():
        assert in_ == 16
        assert model.network.get_submodule(name)(x).shape[-1] == out


def test_heads(family):
    model = tiny_model(family)
    assert list(model.head_modules) == HEADS[family]
    assert all(not p.requires_grad for p in model.network.parameters())
    head = read_head(model)
    write_head(model, {name: torch.zeros_like(t) for name, t in head.items()})
    assert all(float(p.abs().max()) == 0 for p in head_parameters(model).values())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_keys_and_values_are_kept_for_texts_that_do_not_grow(family):
    ids = torch.tensor([[3, 4, 5]])
    assert tiny_network(family)(input_ids=ids).past_key_values is not None
    assert tiny_model(family).network(input_ids=ids).past_key_values is None


def test_explicit_targets():
    model = tiny_model("bert")
    names = list(resolve_targets(model.network, model.blocks, ["output.dense"]))
    assert names == [
        f"bert.encoder.layer.{i}.{part}"
        for i in (0, 1)
        for part in ("attention.output.dense", "output.dense")
    ]
    one = "bert.encoder.layer.1.attention.self.query"
    assert list(resolve_targets(model.network, model.blocks, [one])) == [one]


@pytest.mark.parametrize("targets", [["quary"], ["query", "classifier"]])
def test_a_target_that_matches_nothing_is_named(targets):
    model = tiny_model("bert")
    with pytest.raises(
        InputError, match=r"adapter.targets = '(quary|classifier)': matches no linear map .*query"
    ):
        resolve_targets(model.network, model.blocks, targets)


def test_a_layer_that_the_checkpoint_lacks_is_trained_with_the_head(tmp_path):
    network = tiny_network("bert")
    network.save_pretrained(tmp_path)
    kept = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "pooler" not in k}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(packaged_model()).save_pretrained(tmp_path)
    first, again = (load_base(str(tmp_path), ["a", "b", "c"], 4, CPU) for _ in range(2))
    assert list(first.head_modules) == ["bert.pooler.dense", "classifier"]
    assert all(torch.equal(t, read_head(again)[name]) for name, t in read_head(first).items())
    other = load_base(str(tmp_path), ["a", "b", "c"], 5, CPU)
    assert not torch.equal(
        read_head(first)["bert.pooler.dense.weight"], read_head(other)["bert.pooler.dense.weight"]
    )


def test_a_map_that_the_checkpoint_lacks_gets_no_adapter_and_stays_off_the_packed_path(tmp_path, monkeypatch):
    network = tiny_network("bert")
    network.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in held.items() if "layer.1.attention.self.query" not in k}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(packaged_model()).save_pretrained(tmp_path)
    monkeypatch.setattr("polyrank.models.load.packed_dtype", lambda _: "fp32")
    model = load_base(str(tmp_path), ["a", "b", "c"], 4, CPU)
    lacking = "bert.encoder.layer.1.attention.self.query"
    assert list(model.head_modules) == [lacking, "classifier"]
    assert set(_adapted(load_config(), model)) == {
        f"bert.encoder.layer.{n}.attention.self.{m}" for n in (0, 1) for m in ("query", "key", "value")
    } - {lacking}
    with pytest.raises(InputError, match="adapter.targets = .*: needs a map whose weights"):
        _adapted(load_config(None, [f"adapter.targets=['{lacking}']"]), model)
    assert not isinstance(model.network.get_submodule(lacking).forward, PackedMap)
    assert isinstance(model.network.get_submodule(lacking.replace("query", "key")).forward, PackedMap)
    whole = dataclasses.replace(model, head_modules=["bert.encoder.layer.1.attention", "classifier"])
    assert all("layer.0." in name for name in _adapted(load_config(), whole))
    plain = tiny_network("bert")
    pack_blocks(plain, model.blocks, whole.head_modules, "fp32")
    assert not isinstance(plain.get_submodule(lacking).forward, PackedMap)


def test_the_packaged_model_loads_the_same_every_time(minilm):
    again = load_base("minilm", ["no", "yes"], 0, CPU)
    assert len(minilm.blocks) == 6
    assert list(minilm.head_modules) == ["classifier"]
    assert all(torch.equal(t, read_head(again)[name]) for name, t in read_head(minilm).items())


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(InputError, match=r"model.name = '.*: no such folder; .*hub id"):
        load_base(str(tmp_path / "nowhere"), ["a"], 0, CPU)


def test_a_home_folder_may_be_written_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    AutoTokenizer.from_pretrained(packaged_model()).save_pretrained(tmp_path / "m")
    tiny_network("bert", vocab_size=31000).save_pretrained(tmp_path / "m")
    assert load_base("~/m", ["a", "b"], 0, CPU).source == str(tmp_path / "m")


@pytest.mark.parametrize("task", ["classifier", "causal language model"])
def test_pickled_weights_are_not_loaded(task, tmp_path):
    """One clear line; the same folder with safetensors loads."""
    small_config(tmp_path)
    folder = tmp_path / ("model" if task == "classifier" else "speaker")
    load = (
        (lambda: load_base(str(folder), ["a", "b"], 0, CPU))
        if task == "classifier"
        else (lambda: load_speaker(str(folder), CPU))
    )
    assert load().digest
    weights = load_file(folder / "model.safetensors")
    importlib.import_module("torch").save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        InputError, match=f"model.name = .*that loads as a {task} .*model.safetensors"
    ) as line:
        load()
    assert "\n" not in str(line.value)


def test_a_device_that_is_not_there_is_named():
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device = 'cuda': not on this machine; here: auto"):
            pick_device("cuda")
