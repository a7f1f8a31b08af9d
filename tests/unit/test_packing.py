"""Packed batches against padded ones: logits, gradients, training, and who takes the plain path."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from polyrank.evaluation import predict
from polyrank.models.packing import layout_of
from polyrank.session import ClientEnv, train
from tests.builders import largest_difference
from tests.conftest import FAMILIES, tiny_model
from tests.unit.test_client import task_for, tokens

PACK = {"bert", "distilbert", "roberta", "albert"}
packing_families = pytest.mark.parametrize("family", sorted(PACK))


def test_a_layout_packs_and_pads():
    layout = layout_of(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    x = torch.arange(6.0).view(2, 3, 1)
    assert layout.pack(x).flatten().tolist() == [0, 1, 3]
    assert layout.pad(layout.pack(x)).flatten().tolist() == [0, 1, 0, 3, 0, 0]
    assert layout.first.tolist() == [0, 2]


def test_who_packs_and_who_takes_the_plain_path():
    assert {family for family in FAMILIES if tiny_model(family).packs} == PACK


@packing_families
def test_logits_are_those_of_the_padded_batch(family):
    model, data = tiny_model(family), tokens(13)
    plain = dataclasses.replace(model, packs=False)
    assert float((predict(model, data, 5) - predict(plain, data, 5)).abs().max()) < 1e-5
    assert model.network.config._attn_implementation == "sdpa"


@packing_families
@pytest.mark.parametrize("form", ["lora", "svd"])
def test_training_ends_in_the_same_adapter(family, form):
    """Plain SGD, so that a gradient of rounding size cannot be blown up."""
    model, data = tiny_model(family), tokens(16)
    plain = dataclasses.replace(model, packs=False)
    task = task_for(model, form, optimizer="sgd", local_steps=6)
    packed, padded = (train(task, ClientEnv(m, data)) for m in (model, plain))
    moved = largest_difference(padded.adapter, task.adapter)
    assert largest_difference(packed.adapter, padded.adapter) < 1e-4 * moved


@pytest.mark.parametrize("family", sorted(PACK - {"albert"}))
def test_the_last_block_runs_for_first_tokens_alone(family):
    """But for its keys and values; ALBERT's one block cannot know when it runs for the last time."""
    model = tiny_model(family)
    last = model.network.get_submodule(model.blocks[-1])
    rows = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: rows.__setitem__(name, out.shape[1]))
        for name, module in last.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    predict(model, tokens(6), 6)
    for hook in hooks:
        hook.remove()
    total = int(tokens(6).starts[-1])
    wide = {name for name, count in rows.items() if count == total}
    assert {name.rpartition(".")[2] for name in wide} in ({"key", "value"}, {"k_lin", "v_lin"})
    assert {count for name, count in rows.items() if name not in wide} == {6}


@packing_families
def test_padding_does_not_reach_the_blocks(family):
    model = tiny_model(family)
    inputs, _ = tokens(6).batch(list(range(6)), model.device)
    rows = []
    hook = model.network.get_submodule(model.blocks[0]).register_forward_hook(
        lambda module, args, output: rows.append(args[0].shape[1])
    )
    predict(model, tokens(6), 6)
    hook.remove()
    assert set(rows) == {int(inputs["attention_mask"].sum())}
