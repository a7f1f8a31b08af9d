"""Causal language models: what is learned is the response, the same packed, padded, stored and together."""

from __future__ import annotations

import dataclasses
from itertools import chain

import numpy as np
import pytest
import torch

from polyrank.config import load_config
from polyrank.errors import InputError
from polyrank.evaluation import evaluate, response_scores
from polyrank.gate import MAX_METRIC
from polyrank.lowrank import installed
from polyrank.models.load import logits_of, read_head
from polyrank.models.packing import difference, plain_logits
from polyrank.models.prefix import PrefixCache, can_skip
from polyrank.models.speaker import load_speaker
from polyrank.models.targets import resolve_targets
from polyrank.session import ClientEnv, train
from tests.builders import largest_difference
from tests.conftest import CPU, SPEAKERS, stored_speaker, tiny_model, tiny_network, tiny_speaker
from tests.unit.test_client import prompts, task_for, tokens
from tests.unit.test_packing import apart, strong_adapter

speakers = pytest.mark.parametrize("speaker", SPEAKERS)
ATTENTION = {"gpt2": ["c_attn"], "gpt-neox": ["query_key_value"], "phi3": ["qkv_proj"]}
LINEAR_MAPS_PER_BLOCK = {"gpt2": 4, "gpt-neox": 4, "phi": 6, "phi3": 4}


def theirs(model, data):
    """The loss of transformers itself on the padded batch, where -100 marks what is not learned."""
    inputs, _ = data.batch(range(len(data)), CPU)
    inputs = {name: value for name, value in inputs.items() if name != "asked"}
    labels = inputs["input_ids"].where(inputs["attention_mask"].bool(), torch.tensor(-100))
    before = torch.arange(labels.shape[1]) < torch.from_numpy(data.responses)[:, None]
    return model.network(**inputs, labels=labels.masked_fill(before, -100), use_cache=False).loss


def ours(model, data, forward=logits_of):
    inputs, labels = data.batch(range(len(data)), CPU)
    return torch.nn.functional.cross_entropy(forward(model, inputs), labels)


def loss_and_slopes(model, adapter, loss):
    with installed(model.network, [adapter]) as layers:
        found = loss()
        found.backward()
        slopes = {f"{name} {p}": getattr(layer, p).grad for name, layer in layers.items() for p in "AB"}
    return {"loss": found.detach(), **slopes}


@speakers
def test_loss_and_gradients_are_those_of_transformers_on_the_response(speaker):
    """In float64, where rounding hides no fault in a gradient that happens to be small."""
    model, data = tiny_speaker(speaker), prompts(4)
    assert model.packs == (speaker != "gemma2")
    model.network.double()
    adapter = strong_adapter(model, torch.float64)
    reference = loss_and_slopes(model, adapter, lambda: theirs(model, data))
    packed = loss_and_slopes(model, adapter, lambda: ours(model, data))
    padded = loss_and_slopes(
        model, adapter, lambda: ours(model, data, lambda m, inputs: plain_logits(m.network, inputs))
    )
    assert apart(padded, packed) < 1e-10
    assert apart(reference, packed) < 1e-5  # transformers takes its loss in float32
    whole = dataclasses.replace(data, responses=np.ones(4, dtype=np.int64))
    assert apart(reference, loss_and_slopes(model, adapter, lambda: ours(model, whole))) > 0.05


def test_what_the_prompt_would_have_taught_changes_nothing():
    """Only tokens of responses are labels, and only tokens before one are asked."""
    data = prompts(5)
    inputs, labels = data.batch(range(5), CPU)
    rows = [data.ids[data.starts[row] : data.starts[row + 1]].tolist() for row in range(5)]
    spoken = [row[first:] for row, first in zip(rows, data.responses, strict=True)]
    assert labels.tolist() == [*chain(*spoken)]
    asked = [[*range(first - 1, len(row) - 1)] for row, first in zip(rows, data.responses, strict=True)]
    assert [line.nonzero().flatten().tolist() for line in inputs["asked"]] == asked


@speakers
def test_the_output_layer_runs_for_the_tokens_asked_alone(speaker):
    model, data = tiny_speaker(speaker), prompts(4)
    seen = []
    hook = model.network.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(tuple(output.shape))
    )
    ours(model, data)
    hook.remove()
    assert seen == [(data.targets(range(4)), 90)]
    assert not model.network.get_output_embeddings()._forward_pre_hooks


