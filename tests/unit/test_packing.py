"""Packed batches against padded ones: logits, gradients, training, and who takes the plain path."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import pytest
import torch

from polyrank.adapter import Adapter
from polyrank.evaluation import predict
from polyrank.lowrank import installed, negated
from polyrank.models import packing
from polyrank.models.layout import layout_of
from polyrank.models.load import head_parameters, logits_of
from polyrank.models.targets import linear_shape, resolve_targets
from polyrank.session import ClientEnv, train
from tests.builders import largest_difference, random_adapter
from tests.conftest import FAMILIES, tiny_model
from tests.unit.test_client import task_for, tokens

READS = {
    **dict.fromkeys(["bert", "distilbert", "roberta"], "first"),
    **dict.fromkeys(["gpt2", "llama", "mistral", "qwen2"], "last"),
    "albert": None,  # its one block cannot know when it runs for the last time
}
DECODERS = [family for family, read in READS.items() if read == "last"]
ABSORBING = ["bert", "distilbert", "roberta"]
KEYS = {"key", "value", "k_lin", "v_lin"}
packing_families = pytest.mark.parametrize("family", READS)
BATCHES = {"ragged": ([7, 3, 1, 5], 7), "one": ([6], 6), "full": ([5, 5, 5], 5), "wide": ([4, 1, 3], 8)}


def batch_of(lengths, width=7):
    """Ids 3 to 89 in texts of these lengths, padded with 0."""
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 90, mask.shape, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def strong_adapter(model, dtype=torch.float32):
    """On every linear map of the blocks, strong enough for attention to tell tokens apart."""
    shapes = resolve_targets(model.network, model.blocks, "all-linear")
    modules = random_adapter(1, 2, shapes=shapes).modules
    weak = {n: {p: (0.3 * t).to(dtype) for p, t in f.tensors().items()} for n, f in modules.items()}
    return Adapter("lora", {name: modules[name].with_tensors(tensors) for name, tensors in weak.items()})


def logits_and_slopes(model, adapter, forward):
    """Logits, and the gradient of every factor and head parameter, by name."""
    with installed(model.network, [adapter]) as layers:
        for parameter in head_parameters(model).values():
            parameter.requires_grad_(True)
            parameter.grad = None
        logits = forward()
        torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
        found = {f"{name} {p}": getattr(layer, p).grad for name, layer in layers.items() for p in "AB"}
        heads = {name: p.grad for name, p in head_parameters(model).items()}
    model.network.requires_grad_(False)
    return {"logits": logits.detach(), **found, **heads}


def apart(plain, other):
    """Largest difference of any tensor, relative to that tensor's largest number."""
    return max(float((other[n] - t).abs().max() / t.abs().max()) for n, t in plain.items())


def test_a_layout_packs_and_pads():
    layout = layout_of(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    x = torch.arange(6.0).view(2, 3, 1)
    packed = layout.pack(x)
    assert packed.flatten().tolist() == [0, 1, 3]
    assert layout.pack(x[:1]).flatten().tolist() == [0, 1, 0]  # the same for every text
    assert layout.pad(packed).flatten().tolist() == [0, 1, 0, 3, 0, 0]
    assert layout.pad(packed[:, 1:2], layout.rows[2:]).flatten().tolist() == [0, 0, 0, 1, 0, 0]


def test_who_packs_and_what_their_heads_read():
    models = {family: tiny_model(family) for family in FAMILIES}
    assert {family: model.pools for family, model in models.items() if model.packs} == READS
    assert models["deberta"].reasons["packing"] == "its blocks do not get the layout"
    assert models["albert"].reasons["pooling"].startswith("first token: logits differ by ")


@packing_families
@pytest.mark.parametrize("pools", [True, False])
@pytest.mark.parametrize("lengths", BATCHES)
def test_logits_and_gradients_are_those_of_the_padded_batch(family, pools, lengths):
    """In float64, where rounding hides no fault in a gradient that happens to be small."""
    model, inputs = tiny_model(family), batch_of(*BATCHES[lengths])
    model = model if pools else dataclasses.replace(model, pools=None)
    model.network.double()
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if name.endswith("bias"):  # a fresh model's are 0
                parameter.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(len(name)))
    adapter = strong_adapter(model, torch.float64)
    plain = logits_and_slopes(model, adapter, lambda: model.network(**inputs).logits)
    packed = logits_and_slopes(model, adapter, lambda: logits_of(model, inputs))
    assert len(plain) > 2 * len(resolve_targets(model.network, model.blocks, "all-linear"))
    assert apart(plain, packed) < 1e-6
    assert model.network.config._attn_implementation == "sdpa"


@packing_families
def test_logits_are_those_of_the_padded_batch(family):
    model, data = tiny_model(family), tokens(13)
    plain = dataclasses.replace(model, packs=False)
    with installed(model.network, [strong_adapter(model)]):
        packed, padded = (predict(m, data, 5) for m in (model, plain))
    assert float((packed - padded).abs().max() / padded.abs().max()) < 1e-5


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


