"""The real MiniLM from the command line to a PEFT adapter, as a newcomer runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import polyrank
from polyrank.config import load_config

SUMMARY_KEYS = {
    *("method", "seed", "rounds", "test_accuracy", "test_macro_f1", "test_loss", "majority_rate"),
    *("bytes_down", "bytes_up", "wall_s", "adapter_sha256"),
}


def polyrank_command(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from polyrank.cli import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def settings_as_words(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def finished(tiny_settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    done = polyrank_command(
        "run", "--out", str(out), *settings_as_words([*tiny_settings, "evaluation.per_client=true"])
    )
    assert done.returncode == 0, done.stderr
    return out, done


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_tells_its_progress_and_where_things_lie(finished):
    out, done = finished
    lines = done.stdout.splitlines()
    assert lines[1].split() == [
        "round",
        "cohort",
        "train",
        "loss",
        "test",
        "loss",
        "accuracy",
        "down",
        "up",
        "ETA",
    ]
    assert lines[2].split()[:2] == ["1/2", "2"]
    assert lines[3].split()[:2] == ["2/2", "2"]
    assert f"report   {out}/report.html" in lines
    assert f"adapter  {out}/adapter" in lines
    assert done.stderr == ""


def test_the_run_folder_is_complete(finished):
    out, _ = finished
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        *("config.json", "versions.json", "partition.json", "rounds.jsonl", "clients.jsonl", "summary.json"),
        *("client_scores.jsonl", "state.safetensors", "report.html", ".lock"),
        *("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md"),
    }
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= SUMMARY_KEYS
    assert summary["steps"] == 8
    partition = json.loads((out / "partition.json").read_text())
    sizes = [c["num_train"] for c in partition["clients"]]
    assert sum(sizes) + sum(c["num_holdout"] for c in partition["clients"]) == 192
    assert [sum(c["label_counts"]) for c in partition["clients"]] == sizes
    scores = rows(out / "client_scores.jsonl")
    assert len(scores) == 4
    assert summary["client_accuracy_min"] == min(row["accuracy"] for row in scores)


def test_the_ledger_adds_up(finished):
    out, _ = finished
    rounds, clients = rows(out / "rounds.jsonl"), rows(out / "clients.jsonl")
    summary = json.loads((out / "summary.json").read_text())
    for way in ("bytes_down", "bytes_up"):
        assert summary[way] == sum(row[way] for row in rounds) == sum(row[way] for row in clients)
    numbers = 18 * 4 * (384 + 384) + 384 * 3 + 3  # 18 modules of rank 4, and the head
    assert all(0 < row["bytes_up"] - 4 * numbers < 600 for row in clients)


def test_the_report_is_one_page_for_light_and_dark(finished):
    page = (finished[0] / "report.html").read_text()

    links = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: links.extend(v for k, v in attrs if k in ("src", "href"))
    parser.feed(page)
    assert all(link.startswith("#") for link in links)
    assert page.count("<svg") == 5  # with the accuracy on each client
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "#0102" not in page  # every stand-in colour became a variable of the page


def test_the_same_seed_gives_the_same_bytes(finished, tiny_settings, tmp_path):
    out, _ = finished
    settings = [*tiny_settings, "evaluation.per_client=true"]
    result = polyrank.run(load_config(None, settings), out=tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (result.path / "adapter" / name).read_bytes() == (out / "adapter" / name).read_bytes()

    def untimed(path):
        return [{k: v for k, v in row.items() if not k.endswith("wall_s")} for row in rows(path)]

    assert untimed(result.path / "rounds.jsonl") == untimed(out / "rounds.jsonl")
    assert untimed(result.path / "clients.jsonl") == untimed(out / "clients.jsonl")
    other = polyrank.run(load_config(None, [*settings, "seed=1"]), out=tmp_path / "other")
    assert other.summary["adapter_sha256"] != result.summary["adapter_sha256"]


CLEAN_PROCESS = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base_path, adapter, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(base_path)
model = AutoModelForSequenceClassification.from_pretrained(base_path, **json.loads(sys.argv[4]))
if adapter:
    model = PeftModel.from_pretrained(model, adapter)
model.eval()
with torch.no_grad():
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    logits = model(**inputs).logits
assert "polyrank" not in sys.modules
print(json.dumps(logits.tolist()))
"""


