"""Reading texts from local files or a hub, with every defect told in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from polyrank.data.docstrings import load_docstrings
from polyrank.data.instructions import columns_of, from_columns, from_messages
from polyrank.data.texts import Corpus, Data, Texts, Turns
from polyrank.durable import kind_at
from polyrank.errors import InputError, choices, first_line
from polyrank.seed import seed_for

READABLE = (".csv", ".tsv", ".parquet", ".jsonl", ".json")


def load_corpus(data: Data, seed: int, group: str | None = None) -> Corpus:
    """The train and test texts that a config names.

    Args:
        seed: of the train/test split and of subsampling.
        group: column with each example's natural owner, for a natural partition.

    Raises:
        InputError: a file or column is missing, a column has the wrong type, a label is unknown.
    """
    if data.source == "docstrings":
        if group is not None:
            raise InputError("partition.column", group, "the built-in docstrings have no such column")
        corpus = load_docstrings()
    else:
        train, test = _tables(data)
        for name in data.text_columns:
            _text_column(train, "data.text", name)  # defects of the texts are told first
        names = data.labels or _label_names(train, data)
        by_name = _are_names(train, data, names)
        texts = _texts(train, data, names, group, by_name=by_name)
        if test is None:
            corpus = _split(texts, data, names, seed)
        else:
            corpus = Corpus(texts, _texts(test, data, names, None, by_name=by_name), names)
    return subsampled(corpus, data, seed)


def load_instructions(data: Data, seed: int, group: str | None = None, skewed: str | None = None) -> Corpus:
    """The train and test prompts with their responses that a config names.

    Args:
        seed: of the train/test split and of subsampling.
        group: column with each example's natural owner, for a natural partition.
        skewed: the kind of a partition by labels, which needs the label column; the other columns never do.

    Raises:
        InputError: a file or column is missing, or holds something else.
    """
    if data.source == "docstrings":
        raise InputError(
            "data.source", data.source, "has no responses; name a file, a folder or a hub data set"
        )
    train, test = _tables(data)
    if skewed is not None and data.label not in train.column_names:
        allowed = f"needs labels, and there is no column {data.label!r}; 'iid' or 'natural' go without"
        raise InputError("partition.kind", skewed, allowed)
    names = ("texts",) if skewed is None else data.labels or _label_names(train, data)
    by_name = skewed is None or _are_names(train, data, names)

    def texts(table: pa.Table, owner: str | None) -> Texts:
        turns, responses = _instructions(table, data)
        labels = [0] * len(turns) if skewed is None else _labels(table, data, names, by_name=by_name)
        return Texts(turns, responses, labels, _groups(table, owner))

    found = texts(train, group)
    corpus = _split(found, data, names, seed) if test is None else Corpus(found, texts(test, None), names)
    return subsampled(corpus, data, seed)


def _instructions(table: pa.Table, data: Data) -> tuple[list[Turns], list[str]]:
    columns = columns_of(data, table.column_names)
    if columns.messages:
        column = _column(table, "data.messages", columns.messages)
        return from_messages(_values(column, "data.messages", columns.messages), columns.messages)
    prompts = [_text_column(table, "data.prompt", name) for name in columns.prompt]
    return from_columns(prompts, _text_column(table, "data.response", columns.response))


def subsampled(corpus: Corpus, data: Data, seed: int) -> Corpus:
    """At most ``data.max_train`` and ``data.max_test`` of the texts, drawn at random."""
    return Corpus(
        _subsample(corpus.train, data.max_train, seed, "train"),
        _subsample(corpus.test, data.max_test, seed, "test"),
        corpus.label_names,
    )


def load_file(path: Path, key: str, data: Data, names: Sequence[str], task: str) -> Texts:
    """All texts of one file: under label names that are agreed already, or prompts with their responses.

    Args:
        key: what the path is called where it was given.
        data: names the columns.
        task: what they are for.

    Raises: InputError as `load_corpus` and `load_instructions`.
    """
    table = read_table(path, key)
    if task == "causal_lm":
        turns, responses = _instructions(table, data)
        return Texts(turns, responses, [0] * len(turns))
    return _texts(table, data, names, None, by_name=_are_names(table, data, names))


def read_table(path: Path, key: str) -> pa.Table:
    """One file as an Arrow table.

    Raises: InputError when it is missing, of another kind, or broken.
    """
    if kind_at(path) != "file":
        raise InputError(key, str(path), "no such file")
    quoted = pa.csv.ParseOptions(newlines_in_values=True)
    tabs = pa.csv.ParseOptions(delimiter="\t", newlines_in_values=True)
    readers: dict[str, Any] = {
        ".csv": lambda: pa.csv.read_csv(path, parse_options=quoted),
        ".tsv": lambda: pa.csv.read_csv(path, parse_options=tabs),
        ".parquet": lambda: pa.parquet.read_table(path),
        ".jsonl": lambda: pa.json.read_json(path),
        ".json": lambda: pa.json.read_json(path),
    }
    ending = path.suffix.lower()
    if ending not in readers:
        raise InputError(key, str(path), f"must end in {choices(path.suffix, READABLE)}")
    try:
        table: pa.Table = readers[ending]()
    except (pa.ArrowException, OSError, ValueError) as error:
        hint = "; a .csv is cut at commas, a .tsv at tabs" if ending in (".csv", ".tsv") else ""
        allowed = f"cannot be read as {ending[1:]} ({first_line(error)}){hint}"
        raise InputError(key, str(path), allowed) from error
    twice = next((n for n in table.column_names if table.column_names.count(n) > 1), None)
    if twice is not None:
        raise InputError(key, str(path), f"has two columns named {twice!r}")
    return table


def _tables(data: Data) -> tuple[pa.Table, pa.Table | None]:
    if data.source.startswith("hub:"):
        return _hub_tables(data)
    path = Path(data.source)
    found = kind_at(path)
    if data.test is not None and found != "file":
        raise InputError("data.test", data.test, "goes with a data.source that is one file")
    if found == "folder":
        return (
            read_table(_file_in(path, "train"), "data.source"),
            read_table(_file_in(path, "test"), "data.source"),
        )
    if found == "nothing":
        allowed = "must be 'docstrings', 'hub:OWNER/NAME', or a file or folder that exists"
        raise InputError("data.source", data.source, allowed)
    test = None if data.test is None else read_table(Path(data.test), "data.test")
    return read_table(path, "data.source"), test


def _file_in(folder: Path, stem: str) -> Path:
    for ending in READABLE:
        if (folder / f"{stem}{ending}").is_file():
            return folder / f"{stem}{ending}"
    allowed = f"the folder holds no {stem} file ({', '.join(stem + e for e in READABLE)})"
    raise InputError("data.source", str(folder), allowed)


def _hub_tables(data: Data) -> tuple[pa.Table, pa.Table | None]:
    from datasets import load_dataset

    name = data.source.removeprefix("hub:")
    try:
        splits = load_dataset(name, data.subset)
    except Exception as error:  # the library raises many kinds
        allowed = f"cannot be loaded ({first_line(error)})"
        raise InputError("data.source", data.source, allowed) from error
    if "train" not in splits:
        raise InputError("data.source", data.source, f"has no train split, only {list(splits)}")
    labelled = [name for name in ("test", "validation") if name in splits and _has_labels(splits[name], data)]
    test = _plain(splits[labelled[0]]) if labelled else None
    return _plain(splits["train"]), test


def _has_labels(split: Any, data: Data) -> bool:
    """Benchmarks such as GLUE publish their test split with every label -1."""
    return data.label not in split.column_names or split[data.label][0] != -1


def _plain(split: Any) -> pa.Table:
    """An Arrow table in which class labels stand by name, as the data set's features give them."""
    table: pa.Table = split.with_format("arrow")[:]
    for column, feature in split.features.items():
        names = getattr(feature, "names", None)
        if names:
            values = pa.array([names[i] if 0 <= i < len(names) else None for i in split[column]])
            table = table.set_column(table.column_names.index(column), column, values)
    return table


