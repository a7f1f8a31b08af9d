"""Several methods or configs over several seeds: cell by cell, and never a finished cell twice.

    plan the cells -> refuse a folder of another plan -> run what is missing -> write the comparison

A cell is one arm on one seed. The seed draws the clients and their order, so that all arms of one seed
meet the same clients in the same order.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from polyrank.config import Config, load_config
from polyrank.errors import InputError, RunError, choices
from polyrank.experiment import run
from polyrank.ledger import RunFolder
from polyrank.measures import MEASURES, measures_of
from polyrank.recipes import recipes
from polyrank.report.comparison import PLAN, result_lines, write_comparison
from polyrank.report.comparison_numbers import cell_path, is_finished, read_cell
from polyrank.restart import resume

__all__ = [
    "cell_names",
    "compare",
    "free_folder",
    "read_arms",
    "result_lines",
    "show_cells",
    "write_comparison",
]


def read_arms(names: Sequence[str], settings: Sequence[str] = ()) -> dict[str, Config]:
    """The arms by label: a recipe's name, or the stem of a config file.

    Args:
        settings: ``key=value``, laid over every arm.

    Raises: InputError when a name is neither, two arms share a label, or a config is wrong.
    """
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if key in ("seed", "method"):
            raise InputError("--set", setting, "arms bring their method and --seeds counts the seeds")
    arms: dict[str, Config] = {}
    for name in names:
        path = Path(name) if name.endswith(".toml") else None
        label = name if path is None else path.stem
        if path is None and name not in recipes():
            raise InputError("ARM", name, f"is no .toml file and no recipe; {choices(name, recipes())}")
        if label in arms:
            raise InputError("ARM", name, f"a second arm {label!r}; give every arm a name of its own")
        with _naming(label):
            arms[label] = load_config(path, [*([] if path else [f"method={name}"]), *settings])
    return arms


def free_folder() -> Path:
    """The first free ``comparisons/N``; it is not made."""
    number = 1
    while (path := Path("comparisons") / str(number)).exists():
        number += 1
    return path


def compare(
    arms: Mapping[str, Config], seeds: Sequence[int], out: Path, target: float | None = None
) -> Iterator[dict[str, Any]]:
    """Run every arm on every seed; yields a row per cell, first those that ``out`` holds already.

    A row has a ``status``: ``kept`` or ``done`` with the keys of summary.json, or ``failed`` with an
    ``error``; the others still run. Afterwards, `write_comparison` makes the tables.

    Args:
        arms: config by label; the first is what the others are compared to. Their own seeds are not used.
        out: a new folder, or one of the same arms and seeds, which is then finished.
        target: a test accuracy (or perplexity); rows then say the rounds and bytes it took.

    Raises: InputError when ``out`` holds something else or a config cannot be run; nothing was overwritten.
    """
    plan = make_plan(arms, seeds)
    if target is not None:
        check_target(target, next(iter(arms.values())).task)
    open_comparison(out, plan)
    return _rows(arms, seeds, out, target)


def check_target(target: float, task: str) -> None:
    """Raises: InputError when no run could be as good, or every run is."""
    if task == "classification" and not 0 < target <= 1:
        raise InputError("--target", target, "must be an accuracy above 0 and at most 1")
    if task == "causal_lm" and not 1 < target < math.inf:
        raise InputError("--target", target, "must be a perplexity above 1")


def _rows(
    arms: Mapping[str, Config], seeds: Sequence[int], out: Path, target: float | None
) -> Iterator[dict[str, Any]]:
    cells = [(label, seed) for seed in seeds for label in arms]
    kept = [cell for cell in cells if is_finished(cell_path(out, *cell))]
    for label, seed in kept:
        yield {"status": "kept", **read_cell(out, label, seed, target).row}
    for label, seed in cells:
        if (label, seed) in kept:
            continue
        error = run_cell(out, label, arms[label].model_copy(update={"seed": seed}))
        if error is None:
            yield {"status": "done", **read_cell(out, label, seed, target).row}
        else:
            yield {"status": "failed", "label": label, "seed": seed, "error": error}


def cell_names(arms: Iterable[str], seeds: Iterable[int]) -> list[str]:
    """The cells in the order they run: all arms of a seed before the next seed."""
    labels = list(arms)
    return [f"{label}-{seed}" for seed in seeds for label in labels]


def make_plan(arms: Mapping[str, Config], seeds: Sequence[int]) -> dict[str, Any]:
    """What makes two comparisons the same; labels become names of folders, so they must be fit for that."""
    if not arms:
        raise InputError("ARM", [], "name at least one recipe or .toml file")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError("--seeds", list(seeds), "must be at least one seed, each once, none below 0")
    for label in arms:
        if not re.fullmatch(r"[^\W_][\w.+-]*", label):
            raise InputError("ARM", label, "must begin with a letter or digit; then also . _ + -")
    if len({label.casefold() for label in arms}) < len(arms):
        raise InputError("ARM", list(arms), "two names differ in upper and lower case alone")
    if len(tasks := sorted({config.task for config in arms.values()})) > 1:
        raise InputError("ARM", list(arms), f"one has task {tasks[0]!r} and another {tasks[1]!r}")
    configs = {label: config.model_dump(mode="json", exclude={"seed"}) for label, config in arms.items()}
    return {
        "arms": [{"label": label, "config": config} for label, config in configs.items()],
        "seeds": list(seeds),
    }


def open_comparison(out: Path, plan: Mapping[str, Any]) -> None:
    """Make the folder of a comparison, or find the same one there.

    Raises: InputError when ``out`` holds anything else.
    """
    folder = RunFolder(out)
    if out.exists():
        if not (out / PLAN).exists() or folder.read(PLAN) != plan:
            allowed = "exists already and holds another comparison; name a new folder"
            raise InputError("--out", str(out), allowed)
        return
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise InputError("--out", str(out), f"cannot be made ({error.strerror})") from error
    folder.write(PLAN, plan)


def run_cell(out: Path, label: str, config: Config) -> str | None:
    """Run one cell, or go on with half a cell; returns the reason when the run could not go on.

    Raises: InputError, which names the arm; a comparison without any cell is then taken away again.
    """
    path = cell_path(out, label, config.seed)
    if path.is_symlink() or path.is_file():
        raise InputError("--out", str(path), "is no folder; nothing was overwritten")
    try:
        with _naming(label):
            if not _gone_on(path):
                run(config, out=path)
    except RunError as error:
        return str(error)
    except InputError:
        if {entry.name for entry in out.iterdir()} == {PLAN}:
            (out / PLAN).unlink()
            out.rmdir()
        raise
    return None


def _gone_on(path: Path) -> bool:
    """Whether half a run was there and is finished now; one that cannot go on is taken away."""
    if not path.exists():
        return False
    try:
        resume(path)
    except InputError:
        shutil.rmtree(path)
        return False
    return True


@contextmanager
def _naming(label: str) -> Iterator[None]:
    """Bad input inside says which arm it belongs to."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{label}: {error.key}", error.value, error.allowed) from error


