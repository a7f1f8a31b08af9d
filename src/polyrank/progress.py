"""The live table of a run: one line per round, and when it will be done."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from polyrank.measures import MEASURES, Measure

BEFORE, AFTER = ("round", "cohort", "train loss", "test loss"), ("down", "up", "ETA")


def show(
    rows: Iterable[dict[str, Any]], rounds: int, task: str = "classification"
) -> Iterator[dict[str, Any]]:
    """Pass the rows of a run through, showing each round; the summary row is not shown.

    On a terminal the table grows in place; elsewhere each round prints one plain line.
    """
    console = Console()
    started, lead = time.perf_counter(), MEASURES[task][0]
    if console.is_terminal:
        yield from _live(rows, rounds, lead, console)
        return
    print(" ".join(f"{name:>10}" for name in (*BEFORE, lead.title, *AFTER)), flush=True)
    for shown, row in enumerate(rows, start=1):
        if "round" in row:
            cells = _cells(row, rounds, lead, (time.perf_counter() - started) / shown)
            print(" ".join(f"{cell:>10}" for cell in cells), flush=True)
        yield row


def _live(
    rows: Iterable[dict[str, Any]], rounds: int, lead: Measure, console: Console
) -> Iterator[dict[str, Any]]:
    started, table = time.perf_counter(), Table(*BEFORE, lead.title, *AFTER)
    with Live(table, console=console, auto_refresh=False) as live:
        for shown, row in enumerate(rows, start=1):
            if "round" in row:
                table.add_row(*_cells(row, rounds, lead, (time.perf_counter() - started) / shown))
                live.refresh()
            yield row


def _cells(row: dict[str, Any], rounds: int, lead: Measure, round_s: float) -> list[str]:
    done = row["round"] + 1
    left_s = round_s * (rounds - done)
    scored = lead.on_test in row
    failed = f" ({row['failed']} failed)" if row["failed"] else ""
    return [
        f"{done}/{rounds}",
        f"{row['cohort']}{failed}",
        f"{row['train_loss']:.3f}" if "train_loss" in row else "",
        f"{row['test_loss']:.3f}" if scored else "",
        f"{row[lead.on_test]:.3f}" if scored else "",
        _size(row["bytes_down"]),
        _size(row["bytes_up"]),
        f"{int(left_s) // 60}:{int(left_s) % 60:02d}",
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.2f} MB"
