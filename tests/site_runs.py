"""The same texts twice: one file with a column of sites, and one file per site with a table of its own."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from polyrank.config import Config
from tests.small_runs import make_inputs, small_config

SITES = ("site-a", "site-b", "site-c")
LABELS = ("kind 0", "kind 1", "kind 2")
MIXED = (
    "aggregation.kind=replication_padding",
    "allocation={kind='tiers', tiers=[{rank=1, share=0.4}, {rank=3, share=0.6}]}",
)


def write_rows(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def make_sites(folder: Path) -> Path:
    """A tiny model, train.csv with a column of sites, test.csv, and for each site own.csv with site.toml.

    The same for a tiny language model: train.jsonl, test.jsonl, and for each site own.jsonl, speaker.toml.
    """
    make_inputs(folder)
    make_speaking_sites(folder)
    with (folder / "texts.csv").open(encoding="utf-8") as file:
        rows = [(text, label) for text, label in csv.reader(file)][1:]
    test, train = rows[:18], rows[18:]
    owned = [(*row, SITES[number % 7 % 3]) for number, row in enumerate(train)]
    write_rows(folder / "test.csv", ("text", "label"), test)
    write_rows(folder / "train.csv", ("text", "label", "site"), owned)
    for site in SITES:
        write_rows(folder / site / "own.csv", ("body", "kind"), [row[:2] for row in owned if row[2] == site])
        (folder / site / "site.toml").write_text(
            f'device = "cpu"\n[model]\nname = "{folder / "model"}"\n'
            '[data]\nsource = "own.csv"\ntext = "body"\nlabel = "kind"\n'
        )
    return folder


def make_speaking_sites(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    owned = [{**row, "site": SITES[number % 7 % 3]} for number, row in enumerate(rows[12:])]
    files = {folder / "test.jsonl": rows[:12], folder / "train.jsonl": owned}
    for site in SITES:
        (folder / site).mkdir()
        files[folder / site / "own.jsonl"] = [row for row in owned if row["site"] == site]
        (folder / site / "speaker.toml").write_text(
            f'device = "cpu"\n[model]\nname = "{folder / "speaker"}"\n[data]\nsource = "own.jsonl"\n'
        )
    for path, lines in files.items():
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def site_settings(folder: Path, task: str = "classification") -> list[str]:
    """What makes a small run one over these sites, simulated or real."""
    if task == "causal_lm":
        return [
            f"data.source={folder / 'train.jsonl'}",
            f"data.test={folder / 'test.jsonl'}",
            "partition={kind='natural', column='site'}",
        ]
    return [
        f"data.source={folder / 'train.csv'}",
        f"data.test={folder / 'test.csv'}",
        f"data.labels={list(LABELS)}",
        "partition={kind='natural', column='site'}",
    ]


def site_config(folder: Path, method: str, *more: str) -> Config:
    """The config of such a run; without more settings its sites are simulated."""
    task = "causal_lm" if method == "causal" else "classification"
    return small_config(folder, method, *site_settings(folder, task), *more)