@pytest.mark.parametrize("family", [family for family, read in READS.items() if read])
def test_the_last_block_runs_for_the_tokens_that_the_head_reads(family):
    """But for its keys and values, which a model that turns or joins them needs of all."""
    model, inputs = tiny_model(family), batch_of([7, 4, 5, 2])
    found = rows_of_the_last_block(model, inputs)
    assert model.absorbs == (family in ABSORBING)
    keys = {"k_proj", "v_proj", "c_attn"}
    wanted = {"c_attn": {18, 4}, "k_proj": {18}, "v_proj": {18}}  # GPT-2 makes queries and keys in one map
    assert found == {kind: wanted.get(kind, {4}) for kind in found}
    assert bool(found.keys() & (keys | KEYS)) != model.absorbs


@pytest.mark.parametrize("family", ABSORBING)
def test_an_adapter_that_drops_some_of_a_token_needs_keys_and_values(family):
    model, inputs = tiny_model(family), batch_of([7, 4, 5, 2])
    with installed(model.network, [strong_adapter(model)], dropout=0.1):
        found = rows_of_the_last_block(model, inputs)
    assert [found[name] for name in found.keys() & KEYS] == [{18}, {18}]


@packing_families
def test_slots_that_do_not_train_take_part(family):
    model, inputs = tiny_model(family), batch_of([7, 4, 5, 2])
    frozen = [strong_adapter(model), negated(strong_adapter(model))]
    for beside in frozen:
        with installed(model.network, [strong_adapter(model)], frozen=[beside]), torch.inference_mode():
            plain, packed = model.network(**inputs).logits, logits_of(model, inputs)
        assert float((packed - plain).abs().max() / plain.abs().max()) < 1e-5


def rows_of_the_last_block(model, inputs):
    """How many rows went through each of its maps, by last name."""
    last = model.network.get_submodule(model.blocks[-1])
    rows = defaultdict(set)
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: rows[name].add(out.shape[1]))
        for name, module in last.named_modules()
        if linear_shape(module) is not None
    ]
    logits_of(model, inputs)
    for hook in hooks:
        hook.remove()
    return {name.removesuffix(".base").rpartition(".")[2]: counts for name, counts in rows.items()}


@packing_families
def test_padding_does_not_reach_the_blocks(family):
    model, inputs = tiny_model(family), batch_of([7, 4, 5, 2])
    rows = []
    hook = model.network.get_submodule(model.blocks[0]).register_forward_hook(
        lambda module, args, output: rows.append(args[0].shape[1])
    )
    logits_of(model, inputs)
    hook.remove()
    assert set(rows) == {18}


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("end", [[0], [0, 0, 0]])
def test_a_text_that_ends_with_the_padding_token_is_read_where_the_head_looks(family, end):
    """As where the padding token is also the one that ends a text: heads go by ids."""
    model, inputs = tiny_model(family), batch_of([7, 5])
    inputs["input_ids"][1, 5 - len(end) : 5] = torch.tensor(end)
    with installed(model.network, [strong_adapter(model)]), torch.inference_mode():
        plain, packed = model.network(**inputs).logits, logits_of(model, inputs)
    assert float((packed - plain).abs().max() / plain.abs().max()) < 1e-5


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_attention_windows_are_kept(family):
    """The families above have a window of 4; without it the same weights say something else."""
    inputs = batch_of([7, 6])
    narrow, wide = tiny_model(family), tiny_model(family, sliding_window=40)
    assert narrow.packs
    assert wide.packs
    found = []
    for model in (narrow, wide):
        with installed(model.network, [strong_adapter(model)]), torch.inference_mode():
            found.append(logits_of(model, inputs))
            assert torch.allclose(found[-1], model.network(**inputs).logits, rtol=0, atol=1e-5)
    assert float((found[0] - found[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "its attention has a softcap"),
        ("modernbert", "its attention has a window on both sides"),
        ("window", "its sliding_window is in the mask alone"),
        ("chunk", "its attention_chunk_size is in the mask alone"),
    ],
)
def test_attention_that_is_not_known_takes_the_plain_path(family, reason, monkeypatch):
    small = FAMILIES["llama"][1]
    known = {"gemma2": "Gemma2", "modernbert": "ModernBert"}
    more = {"window": {"sliding_window": 40}, "chunk": {"attention_chunk_size": 40}}
    options = {**small, "head_dim": 8, **more.get(family, {})}
    monkeypatch.setitem(FAMILIES, family, (known.get(family, "Llama"), options))
    model = tiny_model(family)
    assert (model.packs, model.pools, model.reasons["packing"]) == (False, None, reason)
    assert not any(module._forward_pre_hooks for module in model.network.modules())


def both_ways(module, layout, options):
    return layout.mask[:, None, None, :]


def one_too_early(layout, ids, config, read):
    return (layout.mask.sum(dim=1).cumsum(0) - 2).clamp(min=0)


def rotations_of_others(kwargs, change):
    return {
        **kwargs,
        "position_embeddings": tuple(change(part).flip(1) for part in kwargs["position_embeddings"]),
    }


@pytest.mark.parametrize(
    ("place", "fault"),
    [("_seen", both_ways), ("with_rotations", rotations_of_others)],
)
def test_the_probe_sees_a_wrong_layout(place, fault, monkeypatch):
    monkeypatch.setattr(packing, place, fault)
    model = tiny_model("llama")
    assert not model.packs
    assert model.reasons["packing"].startswith("logits differ by ")


def test_the_probe_sees_a_wrong_token(monkeypatch):
    monkeypatch.setattr(packing, "_read_tokens", one_too_early)
    model = tiny_model("llama")
    assert (model.packs, model.pools) == (True, None)
    assert "last token: logits differ by " in model.reasons["pooling"]
