"""The stored prefix against the whole model: adapters, scores, keys, eviction, and a wrong entry."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import tempfile

import pytest
import torch

from polyrank.adapter import Adapter, restrict
from polyrank.assemble import prepare
from polyrank.evaluation import evaluate
from polyrank.experiment import conduct, open_folder
from polyrank.lowrank import fold
from polyrank.models.prefix import (
    PrefixCache,
    _reserve,
    can_skip,
    forward_from,
    lowest_block,
    temporary_cache,
    why_not_skip,
)
from polyrank.session import ClientEnv, train
from tests.builders import largest_difference, random_adapter
from tests.conftest import FAMILIES, tiny_model
from tests.small_runs import ended, forked, small_config
from tests.unit.test_client import task_for, tokens
from tests.unit.test_packing import apart, logits_and_slopes, strong_adapter

# ALBERT has one block for all depths.
SKIP = set(FAMILIES) - {"albert"}


def skipping_model(family="bert"):
    model = tiny_model(family)
    return dataclasses.replace(model, skips=can_skip(model))


def cache_in(tmp_path, **changes):
    return PrefixCache(tmp_path, **{"budget_bytes": 10**6, **changes})


def upper_task(model, **training):
    """A task that adapts the last block alone."""
    task = task_for(model, **{"optimizer": "sgd", "local_steps": 6, **training})
    upper = {n: torch.tensor([model.blocks[-1] in n] * 2) for n in task.mask}
    return dataclasses.replace(task, mask=upper, trained=upper, adapter=restrict(task.adapter, upper))


def test_who_can_skip(family):
    assert can_skip(tiny_model(family)) == (family in SKIP)


@pytest.mark.parametrize("packs", [True, False])
def test_training_from_the_stored_prefix_ends_in_the_same_adapter(family, packs, tmp_path):
    model = skipping_model(family)
    if not model.skips or (packs and not model.packs):
        pytest.skip("this family takes the plain path")
    model = dataclasses.replace(model, packs=packs)
    task, data, cache = upper_task(model), tokens(16), cache_in(tmp_path)
    plain = train(task, ClientEnv(model, data))
    for turn in range(2):  # once filling the cache, once reading it
        stored = train(task, ClientEnv(model, data, prefix=cache))
        moved = largest_difference(plain.adapter, task.adapter)
        assert largest_difference(stored.adapter, plain.adapter) < 1e-3 * moved, turn
    assert (cache.statistics()["fills"], cache.statistics()["hits"]) == (1, 1)
    assert cache.statistics()["bytes"] == 4 * 16 * int(data.starts[-1])


@pytest.mark.parametrize("packs", [True, False])
def test_every_depth_gives_the_logits_and_gradients_of_the_whole_model(family, packs, tmp_path):
    """Four blocks, and an adapter on every map from each depth upward."""
    depth_name = {"distilbert": "n_layers", "gpt2": "n_layer"}.get(family, "num_hidden_layers")
    model, data, cache = tiny_model(family, **{depth_name: 4}), tokens(6), cache_in(tmp_path)
    if family not in SKIP or (packs and not model.packs):
        pytest.skip("this family takes the plain path")
    assert why_not_skip(model) == ""
    model, rows = dataclasses.replace(model, packs=packs), [4, 0, 3]
    inputs, _ = data.batch(rows, model.device)
    everywhere = strong_adapter(model)
    for depth in (1, 2, 3):
        above = tuple(f"{block}." for block in model.blocks[depth:])
        adapter = Adapter("lora", {n: f for n, f in everywhere.modules.items() if n.startswith(above)})
        assert lowest_block(model.blocks, adapter.modules) == depth
        plain = logits_and_slopes(model, adapter, lambda: model.network(**inputs).logits)
        forward = forward_from(model, [data], depth, cache)
        stored = logits_and_slopes(model, adapter, lambda forward=forward: forward([rows], inputs))
        assert apart(plain, stored) < 1e-3, depth
        assert all(float((stored[n] - t).abs().max()) < 1e-5 * largest(plain) for n, t in plain.items())
    assert cache.statistics()["fills"] == 3


def largest(tensors):
    return max(float(t.abs().max()) for t in tensors.values())


def test_a_model_with_something_between_its_blocks_takes_the_plain_path(monkeypatch):
    """Some of DeBERTa's family put a convolution after the first block."""
    monkeypatch.setitem(FAMILIES, "conv", ("DebertaV2", {**FAMILIES["deberta-v2"][1], "conv_kernel_size": 3}))
    assert why_not_skip(tiny_model("conv")).startswith("logits differ by ")


