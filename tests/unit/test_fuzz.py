"""Whatever stands in a config or a data file: a run, or one clear line; and nothing written anywhere else."""

from __future__ import annotations

import csv
import json
import os
import string
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polyrank.config import Config, load_config, make_config
from polyrank.data.source import load_corpus, load_instructions
from polyrank.data.texts import Corpus, Data
from polyrank.device import find_fleet
from polyrank.errors import InputError
from polyrank.experiment import run
from polyrank.restart import resume
from polyrank.site import read_table
from tests.small_runs import command, ended, forked, make_inputs, small_config

NASTY = [
    "",
    "\x00",
    "a\x00b",
    "../",
    "../../etc/passwd",
    "/dev/null",
    "/dev/full",
    "..",
    "~",
    "x" * 10_000,
    "./" + "y" * 10_000,
    "line\nbreak",
    "\x1b[31mred",
    "\u202eright to left",
    "😀" * 300,
    "\ud800",
    "NaN",
    "-1e999",
    "9" * 5_000,
    "=cmd|' /C calc'!A0",
    "%s%n{0}{{}}",
    "con",
    " ",
]
text = st.one_of(st.sampled_from(NASTY), st.text(max_size=30))
value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text, st.integers(-(10**400), 10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=5,
)
TABLES = [name for name, field in Config.model_fields.items() if hasattr(field.default, "model_dump")]
KEYS = sorted({key for name in TABLES for key in type(Config.model_fields[name].default).model_fields})


def one_line(error: Exception) -> None:
    told = str(error)
    assert told
    assert told.isprintable(), told
    assert len(told) < 1500, len(told)


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.one_of(st.sampled_from(sorted(Config.model_fields)), text),
        st.one_of(value, st.dictionaries(st.one_of(st.sampled_from(KEYS), text), value, max_size=3)),
        max_size=3,
    )
)
@example({"seed": 10**400})
@example({"method": "../../x"})
@example({"a\nb\x1b[0m" * 1000: 1})
@example({"data": {"labels": ["\x00"] * 1000, "text": ["x" * 10_000, "a\nb", "c"]}})
def test_any_table_is_a_config_or_one_line(given):
    try:
        make_config(given)
    except InputError as error:
        one_line(error)


@settings(max_examples=200)
@given(st.lists(st.one_of(text, st.tuples(st.sampled_from(KEYS), text).map("=".join)), max_size=3))
@example(["data.source=" + "[" * 5000])
@example([".=1"])
@example(["a" * 10_000 + "=1"])
@example([".".join("a" * 5000) + "=1"])
def test_any_setting_is_a_config_or_one_line(words):
    try:
        load_config(None, words)
    except InputError as error:
        one_line(error)


