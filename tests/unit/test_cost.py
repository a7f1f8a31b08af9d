"""The cost model counts what the client does: FLOP as torch does, activations as autograd keeps them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from polyrank.adapter import new_adapter, top_blocks
from polyrank.cost import (
    EMBEDDING_PASSES,
    Demand,
    Workload,
    backward,
    cost,
    forward,
    kept_bytes,
    memory_bytes,
    memory_parts,
)
from polyrank.device import Setup
from polyrank.lowrank import installed
from polyrank.models.load import head_parameters, logits_of
from polyrank.models.recompute import recomputed
from polyrank.models.shape import Map, ModelShape, shape_of, stored_bytes
from polyrank.models.speaker import round_to_int8
from polyrank.models.targets import resolve_targets
from tests.conftest import SPEAKERS, tiny_model, tiny_speaker

WIDE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
OWN = {
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_inner": 256},
    "mistral": {"sliding_window": 64},
}
BATCH, LENGTH = 4, 16
PI = Setup("pi", "on", 1e6, 1e6, 1e-3, 10**6, 5.0, 8e3, 4e3, 0.5, 1.0)


def one_map(**changes):
    """One block of one map [2, 3] that reads what enters the block, no attention cost, no head."""
    maps = [Map("b.0.q", 2, 3, 0, True, False)]
    shape = ModelShape(maps, 0, 1, 6, 0, 0, 1, False, False)
    return Workload(
        shape, {"b.0.q": 1}, steps=2, texts=4, tokens=10.0, bytes_down=1000, bytes_up=500, **changes
    )


def test_a_hand_worked_session():
    work = one_map()
    ahead, back = forward(work), backward(work)
    assert ahead.flop == 2 * 6 * 10 + 2 * 1 * 5 * 10  # the frozen map, and its adapter of rank 1
    assert back.flop == 2 * 1 * (2 + 5) * 10  # the adapter alone: nobody needs the gradient of what enters
    assert kept_bytes(work) == 4 * 5 * (2 + 1 + 3)  # 5 tokens a step: output, held row and input
    spent = cost(work, PI)
    assert (spent.down_s, spent.up_s) == (0.5 + 8 * 1000 / 8e3, 0.5 + 8 * 500 / 4e3)
    assert spent.energy_j == pytest.approx(5.0 * spent.compute_s + 1.0 * (spent.down_s + spent.up_s))
    assert spent.total_s == pytest.approx(spent.down_s + spent.compute_s + spent.up_s)
    assert memory_bytes(work) == 4 * 6 + 4 * 5 * 4 + 120 + 2 * 4 * 5 * 5
    assert Demand(2e6, 3e6, 4.0).seconds(PI) == pytest.approx(2 + 3 + 0.004)


def tiny_workload(depth, targets="attention", rank=3, pools=True, skipped=0, frozen=()):
    model = tiny_model(**WIDE)
    if not pools:
        model = replace(model, pools=None)
    shapes = resolve_targets(model.network, model.blocks, targets)
    bank = new_adapter(shapes, form="lora", rank=rank, scale=1.0, seed=0)
    held = top_blocks({name: torch.ones(rank, dtype=torch.bool) for name in shapes}, depth)
    modules = {name: f for name, f in bank.modules.items() if held[name].any()}
    work = Workload(shape_of(model), dict.fromkeys(modules, rank), 1, BATCH, BATCH * LENGTH, skipped=skipped)
    return model, replace(bank, modules=modules), work


def step(model):
    ids = torch.randint(3, 80, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return F.cross_entropy(logits_of(model, inputs), torch.zeros(BATCH, dtype=torch.long))


@pytest.mark.parametrize("targets", ["attention", "all-linear", ("output.dense",)])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize(
    ("pools", "factors"), [(True, "both"), (False, "both"), (True, "B"), (True, "A"), (False, "A")]
)
def test_flop_are_those_that_torch_counts(targets, depth, pools, factors):
    model, adapter, work = tiny_workload(depth, targets, pools=pools)
    work = replace(work, factors=factors)
    for parameter in head_parameters(model).values():
        parameter.requires_grad_(True)
    with installed(model.network, [adapter]) as layers, sdpa_kernel(SDPBackend.MATH):
        for layer in layers.values():
            layer.A.requires_grad_(factors != "B")
            layer.B.requires_grad_(factors != "A")
        with FlopCounterMode(display=False) as ahead:
            loss = step(model)
        with FlopCounterMode(display=False) as back:
            loss.backward()
    pooler = (
        2 * BATCH * WIDE["hidden_size"] ** 2
    )  # a frozen map outside the blocks, which the model leaves out
    assert forward(work).flop + pooler == pytest.approx(ahead.get_total_flops(), rel=0.01)
    assert backward(work).flop + pooler == pytest.approx(back.get_total_flops(), rel=0.01)


def kept_by(model, layers, forward):
    """Bytes that autograd keeps of a loss for its backward part, besides parameters."""
    parameters = [*model.network.parameters(), *(p for layer in layers.values() for p in layer.parameters())]
    own = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("pools", [True, False])
def test_activations_are_those_that_autograd_keeps(targets, depth, pools):
    model, adapter, work = tiny_workload(depth, targets, pools=pools)
    with installed(model.network, [adapter]) as layers:
        kept = kept_by(model, layers, lambda: step(model))
    assert kept_bytes(work) == pytest.approx(kept, rel=0.2)


def test_a_stored_prefix_leaves_out_its_blocks_and_is_paid_for_once():
    _, _, whole = tiny_workload(1, pools=False)
    _, _, stored = tiny_workload(1, pools=False, skipped=3)
    assert backward(stored) == backward(whole)
    blocks = (forward(whole).flop - 4 * 195 * BATCH) / (forward(stored).flop - 4 * 195 * BATCH)
    assert blocks == pytest.approx(4, rel=0.1)
    first = cost(replace(stored, stored_tokens=10 * stored.tokens), PI)
    assert first.store_s > 3 * first.forward_s
    assert cost(stored, PI).store_s == 0
    with pytest.raises(ValueError, match="holds an adapter"):
        forward(replace(stored, ranks=tiny_workload(4)[2].ranks))


def test_frozen_slots_cost_time_but_no_optimiser():
    _, _, work = tiny_workload(2)
    trained = dict.fromkeys(work.ranks, 2)
    half = replace(work, ranks=trained, frozen=dict.fromkeys(trained, 1))
    assert forward(half).flop == forward(work).flop
    assert backward(replace(work, ranks=trained)).flop < backward(half).flop < backward(work).flop
    assert memory_bytes(half) < memory_bytes(work)


def spoken_workload(speaker, targets, depth, **changes):
    """A wide language model that is asked for ten tokens of each of four texts."""
    model = tiny_speaker(speaker, **{**WIDE, "num_key_value_heads": 2, "vocab_size": 500, **changes})
    shapes = resolve_targets(model.network, model.blocks, targets)
    bank = new_adapter(shapes, form="lora", rank=3, scale=1.0, seed=0)
    held = top_blocks({name: torch.ones(3, dtype=torch.bool) for name in shapes}, depth)
    modules = {name: f for name, f in bank.modules.items() if held[name].any()}
    asked = (torch.arange(LENGTH) >= 6).expand(BATCH, LENGTH)
    work = Workload(shape_of(model), dict.fromkeys(modules, 3), 1, BATCH, BATCH * LENGTH, asked=10.0 * BATCH)

    def loss():
        ids = torch.randint(3, 80, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
        logits = logits_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "asked": asked})
        return F.cross_entropy(logits, torch.zeros(10 * BATCH, dtype=torch.long))

    return model, replace(bank, modules=modules), work, loss


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("speaker", SPEAKERS)
def test_flop_and_activations_of_a_language_model(speaker, targets, depth):
    """The output layer runs for the tokens asked, and its probabilities are kept."""
    model, adapter, work, loss = spoken_workload(speaker, targets, depth, **OWN.get(speaker, {}))
    with installed(model.network, [adapter]) as layers:
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as ahead:
                found = loss()
            with FlopCounterMode(display=False) as back:
                found.backward()
        kept = kept_by(model, layers, loss)
    assert forward(work).flop == pytest.approx(ahead.get_total_flops(), rel=0.01)
    assert backward(work).flop == pytest.approx(back.get_total_flops(), rel=0.01)
    assert kept_bytes(work) == pytest.approx(kept, rel=0.07)


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("speaker", ["llama", "phi"])
def test_flop_of_blocks_that_are_computed_twice(speaker, depth):
    """Torch stops the second pass at the last thing that is needed, which is before a block's last map."""
    model, adapter, work, loss = spoken_workload(speaker, "attention", depth)
    again = replace(model, recomputes=True)
    work = replace(work, shape=shape_of(again))
    with installed(model.network, [adapter]), sdpa_kernel(SDPBackend.MATH), recomputed(again):
        found = loss()
        with FlopCounterMode(display=False) as back:
            found.backward()
    assert back.get_total_flops() == pytest.approx(backward(work).flop, rel=0.05)
    once = replace(work, shape=replace(work.shape, recomputes=False))
    assert back.get_total_flops() > 1.2 * backward(once).flop
    assert kept_bytes(work) < kept_bytes(once)
    assert forward(work) == forward(once)