@speakers
def test_targets_and_what_stays_frozen(speaker):
    model = tiny_speaker(speaker)
    attention = resolve_targets(model.network, model.blocks, "attention")
    names = [name.rpartition(".")[2] for name in attention]
    assert names == ATTENTION.get(speaker, ["q_proj", "k_proj", "v_proj"]) * 2
    every = resolve_targets(model.network, model.blocks, "all-linear")
    assert len(every) == 2 * LINEAR_MAPS_PER_BLOCK.get(speaker, 7)
    assert (list(model.head_modules), read_head(model)) == ([], {})
    assert not any(p.requires_grad for p in model.network.parameters())
    inner, outer = model.network.get_input_embeddings(), model.network.get_output_embeddings()
    tied = speaker in ("gpt2", "llama-tied", "gemma", "gemma2")
    assert (inner.weight is outer.weight) == tied


@speakers
@pytest.mark.parametrize("form", ["lora", "svd"])
def test_training_learns_the_responses(speaker, form):
    model, data = tiny_speaker(speaker), prompts(16)
    task = task_for(model, form, local_steps=30, learning_rate=0.05)
    update = train(task, ClientEnv(model, data))
    before, after = (evaluate(model, a, {}, data, 8)["loss"] for a in (task.adapter, update.adapter))
    assert after < before - 0.01


