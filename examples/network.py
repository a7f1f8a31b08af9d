"""A server and three sites as processes on this machine, over mutual TLS; then the same run simulated.

Run by `make demo-network`. Needs the extras demo and flare; takes two to three minutes.
"""

import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from polyrank.data.docstrings import load_docstrings

SITES, PORT = ("anna", "ben", "carla"), 8765
POLYRANK = [sys.executable, "-c", "from polyrank.cli import main; main()"]
SETTINGS = ["method=fedara", "rounds=3", "sampling.count=3", "training.local_steps=2", "engine.fuse=1"]


def write(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_texts(folder: Path) -> list[str]:
    """The same texts twice: in one file with a column of sites, and in one file per site."""
    corpus = load_docstrings()
    train, test = (
        [[text, corpus.label_names[label]] for text, label in zip(part.texts, part.labels, strict=True)]
        for part in (corpus.train.select(range(300)), corpus.test.select(range(100)))
    )
    owned = [[*row, SITES[number % 3]] for number, row in enumerate(train)]
    write(folder / "train.csv", ["text", "label", "site"], owned)
    write(folder / "test.csv", ["text", "label"], test)
    for site in SITES:
        write(folder / f"{site}.csv", ["text", "label"], [row[:2] for row in owned if row[2] == site])
        (folder / f"{site}.toml").write_text(f'device = "cpu"\n[data]\nsource = "{site}.csv"\n')
    return [
        f"data={{source='{folder}/train.csv', test='{folder}/test.csv', labels={list(corpus.label_names)}}}",
        "partition={kind='natural', column='site'}",
    ]


def run(folder: Path, name: str, settings: list[str]) -> str:
    start = time.perf_counter()
    words = [word for setting in settings for word in ("--set", setting)]
    subprocess.run([*POLYRANK, "run", "--out", str(folder / name), "--set", "device=cpu", *words], check=True)
    print(f"{name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    return str(json.loads((folder / name / "summary.json").read_text())["adapter_sha256"])


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = [*write_texts(folder), *SETTINGS]
        named = [word for site in SITES for word in ("--site", site)]
        kits = ["--server", "localhost", "--port", str(PORT), "--out", str(folder / "kits")]
        subprocess.run([*POLYRANK, "provision", "demo", *kits, *named], check=True)
        commands = [["serve", str(folder / "kits" / "server")]]
        commands += [
            ["join", str(folder / "kits" / site), "--data", str(folder / f"{site}.toml")] for site in SITES
        ]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        processes = [subprocess.Popen([*POLYRANK, *words], **quiet) for words in commands]
        try:
            kit = f"engine.kit={folder / 'kits' / 'admin'}"
            network = run(folder, "network", [*settings, "engine.kind=flare", kit])
            print((folder / "network" / "sites.json").read_text())
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
        embedded = run(folder, "embedded", settings)
        print(f"adapter over the network  {network}\nadapter of simulated ones {embedded}")
        sys.exit(network != embedded)


if __name__ == "__main__":
    main()