def test_what_a_family_keeps_besides():
    plain, capped = (shape_of(tiny_speaker(name)) for name in ("llama", "gemma2"))
    assert (plain.scores, plain.capped) == (0, False)
    assert (capped.scores, capped.capped) == (2 * 2, True)  # of each of two heads: softcap and softmax
    norms = {one.name.rpartition(".")[2]: one.keeps / one.outputs for one in capped.maps}
    assert (norms["o_proj"], norms["down_proj"], norms["gate_proj"], norms["k_proj"]) == (2, 2, 2, 2)
    fused = {one.name.rpartition(".")[2]: one.keeps for one in shape_of(tiny_speaker("gpt-neox")).maps}
    assert fused["query_key_value"] == 16 * 3 + 16 * 2
    assert (fused["dense"], fused["dense_h_to_4h"], fused["dense_4h_to_h"]) == (16, 24, 0)


def test_weights_of_few_bits_count_as_they_are_stored():
    pytest.importorskip("torchao")
    _, _, work, _ = spoken_workload("llama", "attention", 4)
    model = tiny_speaker("llama", **{**WIDE, "num_key_value_heads": 2, "vocab_size": 500})
    wide = shape_of(model)
    round_to_int8([model.network.get_submodule(block) for block in model.blocks])
    narrow, inside = shape_of(model), sum(one.outputs * one.inputs for one in wide.maps)
    scales = sum(one.outputs for one in wide.maps)
    assert narrow.parameters == wide.parameters
    assert wide.weight_bytes == 4 * wide.parameters
    stored = narrow.weight_bytes - 4 * (wide.parameters - inside)
    assert (
        inside + 4 * scales <= stored <= inside + 8 * scales
    )  # scales, and what else torchao keeps by output
    assert narrow.map_word == stored / inside
    assert memory_parts(replace(work, shape=narrow))["base"] == narrow.weight_bytes
    assert forward(replace(work, shape=narrow)).moved_bytes < forward(work).moved_bytes
    four = torch.zeros(32, 1, dtype=torch.uint8)  # 64 numbers, as bitsandbytes packs them
    four.quant_state = SimpleNamespace(absmax=torch.zeros(1))
    assert stored_bytes(four) == 32 + 4
    eight = torch.zeros(4, 16, dtype=torch.int8)
    eight.SCB = torch.zeros(4)
    assert stored_bytes(eight) == 64 + 16


def test_a_base_in_bf16_takes_half():
    _, _, work, _ = spoken_workload("llama", "attention", 4)
    narrow = replace(work, shape=replace(work.shape, word=2, weight_bytes=2 * work.shape.parameters))
    whole, half = memory_parts(work), memory_parts(narrow)
    assert whole["base"] == 2 * half["base"] == 4 * work.shape.parameters
    rows = sum(one.inputs + 3 * one.outputs for one in work.shape.maps) * BATCH * LENGTH
    halved = forward(work).moved_bytes - forward(narrow).moved_bytes
    entering = EMBEDDING_PASSES * BATCH * LENGTH * 64
    assert halved == pytest.approx(2 * (rows + entering + 500 * 64))  # and the output layer once
    logits = 4 * 40 * 500
    assert whole["activations"] - logits == 2 * (half["activations"] - logits)
    assert whole["adapter"] == half["adapter"] == 4 * 4 * 3 * (3 * 64 + 64 + 2 * 32)
    assert half["optimiser"] == 3 * half["adapter"]
    assert memory_bytes(work) == sum(whole.values())