@speakers
def test_training_ends_the_same_packed_padded_and_from_a_stored_prefix(speaker, tmp_path):
    model, data = tiny_speaker(speaker), prompts(16)
    assert can_skip(model)
    upper = next(m for m in resolve_targets(model.network, model.blocks, "attention") if ".1." in m)
    task = task_for(model, only=upper, optimizer="sgd", learning_rate=1.0, local_steps=12)
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    skips = dataclasses.replace(model, skips=True)
    packed = train(task, ClientEnv(model, data))
    padded = train(task, ClientEnv(dataclasses.replace(model, packs=False), data))
    stored = train(task, ClientEnv(skips, data, prefix=PrefixCache(tmp_path, 10**6)))
    assert (tmp_path / "events").read_text().split() == ["fill"]
    moved = largest_difference(packed.adapter, task.adapter)
    assert largest_difference(packed.adapter, padded.adapter) < 1e-4 * moved
    assert largest_difference(packed.adapter, stored.adapter) < 1e-4 * moved
    after = dict(model.network.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert packed.head == {}


def test_scores_count_every_response_token_once():
    """However the texts are batched: not the mean of means."""
    model, data = tiny_speaker(), prompts(9)
    adapter = strong_adapter(model)
    with torch.inference_mode(), installed(model.network, [adapter]):
        inputs, labels = data.batch(range(9), CPU)
        logits = plain_logits(model.network, inputs)
        loss = float(torch.nn.functional.cross_entropy(logits, labels))
        hits = float((logits.argmax(dim=1) == labels).float().mean())
    for size in (1, 4, 9):
        found = evaluate(model, adapter, {}, data, size)
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
        assert found["token_accuracy"] == pytest.approx(hits)


def test_a_checkpoint_that_is_no_language_model_is_refused(tmp_path):
    from transformers import AutoTokenizer

    from polyrank.models.load import packaged_model

    tiny_network("llama").save_pretrained(tmp_path)  # a classifier: its output layer is not there
    AutoTokenizer.from_pretrained(packaged_model()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"loads as a causal language model \(the checkpoint lacks lm_head"):
        load_speaker(str(tmp_path), CPU)
    with pytest.raises(InputError, match="model.name = 'minilm': a model folder or a hub id"):
        load_speaker("minilm", CPU)


@speakers
@pytest.mark.parametrize("packs", [True, False])
def test_recomputed_blocks_give_the_same_adapter(speaker, packs):
    """And keep less: nothing between a block's entrance and its end."""
    model, data = tiny_speaker(speaker), prompts(8)
    model = dataclasses.replace(model, packs=packs and model.packs)
    task = task_for(model, optimizer="sgd", learning_rate=1.0)
    kept = {}

    def trained(recomputes):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            update = train(task, ClientEnv(dataclasses.replace(model, recomputes=recomputes), data))
        kept[recomputes] = sum(sizes)
        return update.adapter

    assert largest_difference(trained(True), trained(False)) == 0
    assert kept[True] < 0.7 * kept[False]
    assert not any("forward" in model.network.get_submodule(name).__dict__ for name in model.blocks)


def test_recomputed_blocks_of_a_classifier_that_runs_its_last_block_for_one_token():
    model = tiny_model("llama")
    task, data = task_for(model, optimizer="sgd"), tokens(8)
    own = model.network.get_submodule(model.blocks[-1]).forward
    plain, again = (
        train(task, ClientEnv(dataclasses.replace(model, recomputes=asked), data)) for asked in (False, True)
    )
    assert largest_difference(plain.adapter, again.adapter) == 0
    assert model.network.get_submodule(model.blocks[-1]).forward is own


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Makes a folder with a tiny language model of a name."""
    return lambda speaker: stored_speaker(speaker, tmp_path_factory.mktemp(speaker))


@speakers
@pytest.mark.filterwarnings("ignore")
def test_a_base_stored_in_bf16_trains_an_adapter_in_fp32(speaker, stored, tmp_path):
    path, data = stored(speaker), prompts(8)
    wide, narrow = load_speaker(path, CPU), load_speaker(path, CPU, "bf16")
    assert {p.dtype for p in narrow.network.parameters()} == {torch.bfloat16}
    assert (narrow.packs, can_skip(narrow)) == (wide.packs, True)
    upper = next(m for m in resolve_targets(wide.network, wide.blocks, "attention") if ".1." in m)
    task = task_for(wide, only=upper, optimizer="sgd", learning_rate=1.0, local_steps=8)
    cached = ClientEnv(dataclasses.replace(narrow, skips=True), data, prefix=PrefixCache(tmp_path, 10**6))
    reference = train(task, ClientEnv(wide, data)).adapter
    moved = largest_difference(reference, task.adapter)
    for env in (ClientEnv(narrow, data), cached):
        update = train(task, env)
        assert {t.dtype for f in update.adapter.modules.values() for t in f.tensors().values()} == {
            torch.float32
        }
        assert 0 < largest_difference(update.adapter, reference) < 0.1 * moved
    loss = evaluate(wide, reference, {}, data, 4)["loss"]
    assert evaluate(narrow, reference, {}, data, 4)["loss"] == pytest.approx(loss, rel=0.02)


def test_the_worst_language_model_has_a_perplexity_that_a_message_holds():
    """A client left out for its perplexity would make the others' mean the better."""
    data = prompts(3)

    def sure(rows, inputs):  # of token 0, which is never the next one
        return torch.zeros(int(inputs["asked"].sum()), 90).index_fill(1, torch.tensor([0]), 100.0)

    found = response_scores(tiny_speaker(), data, 3, sure)
    assert found["loss"] > 99
    assert 1e8 < found["perplexity"] <= MAX_METRIC


def test_four_bits_need_cuda(stored):
    with pytest.raises(InputError, match="model.quantize = '4bit': needs CUDA, and this run is on cpu"):
        load_speaker(stored("llama"), CPU, bits="4bit")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["model.quantize=4bit"], "model.quantize = '4bit': goes with task = 'causal_lm' alone"),
        (["task=causal_lm", "model.quantize=8bit", "method=flora"], "folds nothing into the frozen weights"),
        (["task=causal_lm", "model.quantize=8bit", "method=fedex"], "folds nothing into the frozen weights"),
        (["task=causal_lm", "model.quantize=8bit", "method=federa"], "needs adapter.start = 'zero'"),
        (["model.quantize=2bit"], "must be '8bit' or '4bit'"),
        (["task=causal_lm", "model.base_dtype=bf16", "method=flora"], "must be 'fp32' under stacking"),
        (["task=causal_lm", "model.base_dtype=bf16", "method=fedex"], "must be 'fp32' under residual"),
    ],
)
def test_what_does_not_go_with_few_bits(settings, complaint):
    with pytest.raises(InputError, match=complaint):
        load_config(settings=settings)


def test_rounding_of_bf16_is_no_difference_and_more_is():
    """What a probe takes for the same result goes by how the result is rounded."""
    ones = torch.ones(4)
    assert difference(ones, 1.001 * ones) == "logits differ by 1e-03"
    assert difference(ones.bfloat16(), (1.01 * ones).bfloat16()) == ""
    assert difference(ones.bfloat16(), (1.1 * ones).bfloat16()) == "logits differ by 1e-01"
