"""What is exported loads in PEFT and in plain transformers with our logits."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from polyrank.adapter import full_mask, restrict
from polyrank.card import write_card
from polyrank.config import make_config
from polyrank.errors import InputError
from polyrank.experiment import run
from polyrank.export import export_adapter, export_run
from polyrank.lowrank import installed
from polyrank.models.load import prepare, read_head, write_head
from polyrank.models.targets import resolve_targets
from polyrank.report import dotted
from polyrank.state import ServerState
from tests.builders import random_adapter
from tests.conftest import CPU, SPEAKERS, tiny_model, tiny_network, tiny_speaker
from tests.small_runs import small_config

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [9, 10, 11, 12, 13, 14]])


TIERS = "allocation.tiers=[{rank=1,share=0.5},{rank=3,share=0.5}]"


def mixed_ranks(adapter):
    """An active set with 4, 1, 3, 2, 4, ... slots, and one module without any."""
    mask = {}
    for index, (name, factors) in enumerate(adapter.modules.items()):
        held = 0 if index == 1 else [4, 1, 3, 2][index % 4]
        mask[name] = torch.arange(factors.rank) < held
    return mask


@pytest.mark.parametrize("form", ["lora", "svd"])
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.filterwarnings("ignore")
def test_peft_computes_our_logits(family, form, targets, tmp_path):
    tiny_network(family).save_pretrained(tmp_path / "base")
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    model = prepare(network, None, str(tmp_path / "base"), set(), CPU)
    adapter = random_adapter(3, 4, form, resolve_targets(network, model.blocks, targets))
    head = {name: t + 0.1 for name, t in read_head(model).items()}
    state = ServerState(1, 0, adapter, full_mask(adapter), head)
    state = dataclasses.replace(state, active=mixed_ranks(adapter))
    write_head(model, head)
    with torch.no_grad(), installed(network, [restrict(adapter, state.active)]):
        expected = network(input_ids=IDS).logits
    export_adapter(model, state, tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        got = loaded(input_ids=IDS).logits
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")(input_ids=IDS).logits
    assert float((got - expected).abs().max()) < 1e-5
    assert float((plain - expected).abs().max()) > 1e-2
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == len(restrict(adapter, state.active).modules)


@pytest.mark.parametrize("form", ["lora", "svd"])
@pytest.mark.parametrize("speaker", SPEAKERS)
@pytest.mark.filterwarnings("ignore")
def test_peft_speaks_as_we_do_and_padding_changes_nothing(speaker, form, tmp_path):
    """The pattern export, and the one of a single rank that serving engines read."""
    tiny_speaker(speaker).network.save_pretrained(tmp_path / "base")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = prepare(network, None, str(tmp_path / "base"), set(), CPU, "causal_lm")
    adapter = random_adapter(3, 4, form, resolve_targets(network, model.blocks, "all-linear"))
    state = ServerState(1, 0, adapter, full_mask(adapter), {})
    state = dataclasses.replace(state, active=mixed_ranks(adapter))
    with torch.no_grad():
        plain = network(input_ids=IDS).logits
        with installed(network, [restrict(adapter, state.active)]):
            expected = network(input_ids=IDS).logits
    assert float((plain - expected).abs().max()) > 1e-2
    found, ranks = {}, {}
    for name, uniform in (("pattern", False), ("padded", True)):
        export_adapter(model, state, tmp_path / name, uniform=uniform)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(base, str(tmp_path / name)).eval()
        with torch.no_grad():
            found[name] = loaded(input_ids=IDS).logits
        ranks[name] = json.loads((tmp_path / name / "adapter_config.json").read_text())
    assert float((found["pattern"] - expected).abs().max()) < 1e-5
    assert float((found["padded"] - found["pattern"]).abs().max()) < 5e-6
    assert len(ranks["pattern"]["rank_pattern"]) > 1
    assert (ranks["padded"]["r"], ranks["padded"]["lora_alpha"]) == (4, 8.0)
    assert (ranks["padded"]["rank_pattern"], ranks["padded"]["alpha_pattern"]) == ({}, {})
    assert (ranks["padded"]["task_type"], ranks["padded"]["modules_to_save"]) == ("CAUSAL_LM", None)


@pytest.mark.filterwarnings("ignore")
def test_a_merged_language_model_is_plain_transformers(tmp_path):
    config = small_config(tmp_path, "causal", "method=flora", "rounds=2", "training.learning_rate=0.3", TIERS)
    folder = run(config, tmp_path / "run").path
    export_run(folder, tmp_path / "merged", merged=True)
    export_run(folder, tmp_path / "padded", merged=False, uniform=True)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "speaker")
        before = base(input_ids=IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        adapted = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
        assert float((adapted(input_ids=IDS).logits - before).abs().max()) > 1e-3
        assert torch.allclose(merged(input_ids=IDS).logits, adapted(input_ids=IDS).logits, atol=1e-5)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["use_cache"] is True
    card = (folder / "adapter" / "README.md").read_text()
    assert "**Method**: FLoRA" in card
    assert "36 train texts on 6 clients (6 each, iid), 12 test texts" in card
    assert "perplexity" in card
    assert "AutoModelForCausalLM" in card
    assert "library_name: transformers" in (tmp_path / "merged" / "README.md").read_text()
    with pytest.raises(InputError, match="--uniform-rank"):
        export_run(folder, tmp_path / "both", merged=True, uniform=True)


RESULT = {"rounds": 9, "test_loss": 0.5, "test_accuracy": 0.5, "test_macro_f1": 0.5}


@pytest.mark.parametrize("private", [True, False])
def test_the_card_of_a_private_run_tells_no_count_of_anybodys_texts(private, tmp_path):
    table = {"privacy": {"epsilon": 8.0}, "aggregation": {"kind": "fedavg", "weights": "uniform"}}
    clients = [{"num_train": count} for count in (1037, 4041, 2029)]
    facts = ({**RESULT, "epsilon": 3.25, "delta": 1e-5}, {"labels": "ab", "clients": clients, "num_test": 3})
    write_card(tmp_path, tiny_model(), make_config(table if private else {}), facts)
    card = (tmp_path / "README.md").read_text()
    for told in ("7107", "1037", "4041"):
        assert (told in card) != private
    assert "3 clients" in card
    assert ("**Differential privacy**: epsilon 3.25 at delta 1e-05 for each client." in card) == private


def test_a_card_holds_no_path_of_the_machine(tmp_path):
    home = "/home/ann"
    config = make_config(
        {
            "engine": {"kind": "flare", "kit": f"{home}/kit"},
            "data": {"source": f"{home}/train.csv", "test": f"{home}/test.csv", "labels": ["a", "b"]},
            "model": {"name": f"{home}/models/bert-tiny"},
            "partition": {"kind": "natural", "column": "site"},
            "fleet": {"name": f"{home}/fleet.toml"},
            "rounds": 9,
        }
    )
    paths = [value for value in dotted(config.model_dump(mode="json")).values() if value.startswith("/")]
    assert len(paths) == 5
    model = dataclasses.replace(tiny_model(), source=config.model.name)
    facts = (RESULT, {"labels": ["a", "b"], "clients": [{"num_train": 7}], "num_test": 3})
    write_card(tmp_path, model, config, facts)
    card = (tmp_path / "README.md").read_text()
    assert [path for path in paths if path in card] == []
    assert home not in card
    assert "- `rounds = 9`" in card
    assert "base_model: bert-tiny" in card
