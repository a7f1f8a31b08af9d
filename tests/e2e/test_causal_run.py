"""Whole runs of a causal language model: what they leave behind, say, and compare by."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import pytest
import torch

from polyrank.assemble import prepare
from polyrank.cli import main
from polyrank.config import make_config
from polyrank.data.instructions import cut_prompt, prompt_ids
from polyrank.errors import InputError
from polyrank.experiment import run
from polyrank.generation import exact_match, final_number, respond
from polyrank.lowrank import installed
from polyrank.speak import speak
from tests.conftest import tiny_speaker
from tests.small_runs import METHODS, small_config
from tests.unit.test_packing import strong_adapter

MIXED = "allocation.tiers=[{rank=1,share=0.5},{rank=3,share=0.5}]"
WAYS = {
    "fedit": [],
    "fedara": ["voting.target_rank=1", "adapter.rank=3"],
    "legend": ["fleet.name=edge3"],
    "replication": ["allocation.kind=tiers", MIXED],
    "flora": ["allocation.kind=tiers", MIXED],
    "federa": [],
    "slora": ["training.sparse_rounds=1"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    small_config(folder)
    return folder


@pytest.fixture(scope="module")
def finished(inputs):
    return run(small_config(inputs, "causal"), inputs / "finished")


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["polyrank", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    assert end.value.code == 0, told.err
    return told.out


@pytest.mark.parametrize("method", WAYS)
def test_the_same_methods(inputs, tmp_path, method):
    """Perplexity falls on the train texts of a model that has room to learn."""
    config = small_config(inputs, "causal", f"method={method}", "training.local_steps=6", *WAYS[method])
    summary = run(config, tmp_path / "run").summary
    rows = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert summary["test_perplexity"] == rows[-1]["test_perplexity"]
    assert 0 <= summary["test_token_accuracy"] <= 1
    assert "test_accuracy" not in summary
    assert "majority_rate" not in summary


@pytest.mark.parametrize("setting", ["engine.workers=2", "engine.prefix_gb=0"])
def test_the_same_bits_in_several_processes_and_without_a_stored_prefix(inputs, finished, tmp_path, setting):
    again = run(small_config(inputs, "causal", setting), tmp_path / "again").summary
    assert again["adapter_sha256"] == finished.summary["adapter_sha256"]
    assert again["test_perplexity"] == finished.summary["test_perplexity"]


def test_what_a_run_leaves_behind(finished):
    samples = json.loads((finished.path / "samples.json").read_text())
    assert [sorted(row) for row in samples] == [["after", "before", "prompt", "response"]] * 2
    page = (finished.path / "report.html").read_text()
    for title in ("Test perplexity", "Test token accuracy", "Texts of each client", "Response 2"):
        assert title in page
    assert samples[0]["prompt"] in page
    assert "Perplexity on each client" in page
    assert finished.summary["client_perplexity_max"] >= finished.summary["client_perplexity_mean"]
    scored = [json.loads(line) for line in (finished.path / "client_scores.jsonl").read_text().splitlines()]
    assert finished.summary["clients_scored"] == len(scored) > 0


def test_the_command_line_tells_perplexity(inputs, tmp_path, monkeypatch, capsys):
    settings = [f"--set={s.replace('{folder}', str(inputs))}" for s in METHODS["causal"]]
    more = ["rounds=2", "partition.clients=4", "sampling.count=2", "training.local_steps=1", "adapter.rank=2"]
    settings += [f"--set={s}" for s in more]
    out = command(monkeypatch, capsys, "run", *settings, "--out", tmp_path / "run").splitlines()
    assert out[1].split()[4:9] == ["test", "loss", "perplexity", "down", "up"]
    assert out[-3].startswith("perplexity ")
    assert ", token accuracy 0." in out[-3]
    assert "majority" not in out[-3]
    assert "is finished: perplexity" in command(monkeypatch, capsys, "resume", tmp_path / "run")
    arms = ("compare", "fedit", "ffa", *settings, "--seeds", "1", "--target", "1000")
    told = command(monkeypatch, capsys, *arms, "--out", tmp_path / "c").splitlines()
    assert told[0].split()[2] == "perplexity"
    assert told[-3].startswith("ffa    perplexity ")
    content = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert [arm["rounds_to_target"] for arm in content["arms"]] == [1, 1]  # below the target at once
    assert "perplexity - first" in (tmp_path / "c" / "compare.md").read_text()
    assert "Test perplexity over rounds" in (tmp_path / "c" / "compare.html").read_text()


def test_sites_of_a_natural_partition_keep_their_own_texts(inputs, tmp_path):
    rows = [json.loads(line) for line in (inputs / "questions.jsonl").read_text().splitlines()]
    told = [json.dumps({**row, "site": f"site-{number % 5 % 4}"}) for number, row in enumerate(rows)]
    (tmp_path / "sites.jsonl").write_text("\n".join(told))
    config = small_config(inputs, "causal", "method=fedit", "rounds=1", "sampling.count=3")
    given = config.model_dump(mode="json")
    given["data"]["source"] = str(tmp_path / "sites.jsonl")
    given["partition"] = {"kind": "natural", "column": "site"}
    result = run(make_config(given), tmp_path / "run")
    clients = json.loads((result.path / "partition.json").read_text())["clients"]
    assert [client["client"] for client in clients] == [f"site-{number}" for number in range(4)]
    sizes = [client["num_train"] + (client["num_holdout"] or 0) for client in clients]
    assert max(sizes) == sizes[0] > sizes[1]  # two fifths of the rows are of the first site
    assert result.summary["test_perplexity"] > 1
    asked = [json.loads(line) for line in (result.path / "clients.jsonl").read_text().splitlines()]
    assert {row["client"] for row in asked} < {client["client"] for client in clients}


def test_generate(finished, inputs, monkeypatch, capsys):
    words = (
        "generate",
        finished.path,
        "--prompt",
        "word1 word2",
        "--prompt",
        "word3",
        "--max-new-tokens",
        "4",
    )
    first = command(monkeypatch, capsys, *words)
    assert len(first.splitlines()) == 2
    assert all(word.startswith("word") for word in first.split())
    said = json.loads(command(monkeypatch, capsys, *words, "--json"))
    assert [row["prompt"] for row in said] == ["word1 word2", "word3"]
    assert [row["response"] for row in said] == first.splitlines()
    plain = run(small_config(inputs, "plain", "rounds=1"), inputs / "plain").path
    monkeypatch.setattr(sys, "argv", ["polyrank", "generate", str(plain), "--prompt", "x"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "has task = 'classification'" in capsys.readouterr().err


def test_the_samples_are_those_of_the_adapter(finished, monkeypatch, capsys):
    """What `generate` says from the run folder is what the run itself said after its last round."""
    samples = json.loads((finished.path / "samples.json").read_text())
    words = [word for row in samples for word in ("--prompt", row["prompt"])]
    out = command(monkeypatch, capsys, "generate", finished.path, *words, "--max-new-tokens", "4", "--json")
    assert [row["response"] for row in json.loads(out)] == [row["after"] for row in samples]


def test_prompts_together_say_what_each_says_alone(inputs):
    tokenizer = prepare(small_config(inputs, "causal")).model.tokenizer
    model = dataclasses.replace(tiny_speaker("llama", initializer_range=0.4), tokenizer=tokenizer)
    prompts = [(("user", text),) for text in ("word1", "word5 word6 word7 word8 word9", "word70 word2")]
    adapter = strong_adapter(model)
    together = respond(model, adapter, prompts, 6)
    assert together == [respond(model, adapter, [prompt], 6)[0] for prompt in prompts]
    assert len(set(together)) > 1
    ids = model.tokenizer("### Instruction:\nword1\n\n### Response:\n", return_tensors="pt")["input_ids"]
    with installed(model.network, [adapter]):
        for _ in range(6):  # by hand, without kept keys and values
            step = model.network(input_ids=ids, use_cache=False).logits[:, -1].argmax(dim=-1)
            ids = torch.cat([ids, step[:, None]], dim=1)
    assert together[0] == model.tokenizer.decode(ids[0, -6:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_long_prompts_lose_their_beginning(inputs, family):
    """What is said to a prompt past the model's 40 positions is what is said to its end."""
    tokenizer = prepare(small_config(inputs, "causal")).model.tokenizer
    model = dataclasses.replace(tiny_speaker(family, initializer_range=0.4), tokenizer=tokenizer)
    adapter, words = strong_adapter(model), [f"word{i % 80}" for i in range(60)]
    (row,) = prompt_ids([(("user", " ".join(words)),)], tokenizer)
    seen = []
    model.network.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    respond(model, adapter, [(("user", " ".join(words)),)], 4)
    assert seen[0].tolist() == [row[-36:]]
    seen.clear()
    respond(model, adapter, [(("user", " ".join(words)),), (("user", "word1"),)], 4, max_length=20)
    assert seen[0][0].tolist() == row[-20:]
    with pytest.raises(
        InputError, match="max_new_tokens = 40: at most 39, which leaves a prompt one of .* 40"
    ):
        respond(model, adapter, [(("user", "word1"),)], 40)