def show_cells(
    rows: Iterable[dict[str, Any]], names: Sequence[str], task: str = "classification"
) -> Iterator[dict[str, Any]]:
    """Pass the rows of a comparison through, showing each cell.

    On a terminal one table holds all cells, also those that wait; elsewhere each cell that is through
    prints one plain line.
    """
    console = Console()
    heading = ("cell", "status", MEASURES[task][0].title, "wall s", "ETA")
    if console.is_terminal:
        yield from _live(rows, names, heading, console)
        return
    width = max(map(len, names))
    print(_line(heading, width), flush=True)
    for row, shown in _timed(rows, len(names)):
        print(_line(shown, width), flush=True)
        yield row


def _live(
    rows: Iterable[dict[str, Any]], names: Sequence[str], heading: Sequence[str], console: Console
) -> Iterator[dict[str, Any]]:
    table = {name: [name, "waiting", "", "", ""] for name in names}
    with Live(_table(heading, table.values()), console=console, auto_refresh=False) as live:
        for row, shown in _timed(rows, len(names)):
            table[shown[0]] = shown
            live.update(_table(heading, table.values()), refresh=True)
            yield row


def _table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    """The first cell that waits is the one that runs."""
    table, running = Table(*heading), False
    for name, status, *rest in lines:
        starts = status == "waiting" and not running
        table.add_row(name, "running" if starts else status, *rest)
        running = running or starts
    return table


def _timed(rows: Iterable[dict[str, Any]], count: int) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Each row with its texts; the time left is guessed from the cells that ran in this call."""
    started, ran = time.perf_counter(), 0
    for number, row in enumerate(rows, start=1):
        ran += row["status"] != "kept"
        left_s = (time.perf_counter() - started) / ran * (count - number) if ran else None
        yield (
            row,
            [
                f"{row['label']}-{row['seed']}",
                row["status"],
                "" if (both := measures_of(row)) is None else f"{row[both[0].on_test]:.3f}",
                f"{row['wall_s']:.0f}" if "wall_s" in row else "",
                "" if left_s is None else f"{int(left_s) // 60}:{int(left_s) % 60:02d}",
            ],
        )


def _line(texts: Sequence[str], width: int) -> str:
    return " ".join([f"{texts[0]:<{width}}", *(f"{text:>9}" for text in texts[1:])])
