"""Reading, splitting and sharing out texts; every defect is one clear line."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyrank.data.docstrings import PACKAGES
from polyrank.data.partition import Dirichlet, Iid, Natural, Pathological, label_counts, share_out
from polyrank.data.source import load_corpus
from polyrank.data.texts import Data, Texts
from polyrank.data.tokens import tokenize
from polyrank.errors import InputError

ROWS = [{"text": f"text number {i}", "label": ["b", "a", "c"][i % 3], "site": f"s{i % 4}"} for i in range(60)]


def write(path, rows, kind="csv"):
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pa.csv.write_csv(table, path, pa.csv.WriteOptions(delimiter="\t" if kind == "tsv" else ","))
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_a_file_of_each_kind(tmp_path, kind):
    corpus = load_corpus(Data(source=write(tmp_path / f"x.{kind}", ROWS, kind)), 0)
    assert list(corpus.label_names) == ["a", "b", "c"]
    assert (len(corpus.train), len(corpus.test)) == (48, 12)
    assert label_counts(corpus.test, range(12), 3) == [4, 4, 4]
    assert not set(corpus.train.texts) & set(corpus.test.texts)
    again = load_corpus(Data(source=str(tmp_path / f"x.{kind}")), 0)
    assert again == corpus
    assert load_corpus(Data(source=str(tmp_path / f"x.{kind}")), 1) != corpus


def test_a_folder_and_a_test_file(tmp_path):
    write(tmp_path / "train.parquet", ROWS[:40], "parquet")
    test = write(tmp_path / "test.jsonl", ROWS[40:], "jsonl")
    corpus = load_corpus(Data(source=str(tmp_path)), 0)
    assert (len(corpus.train), len(corpus.test)) == (40, 20)
    assert corpus == load_corpus(Data(source=str(tmp_path / "train.parquet"), test=test), 0)
    small = load_corpus(Data(source=str(tmp_path), max_train=7, max_test=5), 0)
    assert (len(small.train), len(small.test)) == (7, 5)
    assert set(small.train.texts) <= set(corpus.train.texts)


def test_pairs_groups_and_quoted_newlines(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('one,two,site,label\n"a\nb",c,x,1\nd,"e, f",y,0\n' + "g,h,x,1\ni,j,y,0\n" * 4)
    data = Data(source=str(path), text=("one", "two"), test_share=0.2)
    corpus = load_corpus(data, 0, group="site")
    assert list(corpus.label_names) == ["0", "1"]
    assert "a\nb" in list(corpus.train.texts) + list(corpus.test.texts)
    assert corpus.train.pairs is not None
    assert set(corpus.train.groups) == {"x", "y"}


def test_label_names_may_be_given(tmp_path):
    rows = [{"text": "t", "label": i % 2} for i in range(20)]
    source = write(tmp_path / "x.csv", rows)
    corpus = load_corpus(Data(source=source, labels=("no", "yes")), 0)
    assert list(corpus.label_names) == ["no", "yes"]
    assert set(corpus.train.labels) == {0, 1}


GOOD = {"text": "some text", "label": "a"}
BAD = [
    ({"source": "missing.csv"}, None, "data.source = 'missing.csv': must be 'docstrings'"),
    ({"text": "body"}, [GOOD], "data.text = 'body': no such column; .*one of: text, label"),
    ({"label": "lable"}, [GOOD], "data.label = 'lable': no such column; did you mean 'label'"),
    ({}, [{"text": 3, "label": "a"}], "data.text = 'text': must be a text column, but holds int64"),
    (
        {},
        [{"text": "t", "label": 0.5}],
        "data.label = 'label': labels must be whole numbers or text, .*double",
    ),
    ({}, [{"text": "t", "label": -1}], "data.label = -1: label outside range"),
    ({}, [GOOD, GOOD], "data.label = 'label': needs at least two labels; all are 'a'"),
    (
        {},
        [{"text": "t", "label": i} for i in range(9)],
        "data.label = 'label': holds 9 different labels on 9",
    ),
    (
        {"labels": ("x", "y")},
        [{"text": "t", "label": 2}],
        "data.label = 2: label outside range; 2 labels, so 0 to 1",
    ),
    ({"labels": ("x", "y")}, [GOOD], "data.label = 'a': unknown label; one of: x, y"),
    (
        {"test_share": 0.1},
        [GOOD, GOOD, {**GOOD, "label": "b"}, {**GOOD, "label": "b"}],
        "data.test_share = 0.1",
    ),
]


@pytest.mark.parametrize(("options", "rows", "line"), BAD, ids=[line.split(":")[0] for *_, line in BAD])
def test_a_defect_is_one_clear_line(tmp_path, options, rows, line):
    source = write(tmp_path / "x.parquet", rows, "parquet") if rows else "missing.csv"
    with pytest.raises(InputError, match=line) as caught:
        load_corpus(Data(**{"source": source, **options}), 0)
    assert "\n" not in str(caught.value)


def test_more_defects_of_files(tmp_path):
    for name, content, line in [
        ("x.xlsx", b"PK", "must end in .*one of: .csv, .tsv"),
        ("x.parquet", b"not parquet", "cannot be read as parquet"),
        ("x.jsonl", b"{broken", "cannot be read as jsonl"),
        ("x.csv", b"", "cannot be read as csv"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"data.source = .*{re.escape(name)}': {line}"):
            load_corpus(Data(source=str(tmp_path / name)), 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="the folder holds no train file"):
        load_corpus(Data(source=str(tmp_path / "empty")), 0)
    rows = write(tmp_path / "null.parquet", [GOOD, {"text": "t", "label": None}], "parquet")
    with pytest.raises(InputError, match="text 2 .from 1, header not counted. has no label"):
        load_corpus(Data(source=rows), 0)
    with pytest.raises(
        InputError, match="partition.column = 'site': the built-in docstrings have no such column"
    ):
        load_corpus(Data(), 0, group="site")


def test_labels_are_read_the_same_way_in_train_and_test(tmp_path):
    train = write(tmp_path / "train.csv", [{"text": "t", "label": i % 3} for i in range(9)])
    test = write(tmp_path / "test.csv", [{"text": "t", "label": i} for i in (1, 2)])
    corpus = load_corpus(Data(source=train, test=test, labels=("1", "2", "3")), 0)
    assert list(corpus.test.labels) == [1, 2]  # positions, as in train, where 0 occurs


def test_whole_numbers_are_labels_by_value(tmp_path):
    rows = [{"text": "t", "label": [5, 1, 2003][i % 3]} for i in range(30)]
    assert list(load_corpus(Data(source=write(tmp_path / "i.csv", rows)), 0).label_names) == [
        "1",
        "5",
        "2003",
    ]
    floats = [{"text": "t", "label": [1.0, 5.0][i % 2]} for i in range(20)]
    path = write(tmp_path / "f.parquet", floats, "parquet")
    assert list(load_corpus(Data(source=path), 0).label_names) == ["1", "5"]


def test_files_that_are_not_utf8_say_so(tmp_path):
    (tmp_path / "x.csv").write_bytes("text,label\ncaf\xe9,a\n".encode("latin-1"))
    with pytest.raises(InputError, match="data.text = 'text': holds bytes that are not UTF-8"):
        load_corpus(Data(source=str(tmp_path / "x.csv")), 0)
    (tmp_path / "h.csv").write_text("text,label\n")
    with pytest.raises(InputError, match="the file has a header but no rows"):
        load_corpus(Data(source=str(tmp_path / "h.csv")), 0)


def test_odd_tables(tmp_path, minilm):
    (tmp_path / "twice.csv").write_text("text,text,label\na,b,c\n")
    with pytest.raises(InputError, match="data.source = .*has two columns named 'text'"):
        load_corpus(Data(source=str(tmp_path / "twice.csv")), 0)
    rows = write(tmp_path / "x.csv", ROWS)
    with pytest.raises(InputError, match="data.test = 'y.csv': goes with a data.source that is one file"):
        load_corpus(Data(source=str(tmp_path), test="y.csv"), 0)
    assert rows
    empty = tokenize(Texts(["", "a"], None, [0, 1]), FakeTokenizer(), 8)
    assert empty.lengths.tolist() == [1, 2]


class FakeTokenizer:
    """GPT-style: no special tokens, so that an empty text has none at all."""

    model_max_length, pad_token_id = 100, 7

    def __call__(self, texts, pairs, **_):
        return {"input_ids": [[1, 2] if text else [] for text in texts]}


def test_hub_sets_by_split_and_label_name(monkeypatch):
    import datasets

    columns = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "y"])}
    features = datasets.Features(columns)

    def split(labels):
        return datasets.Dataset.from_dict({"text": ["t"] * len(labels), "label": labels}, features=features)

    hub = {"train": split([0, 1, 0, 1]), "validation": split([1, 0]), "test": split([-1, -1])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: hub)
    corpus = load_corpus(Data(source="hub:glue", subset="sst2"), 0)
    assert (list(corpus.label_names), list(corpus.test.labels)) == (["n", "y"], [1, 0])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: {"test": hub["train"]})
    with pytest.raises(InputError, match="data.source = 'hub:glue': has no train split"):
        load_corpus(Data(source="hub:glue"), 0)

    def fail(name, subset):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match="data.source = 'hub:glue': cannot be loaded .ConnectionError"):
        load_corpus(Data(source="hub:glue"), 0)


def texts_of(count=600, classes=6):
    labels = (np.arange(count) % classes).tolist()
    groups = [f"site-{i % 7}" for i in range(count)]
    return Texts([str(i) for i in range(count)], None, labels, groups)


@pytest.mark.parametrize(
    ("partition", "clients"),
    [
        (Iid(clients=10), 10),
        (Dirichlet(clients=10, alpha=0.5), 10),
        (Pathological(clients=10, labels_per_client=2), 10),
        (Natural(column="site"), 7),
    ],
    ids=lambda p: getattr(p, "kind", ""),
)
def test_every_row_has_one_owner(partition, clients):
    texts = texts_of()
    shares = share_out(texts, 6, partition, 0, holdout_share=0.25)
    assert len(shares) == clients
    rows = [row for share in shares for row in (*share.train, *share.holdout)]
    assert sorted(rows) == list(range(600))
    assert all(len(s.holdout) == round(0.25 * (len(s.train) + len(s.holdout))) for s in shares)
    assert share_out(texts, 6, partition, 0, 0.25) == shares
    if partition.kind != "natural":
        assert share_out(texts, 6, partition, 1, 0.25) != shares


def test_some_clients_may_be_near_balanced():
    texts = texts_of(1_200)
    shares = share_out(texts, 6, Dirichlet(clients=20, alpha=0.1, iid_share=0.1, min_examples=1), 0)
    assert sorted(row for share in shares for row in share.train) == list(range(1_200))
    skew = [max(c := label_counts(texts, s.train, 6)) / sum(c) for s in shares]
    assert [len(s.train) for s in shares[:2]] == [60, 60]
    assert max(skew[:2]) < 0.35
    assert np.mean(skew[2:]) > 0.6


def test_partitions_have_the_skew_they_are_named_for():
    texts = texts_of()
    few = share_out(texts, 6, Pathological(clients=6, labels_per_client=2), 0)
    assert all(sum(count > 0 for count in label_counts(texts, s.train, 6)) == 2 for s in few)

    def largest_share(alpha):
        shares = share_out(texts, 6, Dirichlet(clients=5, alpha=alpha), 0)
        return np.mean([max(c := label_counts(texts, s.train, 6)) / sum(c) for s in shares])

    assert largest_share(0.1) > largest_share(1.0) > largest_share(100.0)
    natural = share_out(texts, 6, Natural(column="site"), 0)
    assert {texts.groups[row] for row in natural[0].train} == {natural[0].client}


@pytest.mark.parametrize(
    ("partition", "line"),
    [
        (Iid(clients=601), "partition.clients = 601: at most one client per train text, and there are 600"),
        (Dirichlet(clients=1, iid_share=0.5), "partition.iid_share = 0.5: leaves no client for the rest"),
        (
            Dirichlet(clients=100, alpha=0.01),
            "partition.kind = 'dirichlet': cannot be drawn from 600 texts .*clients = 100, alpha = 0.01",
        ),
        (
            Pathological(labels_per_client=9),
            "partition.labels_per_client = 9: at most the number of labels, 6",
        ),
    ],
    ids=lambda p: getattr(p, "kind", ""),
)
def test_an_empty_client_is_refused(partition, line):
    with pytest.raises(InputError, match=line):
        share_out(texts_of(), 6, partition, 0)


def test_a_client_too_small_to_keep_texts_aside_is_refused():
    with pytest.raises(InputError, match="leaves client-0 with 1 examples"):
        share_out(texts_of(4), 6, Iid(clients=4), 0, holdout_share=0.5)


def test_docstrings_are_real_plenty_and_do_not_name_their_label(docstrings):
    assert len(docstrings.label_names) == 8
    assert len(docstrings.train) + len(docstrings.test) >= 3_000
    assert len(docstrings.test) > 300
    texts = [*docstrings.train.texts, *docstrings.test.texts]
    assert len({text.lower() for text in texts}) == len(texts)
    for package in PACKAGES:
        assert not any(package in text.lower() for text in texts)
    counts = label_counts(docstrings.train, range(len(docstrings.train)), 8)
    assert min(counts) > 0.75 * max(counts)


def test_tokens_batch_to_their_own_longest(minilm):
    texts = Texts(["a b c d e f", "one", "two three"], None, [0, 1, 0])
    encoded = tokenize(texts, minilm.tokenizer, 6)
    assert encoded.lengths.tolist() == [6, 3, 4]
    inputs, labels = encoded.batch([1, 2], minilm.device)
    assert inputs["input_ids"].shape == (2, 4)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert labels.tolist() == [1, 0]
    part = encoded.select([2, 0])
    assert (
        part.batch([0], minilm.device)[0]["input_ids"].tolist()
        == encoded.batch([2], minilm.device)[0]["input_ids"].tolist()
    )
    expected = minilm.tokenizer(["one", "two three"], padding=True, return_tensors="pt")
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()


def test_pairs_carry_their_token_types(minilm):
    texts = Texts(["one", "two"], ["three", "four five"], [0, 1])
    inputs, _ = tokenize(texts, minilm.tokenizer, 16).batch([0, 1], minilm.device)
    expected = minilm.tokenizer(["one", "two"], ["three", "four five"], padding=True, return_tensors="pt")
    assert inputs["token_type_ids"].tolist() == expected["token_type_ids"].tolist()