def test_a_prompt_keeps_the_token_that_begins_it():
    assert cut_prompt([1, 5, 6, 7, 8], 3, 1) == [1, 7, 8]
    assert cut_prompt([5, 6, 7, 8], 3, 1) == [6, 7, 8]
    assert cut_prompt([1, 5, 6], 1, 1) == [6]
    assert cut_prompt([5, 6], 2, None) == cut_prompt([5, 6], None, None) == [5, 6]


def test_a_run_and_generate_take_prompts_of_any_length(inputs, tmp_path, monkeypatch, capsys):
    tiny_speaker("gpt2").network.save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(inputs / "speaker" / name, tmp_path / "gpt2" / name)
    rows = [{"question": "word1 " * 60, "answer": "word2"}] * 30
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = [f"model.name={tmp_path / 'gpt2'}", f"data.source={tmp_path / 'long.jsonl'}", "rounds=1"]
    path = run(small_config(inputs, "causal", *given), tmp_path / "run").path
    said = command(monkeypatch, capsys, "generate", path, "--prompt", "word3 " * 90, "--max-new-tokens", "4")
    assert len(said.splitlines()) == 1
    asked = []
    monkeypatch.setattr("polyrank.speak.respond", lambda *given: asked.append(given) or ["yes"])
    assert speak(path, ["word3"], 4) == ["yes"]
    assert asked[0][3:] == (4, 30)  # new tokens, and model.max_length
    monkeypatch.undo()
    words = ["generate", str(path), "--prompt", "word3", "--max-new-tokens", "50"]
    monkeypatch.setattr(sys, "argv", ["polyrank", *words])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(told) == 1
    assert "max_new_tokens = 50: at most 39" in told[0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", 7),
        ("#### 1,234.5 dollars of 9", 1234.5),
        ("it is -3 and then 12.", 12),
        ("#### none", None),
        ("none", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == number


def test_exact_match_wants_marked_answers():
    assert exact_match(["7", "8 #### 9", "x"], ["a #### 7", "#### 8", "#### 1"]) == pytest.approx(1 / 3)
    assert exact_match(["7"], ["7"]) is None
    assert exact_match([], []) is None


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["partition.kind=dirichlet"], "partition.kind = 'dirichlet': needs labels, and there is no column"),
        (["partition.kind=natural", "partition.column=site"], "partition.column = 'site': no such column"),
        (["model.name=minilm"], "model.name = 'minilm': a model folder or a hub id"),
        (["data.source=docstrings"], "data.source = 'docstrings': has no responses"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(inputs, settings, complaint):
    with pytest.raises(InputError, match=complaint):
        prepare(small_config(inputs, "causal", *settings))