def test_a_clean_process_computes_our_logits_from_adapter_and_from_merged_model(finished, tmp_path):
    import torch

    from polyrank.adapter import restrict
    from polyrank.checkpoint import load_state
    from polyrank.data.texts import Texts
    from polyrank.data.tokens import tokenize
    from polyrank.evaluation import predict
    from polyrank.lowrank import installed
    from polyrank.models.load import load_base, packaged_model, write_head

    out, _ = finished
    texts = ["Draw a line between two points.", "Return the degree of every node.", "Read the file."]
    labels = json.loads((out / "partition.json").read_text())["labels"]
    model, state = load_base("minilm", labels, 0, torch.device("cpu")), load_state(out / "state.safetensors")
    write_head(model, state.head)
    with installed(model.network, [restrict(state.adapter, state.active)]):
        ours = predict(model, tokenize(Texts(texts, None, [0] * 3), model.tokenizer, 24), 3)
    merged = polyrank_command("export", str(out), "--merge", "--out", str(tmp_path / "merged"))
    assert merged.returncode == 0, merged.stderr
    num_labels = json.dumps({"num_labels": len(labels)})
    for words in (
        [str(packaged_model()), str(out / "adapter"), json.dumps(texts), num_labels],
        [str(tmp_path / "merged"), "", json.dumps(texts), "{}"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", CLEAN_PROCESS, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert float((torch.tensor(json.loads(done.stdout)) - ours).abs().max()) < 1e-5
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert list(config["id2label"].values()) == labels


def test_an_export_equals_the_adapter_of_the_run(finished, tmp_path):
    out, _ = finished
    done = polyrank_command("export", str(out), "--out", str(tmp_path / "x"), "--json")
    assert json.loads(done.stdout) == {"path": str(tmp_path / "x"), "merged": False}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "x" / name).read_bytes() == (out / "adapter" / name).read_bytes()


def test_existing_folders_are_never_touched(finished):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for words in (["run", "--out", str(out)], ["export", str(out), "--out", str(out / "adapter")]):
        done = polyrank_command(*words)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert f"--out = '{out}" in done.stderr
        assert "nothing was overwritten" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["run", "--set", "roundz=3"], "polyrank: roundz = 3: unknown key; did you mean 'rounds'?"),
        (["run", "nowhere.toml"], "polyrank: CONFIG = 'nowhere.toml': cannot be read"),
        (["run", "--set", "data.source=nowhere.csv"], "polyrank: data.source = 'nowhere.csv': must be"),
        (["export", "nowhere"], "polyrank: RUN = 'nowhere': is not a finished run folder"),
        (["report", "nowhere"], "polyrank: RUN = 'nowhere': is not a finished run folder"),
    ],
    ids=lambda words: words[-1] if isinstance(words, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(words, line, tmp_path):
    done = polyrank_command(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_matches_nothing_stops_before_a_folder_is_made(tiny_settings, tmp_path):
    words = settings_as_words([*tiny_settings, "adapter.targets=['quary']"])
    done = polyrank_command("run", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("polyrank: adapter.targets = 'quary': matches no linear")
    assert list(tmp_path.iterdir()) == []


def test_methods_and_doctor_speak_to_people_and_machines():
    cards = json.loads(polyrank_command("methods", "--json").stdout)
    assert set(cards["fedit"]) == {"title", "paper", "travels", "exactness", "needs", "config"}
    assert "2305.05644" in polyrank_command("methods").stdout
    found = json.loads(polyrank_command("doctor", "--json").stdout)
    assert found["device auto"] in ("cpu", "cuda", "mps")
    assert Path(found["model minilm"]).is_dir()
    assert found["packed"] == found["prefix"] == "yes"


def test_a_run_for_machines_prints_json_alone(tiny_settings, tmp_path):
    words = settings_as_words([*tiny_settings, "rounds=1", "adapter.form=svd"])
    done = polyrank_command("run", "--json", *words, cwd=tmp_path)
    printed = json.loads(done.stdout)
    assert set(printed) >= SUMMARY_KEYS
    assert (tmp_path / printed["run"] / "summary.json").exists()
    assert printed["run"].startswith("runs/fedit-texts-1")


@pytest.mark.parametrize(
    "words", [["runn"], ["run", "--sett", "x"], ["export"], ["compare", "--seeds", "x", "fedit"]]
)
def test_misuse_of_the_command_line_is_one_line(words):
    done = polyrank_command(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("polyrank: ")
    assert done.stderr.count("\n") == 1


def test_the_version():
    assert polyrank_command("--version").stdout.strip() == polyrank.__version__


def test_fedara_shrinks_reports_and_exports(tiny_settings, tmp_path):
    """Half the slots are voted out; the report shows it; PEFT gets the pattern that is left."""
    out = tmp_path / "fedara"
    given = [*tiny_settings, "method=fedara", "rounds=4", "adapter.rank=3", "adapter.targets=attention"]
    given += ["voting.target_rank=1", "voting.arbitration=top"]
    done = polyrank_command("run", *settings_as_words(given), "--out", str(out))
    assert done.returncode == 0, done.stderr
    lines = rows(out / "rounds.jsonl")
    slots = rows(out / "slots.jsonl")
    summary = json.loads((out / "summary.json").read_text())
    modules = len(slots[0]["slots"])
    assert lines[0]["active_slots"] == 3 * modules
    assert [row["planned_slots"] for row in lines][-1] == summary["active_slots"] == modules
    assert lines[-1]["bytes_down"] < lines[0]["bytes_down"]
    page = (out / "report.html").read_text()
    assert "Active slots of each module" in page
    saved = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (
        saved["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    )  # no path of a machine
    pattern = saved["rank_pattern"]
    from polyrank.checkpoint import load_state

    state = load_state(out / "state.safetensors")
    held = {name: int(bits.sum()) for name, bits in state.active.items()}
    assert sum(held.values()) == modules
    assert all(rank in (1, 2, 3) for rank in pattern.values())
    assert set(state.shares) == set(held)