@pytest.mark.parametrize("read", [load_config, read_table, lambda path: find_fleet(str(path))])
@settings(max_examples=100)
@given(st.one_of(st.binary(max_size=300), st.text(string.printable, max_size=200).map(str.encode)))
@example(b"\xff\xfe\x00")
@example(b"x = " + b"[" * 3_000)
@example(b"a" + b".a" * 3_000 + b" = 1")
@example(b"seed = " + b"9" * 20_000)
@example(b"rounds = 1979-05-27T07:32:00Z")
@example(b"fleet = 1")
@example(b"devices = 3\n[fleet]\nmembers = [{device = 'a\x7f'}]")
@example(b"[data]\nsource = '" + b"x" * 10_000 + b"'\n[limits]\nmax_rank = 0")
def test_any_bytes_as_a_table(tmp_path_factory, read, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(data)
    try:
        read(path)
    except InputError as error:
        one_line(error)


@pytest.mark.parametrize("name", NASTY, ids=range(len(NASTY)))
@pytest.mark.parametrize("ending", ["", ".toml", "/fleet.toml"])
def test_any_name_of_a_fleet(name, ending):
    with pytest.raises(InputError) as refusal:
        find_fleet(name + ending)
    one_line(refusal.value)


@settings(max_examples=60)
@given(st.lists(st.fixed_dictionaries({}, optional={"messages": value, "prompt": value, "response": value})))
@example([{"messages": [None, None]}] * 9)
@example([{"messages": number} for number in range(9)])
@example([{"messages": True}] * 9)
@example([{"messages": "hello"}] * 9)
@example([{"messages": ["hello"]}] * 9)
@example([{"messages": [{"role": [1], "content": "x"}]}] * 9)
@example([{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": 2}]}] * 9)
@example([{"prompt": 1, "response": [2]}] * 9)
def test_any_rows_are_instructions_or_one_line(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "instructions.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    try:
        found = load_instructions(Data(source=str(path)), 0, None, None)
    except InputError as error:
        one_line(error)
    else:
        assert all(isinstance(text, str) for pair in found.train.texts for text in pair[0])


@pytest.mark.parametrize("name", [name for name in NASTY if name != "\ud800"], ids=range(len(NASTY) - 1))
@pytest.mark.parametrize("key", ["data.source", "data.test", "model.name", "CONFIG", "RUN", "--out"])
def test_any_name_of_a_file(key, name, inputs_here, tmp_path, monkeypatch):
    """Refused in one line, and nothing is written; names that may be good are not tried here."""
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"name": str(inputs_here / "model")},
        "data": {"source": str(inputs_here / "texts.csv")},
    }
    if key == "RUN":
        attempt = lambda: resume(name)  # noqa: E731
    elif key == "CONFIG":
        attempt = lambda: load_config(Path(name))  # noqa: E731
    elif key == "--out":
        if name in ("~", "con", " ", "NaN", "-1e999") or name.startswith(
            ("%", "line", "\u202e", "\x1b", "=")
        ):
            pytest.skip("a name that a folder may have")
        attempt = lambda: run(make_config(config), out=name)  # noqa: E731
    else:
        table, field = key.split(".")
        config[table][field] = name
        attempt = lambda: run(make_config(config), out=tmp_path / "run")  # noqa: E731
    with pytest.raises(InputError) as refusal:
        attempt()
    one_line(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def inputs_here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


cell = st.one_of(text.filter(lambda t: "\ud800" not in t), st.integers().map(str), st.just("ok"))


@settings(max_examples=150)
@given(
    st.lists(cell, min_size=1, max_size=4),
    st.lists(st.lists(cell, max_size=4), max_size=8),
    st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]),
    st.booleans(),
)
@example(["text", "label"], [["a", "x"], ["b", "y"], ["c", "x"], ["d", "y"]] * 5, ".csv", False)
@example(["x" * 10_000, "../"], [["a", "b"]], ".csv", False)
def test_any_rows_are_a_corpus_or_one_line(tmp_path_factory, header, rows, ending, named):
    path = tmp_path_factory.getbasetemp() / f"fuzz{ending}"
    names = ["text", "label", *header] if named else header
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        if ending == ".jsonl":
            file.writelines(json.dumps(dict(zip(names, row, strict=False))) + "\n" for row in rows)
        else:
            csv.writer(file, delimiter="\t" if ending == ".tsv" else ",").writerows([names, *rows])
    for text_key, label_key in [("text", "label"), (names[0], names[-1])]:
        try:
            found = load_corpus(Data(source=str(path), text=text_key, label=label_key), 0)
        except InputError as error:
            one_line(error)
        else:
            assert isinstance(found, Corpus)


@settings(max_examples=100)
@given(st.binary(max_size=200), st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".parquet", ".exe"]))
@example(b'{"text": ' + b"[" * 10_000, ".jsonl")
@example(b"text,label\n" + b'"' + b"x" * 3_000_000 + b'",a\n' + b"y,b\n" * 4, ".csv")
@example(b"PAR1" + b"\xff" * 60 + b"PAR1", ".parquet")
def test_any_bytes_as_a_data_file(tmp_path_factory, data, ending):
    path = tmp_path_factory.getbasetemp() / f"raw{ending}"
    path.write_bytes(data)
    try:
        load_corpus(Data(source=str(path)), 0)
    except InputError as error:
        one_line(error)


def test_names_from_a_file_never_become_paths(inputs_here, tmp_path):
    """Clients and labels named like paths, texts that are empty, huge or odd: all stay in the run folder."""
    script = "<script>alert(1)</script>"
    owners = ["../../evil", "/tmp/evil", "..", "a\u2400b", "x" * 10_000, "😀" * 700, script]
    labels = ["../up", "$\\frac{/root$", "line\nbreak", script]
    texts = ["word1 word2", "", "w" * 100_000, "\u202e word3", "word4\nword5"]
    with (tmp_path / "texts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "owner"])
        for number in range(180):
            writer.writerow([texts[number % 5], labels[number % 4], owners[number % 7]])
    config = small_config(inputs_here).model_dump(mode="json")
    config["data"] |= {"source": str(tmp_path / "texts.csv")}
    config["partition"] = {"kind": "natural", "column": "owner"}
    config["sampling"] = {"kind": "all"}
    here = tmp_path / "here"
    here.mkdir()

    def work():
        os.chdir(here)
        run(make_config({**config, "rounds": 1}), out="run")

    pid = forked(work, tmp_path / "told")
    assert ended(pid) == 0, (tmp_path / "told.err").read_text()
    assert json.loads((here / "run" / "rounds.jsonl").read_text())["failed"] == 0
    assert [path.name for path in here.iterdir()] == ["run"]
    assert {path.name for path in tmp_path.iterdir()} == {"texts.csv", "here", "told.out", "told.err"}
    files = {path.relative_to(here / "run").parts[0] for path in (here / "run").rglob("*")}
    expected = {"config.json", "versions.json", "partition.json", "rounds.jsonl", "clients.jsonl", "adapter"}
    expected |= {"summary.json", "client_scores.jsonl", "state.safetensors", "report.html", ".lock"}
    assert files == expected
    page = (here / "run" / "report.html").read_text()
    assert "../up" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page


def test_the_command_line_says_one_line_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["run", "--set", "a\nb=1"], ["resume", "z" * 10_000], ["run", "x" * 10_000]):
        assert ended(forked(command(*words), tmp_path / "told")) == 2
        told = (tmp_path / "told.err").read_text()
        assert told.startswith("polyrank: ")
        assert told.count("\n") == 1
        assert len(told) < 1500
        (tmp_path / "told.err").unlink()