def _column(table: pa.Table, key: str, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise InputError(key, name, f"no such column; {choices(name, table.column_names)}")
    column = table[name]
    if isinstance(column.type, pa.DictionaryType):
        column = pc.cast(column, column.type.value_type)
    if len(column) == 0:
        raise InputError(key, name, "the file has a header but no rows")
    return column


def _values(column: pa.ChunkedArray, key: str, name: str) -> list[Any]:
    """Raises: InputError for a column that Arrow reads and cannot give out (lists of nothing but nulls)."""
    try:
        found: list[Any] = column.to_pylist()
    except pa.ArrowException as error:
        raise InputError(key, name, f"cannot be read ({first_line(error)})") from error
    return found


def _text_column(table: pa.Table, key: str, name: str) -> list[str]:
    column = _column(table, key, name)
    if pa.types.is_binary(column.type):
        raise InputError(key, name, "holds bytes that are not UTF-8; save the file as UTF-8")
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise InputError(key, name, f"must be a text column, but holds {column.type}")
    return [text if text is not None else "" for text in column.to_pylist()]


def _label_names(table: pa.Table, data: Data) -> tuple[str, ...]:
    """The distinct labels, sorted; whole numbers by value."""
    column = _label_column(table, data)
    values = pc.unique(column).to_pylist()
    if pa.types.is_integer(column.type) and min(values) < 0:
        raise InputError("data.label", min(values), "label outside range; whole numbers from 0 on, or text")
    if len(values) < 2:
        raise InputError("data.label", data.label, f"needs at least two labels; all are {values[0]!r}")
    if 2 * len(values) > len(column):
        allowed = f"holds {len(values)} different labels on {len(column)} texts, which is too many to learn"
        raise InputError("data.label", data.label, allowed)
    return tuple(str(value) for value in sorted(values))


def _label_column(table: pa.Table, data: Data) -> pa.ChunkedArray:
    """The labels as whole numbers, booleans or text; 1.0 counts as 1, as spreadsheets write it."""
    column = _column(table, "data.label", data.label)
    if column.null_count:
        row = column.is_null().to_pylist().index(True) + 1
        raise InputError("data.label", data.label, f"text {row} (from 1, header not counted) has no label")
    if pa.types.is_floating(column.type) and all(value.is_integer() for value in column.to_pylist()):
        column = pc.cast(column, pa.int64())
    kinds = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    if not any(is_kind(column.type) for is_kind in kinds):
        allowed = f"labels must be whole numbers or text, but the column holds {column.type}"
        raise InputError("data.label", data.label, allowed)
    return column


def _labels(table: pa.Table, data: Data, names: Sequence[str], *, by_name: bool) -> list[int]:
    values: list[Any] = _label_column(table, data).to_pylist()
    index = {name: position for position, name in enumerate(names)}
    if by_name:
        for value in values:
            if str(value) not in index:
                raise InputError("data.label", value, f"unknown label; {choices(value, names)}")
        return [index[str(value)] for value in values]
    for value in values:
        if not isinstance(value, int) or not 0 <= value < len(names):
            allowed = f"label outside range; {len(names)} labels, so 0 to {len(names) - 1}"
            raise InputError("data.label", value, allowed)
    return values


def _are_names(table: pa.Table, data: Data, names: Sequence[str]) -> bool:
    """Whether the train labels are names; otherwise they are positions in the list of names."""
    column = _label_column(table, data)
    return not pa.types.is_integer(column.type) or set(map(str, pc.unique(column).to_pylist())) <= set(names)


def _texts(table: pa.Table, data: Data, names: Sequence[str], group: str | None, *, by_name: bool) -> Texts:
    columns = [_text_column(table, "data.text", name) for name in data.text_columns]
    pairs = columns[1] if len(columns) == 2 else None
    return Texts(columns[0], pairs, _labels(table, data, names, by_name=by_name), _groups(table, group))


def _groups(table: pa.Table, group: str | None) -> list[str] | None:
    """The natural owner of each example, where a natural partition asks for it."""
    if group is None:
        return None
    column = _column(table, "partition.column", group)
    return [str(value) for value in _values(column, "partition.column", group)]


def _split(texts: Texts, data: Data, names: Sequence[str], seed: int) -> Corpus:
    """Keep ``test_share`` of each label aside for testing."""
    draw = np.random.default_rng(seed_for(seed, "test split"))
    labels = np.asarray(texts.labels)
    is_test = np.zeros(len(texts), dtype=bool)
    for label in np.unique(labels):
        rows = draw.permutation(np.flatnonzero(labels == label))
        is_test[rows[: round(data.test_share * len(rows))]] = True
    if not is_test.any() or is_test.all():
        raise InputError(
            "data.test_share", data.test_share, f"leaves train or test empty ({len(texts)} texts)"
        )
    train, test = np.flatnonzero(~is_test).tolist(), np.flatnonzero(is_test).tolist()
    return Corpus(texts.select(train), texts.select(test), names)


def _subsample(texts: Texts, limit: int | None, seed: int, which: str) -> Texts:
    if limit is None or limit >= len(texts):
        return texts
    draw = np.random.default_rng(seed_for(seed, "subsample", which))
    return texts.select(sorted(draw.permutation(len(texts))[:limit].tolist()))
