"""Many runs of one study: each cell is one config and one run folder, done once, in worker processes."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

Cells = Mapping[str, Mapping[str, Any]]
GIVEN = "cell.json"
"""In the folder of a finished cell: the config as it was given."""


def arguments(about: str) -> argparse.Namespace:
    """The command line that all studies share."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with ag_news/, banking77/, ...")
    parser.add_argument("--out", type=Path, required=True, help="folder for run folders and tables")
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


def run_cells(cells: Cells, out: Path, workers: int) -> dict[str, dict[str, Any]]:
    """The summaries of all cells by name; one that is there, of this config, is not run again."""
    for _ in finished(cells, out, workers):
        pass
    return {name: json.loads((out / name / "summary.json").read_text()) for name in cells}


def finished(cells: Cells, out: Path, workers: int) -> Iterator[str]:
    """The names of all cells: first of those that are done already, then of the others as they are.

    Raises: RuntimeError in the end, when some failed; the others are done all the same.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    todo = [name for name, cell in cells.items() if not is_done(out / name, cell)]
    yield from (name for name in cells if name not in todo)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = {pool.submit(run_cell, name, dict(cells[name]), out / name): name for name in todo}
        failed = []
        for done, job in enumerate(as_completed(jobs), 1):
            error = job.exception()
            said = job.result() if error is None else f"{jobs[job]}: {error}"
            print(f"{done}/{len(jobs)} {said}", flush=True)
            if error is None:
                yield jobs[job]
            else:
                failed.append(jobs[job])
    if failed:
        raise RuntimeError(f"{len(failed)} cells failed: {', '.join(failed)}")


def is_done(folder: Path, cell: Mapping[str, Any]) -> bool:
    """Whether a folder holds a finished run of this very config."""
    given = folder / GIVEN
    return given.exists() and digest(json.loads(given.read_text())) == digest(cell)


def digest(config: Mapping[str, Any]) -> str:
    """A short name for a config, the same wherever data and model lie."""
    told = dict(config)
    for table, key in (("data", "source"), ("model", "name")):
        if key in config.get(table, {}):
            told[table] = {**config[table], key: Path(config[table][key]).name}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def run_cell(name: str, given: dict[str, Any], folder: Path) -> str:
    """Run one cell and say how it went; what its folder held before is put aside."""
    from polyrank import run
    from polyrank.config import make_config
    from polyrank.measures import told

    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.before-{time.time_ns()}"))
    summary = run(make_config(given), folder).summary
    (folder / GIVEN).write_text(json.dumps(given))
    return f"{name}: {told(summary)} in {summary['wall_s']:.0f} s"


def rounds_of(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of rounds.jsonl of one cell."""
    for line in (folder / "rounds.jsonl").read_text().splitlines():
        yield json.loads(line)


def mean_sd(values: list[float]) -> str:
    """``mean (sd)`` with three decimals."""
    sd = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ({sd:.3f})"


def paired(values: list[float], base: list[float]) -> str:
    """Mean difference to the base over the same seeds, with its 95 % Student t interval."""
    from scipy import stats

    gaps = [value - other for value, other in zip(values, base, strict=True)]
    mean, count = statistics.mean(gaps), len(gaps)
    half = stats.t.ppf(0.975, count - 1) * statistics.stdev(gaps) / count**0.5
    return f"{100 * mean:+.1f} [{100 * (mean - half):+.1f}, {100 * (mean + half):+.1f}]"
