"""What is exported loads in PEFT and in plain transformers with our logits."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from polyrank.adapter import full_mask, restrict
from polyrank.export import export_adapter
from polyrank.lowrank import installed
from polyrank.models.load import prepare, read_head, write_head
from polyrank.models.targets import resolve_targets
from polyrank.state import ServerState
from tests.builders import random_adapter
from tests.conftest import CPU, tiny_network

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [9, 10, 11, 12, 13, 14]])


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