def test_a_head_that_stands_before_the_base_is_no_trained_layer_below_the_blocks(monkeypatch):
    monkeypatch.setitem(FAMILIES, "xlm-roberta", ("XLMRoberta", FAMILIES["roberta"][1]))
    model = tiny_model("xlm-roberta")
    assert next(iter(dict(model.network.named_children()))) == "classifier"
    assert can_skip(model)
    embeddings = f"{model.network.base_model_prefix}.embeddings.LayerNorm"
    trained = dataclasses.replace(model, head_modules=[embeddings, "classifier"])
    assert why_not_skip(trained) == "a layer below its blocks is trained"


def test_skipped_blocks_do_not_run(tmp_path):
    model = skipping_model()
    ran = []
    hook = model.network.get_submodule(model.blocks[0]).register_forward_hook(lambda *_: ran.append(1))
    env = ClientEnv(model, tokens(16), prefix=cache_in(tmp_path))
    train(upper_task(model), env)
    filled = len(ran)
    train(upper_task(model), env)
    hook.remove()
    assert filled == 1  # one batch of all 16 texts
    assert len(ran) == filled
    assert model.network.get_submodule(model.blocks[0]).__class__.__name__ == "BertLayer"


def test_a_full_disk_is_one_line_and_not_a_bus_error(tmp_path):
    """A mapped file with holes would be fatal as soon as it is written to."""
    model, cache = skipping_model(), cache_in(tmp_path)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        cache.hidden(model, tokens(16), 1)

    assert ended(forked(work, tmp_path / "told")) == 1
    told = (tmp_path / "told.err").read_text()
    assert told.startswith("disk: ")
    assert told.endswith("cannot be written (File too large)\n")
    assert {path.name for path in tmp_path.iterdir()} == {"told.out", "told.err"}
    assert cache.hidden(model, tokens(16), 1).shape[0] > 16


def test_a_file_of_rows_has_no_holes(tmp_path):
    _reserve(tmp_path / "rows", 100_000)
    assert (tmp_path / "rows").stat().st_size == 100_000
    assert (tmp_path / "rows").stat().st_blocks * 512 >= 100_000


def test_a_wrong_entry_changes_the_result(tmp_path):
    """The tests above would see it: rows of another text give another adapter."""
    model = skipping_model()
    env, task = ClientEnv(model, tokens(16), prefix=cache_in(tmp_path)), upper_task(model)
    right = train(task, env)
    (path,) = tmp_path.glob("*.rows")
    rows = torch.from_file(str(path), True, path.stat().st_size // 4)
    rows.copy_(rows.flip(0))
    wrong = train(task, env)
    assert largest_difference(right.adapter, wrong.adapter) > 1e-2 * largest_difference(
        right.adapter, task.adapter
    )


def test_keys_follow_texts_depth_dtype_and_folds(tmp_path):
    model = skipping_model()
    cache = cache_in(tmp_path)
    task = upper_task(model)
    for data in (tokens(16), tokens(16, seed=1)):
        train(task, ClientEnv(model, data, prefix=cache))
    train(task, ClientEnv(model, tokens(16), prefix=dataclasses.replace(cache, dtype="bf16")))
    assert cache.statistics()["fills"] == 3
    name = "bert.encoder.layer.0.attention.self.query"
    fold(model.network, random_adapter(0, 2, shapes={name: (16, 16)}))
    model.folded.append("first")
    env = ClientEnv(model, tokens(16), prefix=cache, folds=["first"])
    after = train(task, env)
    assert cache.statistics()["fills"] == 4
    plain = train(task, dataclasses.replace(env, prefix=None))
    moved = largest_difference(plain.adapter, task.adapter)
    assert largest_difference(after.adapter, plain.adapter) < 1e-3 * moved


def test_the_least_recently_used_file_makes_room(tmp_path):
    model, task = skipping_model(), None
    task = upper_task(model)
    sets = [tokens(16, seed=seed) for seed in range(3)]
    size = max(4 * 16 * int(data.starts[-1]) for data in sets)
    cache = cache_in(tmp_path, budget_bytes=int(2.2 * size))
    for data in (sets[0], sets[1], sets[0], sets[2], sets[0]):
        train(task, ClientEnv(model, data, prefix=cache))
    found = cache.statistics()
    assert (found["fills"], found["hits"], found["evictions"]) == (3, 2, 1)
    assert found["bytes"] <= cache.budget_bytes
    none = cache_in(tmp_path, budget_bytes=10)
    train(task, ClientEnv(model, sets[1], prefix=none))
    assert none.statistics()["fills"] == 3


def test_base_dropout_and_adapters_in_the_first_block_take_the_whole_model(tmp_path):
    model, cache = skipping_model(), cache_in(tmp_path)
    train(upper_task(model, base_dropout=True), ClientEnv(model, tokens(16), prefix=cache))
    train(task_for(model), ClientEnv(model, tokens(16), prefix=cache))
    assert cache.statistics()["fills"] == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_evaluation_reads_the_prefix_too(dtype, tmp_path):
    model, cache, data = skipping_model(), cache_in(tmp_path, dtype=dtype), tokens(11)
    task = upper_task(model)
    shapes = {n: (f.B.shape[0], f.A.shape[1]) for n, f in task.adapter.modules.items()}
    adapter = random_adapter(1, 2, shapes=shapes)
    plain = evaluate(model, adapter, task.head, data, 4)
    for _ in range(2):
        stored = evaluate(model, adapter, task.head, data, 4, cache)
        assert stored["loss"] == pytest.approx(plain["loss"], rel=1e-4 if dtype == "fp32" else 0.05)
    assert cache.statistics()["hits"] == 1


def test_a_finished_run_leaves_no_files_of_it_behind(tmp_path):
    """A comparison makes a cache in every cell, in one process."""
    experiment = prepare(small_config(tmp_path, "plain", "allocation.depth=1", "rounds=1"))
    folder = open_folder(experiment, tmp_path / "run")
    *_, summary = conduct(experiment, folder)
    assert summary["prefix_cache"]["fills"] > 0
    assert experiment.prefix is not None
    assert not experiment.prefix.folder.exists()


def test_the_folder_of_a_process_that_was_killed_is_taken_away_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = """
import os, signal
from polyrank.models.prefix import temporary_cache
cache = temporary_cache(1.0, "fp32")
(cache.folder / "x.rows").write_bytes(b"a text")
os.kill(os.getpid(), signal.SIGKILL)
"""
    there = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=there, check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "x.rows").exists()
    first, second = temporary_cache(1.0, "fp32"), temporary_cache(1.0, "fp32")
    assert first is not None
    assert second is not None
    assert set(tmp_path.iterdir()) == {first.folder, second.folder}  # and one in use stays
    first.drop()
    second.drop()
    assert not list(tmp_path.iterdir())


def test_the_lowest_block():
    blocks = ["m.0", "m.1", "m.10"]
    assert lowest_block(blocks, ["m.1.q", "m.10.q"]) == 1
    assert lowest_block(blocks, ["m.10.q"]) == 2
    assert lowest_block(blocks, []) == 2
